import itertools
import math

import libra
import pytest
import torch
from detectron2.modeling import build_model
from libra.balanced_pyramid import balance, resize
from libra_models import RCNN, RETINANET, Constrained, Maps, load, small
from torch.testing import assert_close

PYRAMIDS = {
    "even": [(8, 12), (4, 6), (2, 3)],
    "odd": [(13, 9), (7, 5), (4, 3), (2, 2), (1, 1)],
    "flat": [(1, 11), (1, 6), (1, 3)],
    "points": [(1, 1), (1, 1), (1, 1)],
    "one": [(3, 4)],
}
CASES = [(name, level) for name, sizes in PYRAMIDS.items() for level in range(len(sizes))]


def slow_resize(x, size):
    """Of (C, height, width) float64: one position after the other."""
    channels, height, width = x.shape
    result = torch.empty(channels, *size, dtype=x.dtype)
    for c, i, j in itertools.product(range(channels), range(size[0]), range(size[1])):
        if height >= size[0] and width >= size[1]:
            rows = range(i * height // size[0], math.ceil((i + 1) * height / size[0]))
            columns = range(j * width // size[1], math.ceil((j + 1) * width / size[1]))
            result[c, i, j] = max(x[c, r, k].item() for r in rows for k in columns)
        else:
            result[c, i, j] = x[c, i * height // size[0], j * width // size[1]]
    return result


def slow_conv(layer, vector):
    """A 1x1 convolution of one position's list of channels."""
    weight = layer.weight[:, :, 0, 0].tolist()
    bias = [0.0] * len(weight) if layer.bias is None else layer.bias.tolist()
    pairs = zip(weight, bias, strict=True)
    return [sum(w * v for w, v in zip(row, vector, strict=True)) + b for row, b in pairs]


def slow_refine(block, x):
    """Of (C, height, width): each position asks each other one."""
    channels, height, width = x.shape
    positions = x.flatten(1).T.tolist()
    theta, phi, g = (
        [slow_conv(f, p) for p in positions] for f in (block.theta, block.phi, block.g)
    )
    columns = []
    for i, own in enumerate(positions):
        powers = [math.exp(sum(a * b for a, b in zip(theta[i], key, strict=True))) for key in phi]
        gathered = [
            sum(power * value[c] for power, value in zip(powers, g, strict=True)) / sum(powers)
            for c in range(channels)
        ]
        columns.append([a + b for a, b in zip(own, slow_conv(block.out, gathered), strict=True)])
    return torch.tensor(columns, dtype=x.dtype).T.view(channels, height, width)


def slow_pyramid(model, levels, refine_level):
    """Balance the levels (C, height, width) of one image."""
    size = levels[refine_level].shape[1:]
    mean = torch.stack([slow_resize(x, size) for x in levels]).mean(dim=0)
    refined = slow_refine(model.refine, mean)
    return [x + slow_resize(refined, x.shape[1:]) for x in levels]


def scatter_weights(module, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = 0.7 * noise


@pytest.mark.parametrize(("name", "refine_level"), CASES)
@torch.no_grad()
def test_features_are_those_of_plain_loops(name, refine_level):
    maps = Maps(PYRAMIDS[name])
    model = libra.BalancedFeaturePyramid(maps, refine_level)
    scatter_weights(model.refine)
    features = model(None)
    assert list(features) == list(maps.output_shape())
    for image in range(2):
        expected = slow_pyramid(model, [x[image] for x in maps.maps], refine_level)
        for ours, theirs in zip(features.values(), expected, strict=True):
            assert_close(ours[image], theirs)


@pytest.mark.parametrize(("name", "refine_level"), CASES)
@torch.no_grad()
def test_a_fresh_one_adds_the_mean_of_the_levels(name, refine_level):
    maps = Maps(PYRAMIDS[name])
    model = libra.BalancedFeaturePyramid(maps, refine_level).double()
    mean = balance(list(maps.maps), refine_level)
    assert mean.shape == maps.maps[refine_level].shape
    for ours, level in zip(model(None).values(), maps.maps, strict=True):
        assert torch.equal(ours, level + resize(mean, level.shape[-2:]))


@torch.no_grad()
def test_levels_of_one_value_have_its_double():
    model = libra.BalancedFeaturePyramid(Maps(PYRAMIDS["odd"]), 2).double()
    for level in model.pyramid.maps:
        level.fill_(1.5)
    for level in model(None).values():
        assert_close(level, torch.full_like(level, 3.0))


@torch.no_grad()
def test_the_non_local_block_knows_no_place_and_no_other_image():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 5, 6, generator=generator, dtype=torch.float64)
    block = libra.NonLocalBlock(4)
    scatter_weights(block)
    refined = block(x)
    order = torch.randperm(30, generator=generator)
    moved = block(x.flatten(2)[:, :, order].view_as(x))
    assert_close(moved.flatten(2), refined.flatten(2)[:, :, order])
    assert_close(torch.cat([block(image[None]) for image in x]), refined)


def test_non_local_passes_the_gradient_check():
    generator = torch.Generator().manual_seed(0)
    args = [
        torch.randn(2, 3, 4, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(3)
    ]
    assert torch.autograd.gradcheck(libra.non_local, args)


def test_gradients_reach_every_level_and_every_parameter():
    def gradients(scattered):
        model = libra.BalancedFeaturePyramid(Maps(PYRAMIDS["odd"]), 2).double()
        if scattered:
            scatter_weights(model.refine)
        sum((level**2).sum() for level in model(None).values()).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    for name, gradient in gradients(scattered=True).items():
        assert gradient.isfinite().all() and gradient.any(), name
    fresh = gradients(scattered=False)
    assert all(gradient is not None for gradient in fresh.values())  # other processes wait for it
    assert fresh["refine.out.weight"].any() and fresh["pyramid.maps.0"].any()


def test_what_detectors_ask_of_the_pyramid_is_answered():
    pyramid = Constrained(PYRAMIDS["odd"])
    model = libra.BalancedFeaturePyramid(pyramid, 0)
    assert model.size_divisibility == 64
    assert model.padding_constraints == {"square_size": 1024}
    assert model.output_shape() == pyramid.output_shape()
    assert model.levels == ["p2", "p3", "p4", "p5", "p6"]
    # Detectron2 0.6 knows no padding constraints, main has none for most backbones.
    assert libra.BalancedFeaturePyramid(Maps(PYRAMIDS["odd"]), 0).padding_constraints == {}


@pytest.mark.parametrize("level", [-1, 5, 2.5, "p4", None])
def test_a_level_that_is_not_there_is_refused(level):
    with pytest.raises(ValueError, match=r"MODEL\.LIBRA\.REFINE_LEVEL = .* is not allowed"):
        libra.BalancedFeaturePyramid(Maps(PYRAMIDS["odd"]), level)
    libra.BalancedFeaturePyramid(Maps(PYRAMIDS["odd"]), 4)


def test_levels_of_different_channels_are_refused():
    opts = ["MODEL.LIBRA.BACKBONE", "build_resnet_backbone"]
    with pytest.raises(ValueError, match=r"different numbers of channels .*'res3': 128"):
        build_model(load(RCNN, *opts))


@pytest.mark.parametrize("name", ["unheard", "build_libra_backbone"])
def test_a_backbone_that_cannot_be_wrapped_is_refused(name):
    with pytest.raises(ValueError, match=f"MODEL.LIBRA.BACKBONE = '{name}' is not"):
        build_model(load(RCNN, "MODEL.LIBRA.BACKBONE", name))


@pytest.mark.parametrize("name", [RCNN, RETINANET])
@pytest.mark.parametrize("size", [(61, 97), (224, 33)])
@torch.no_grad()
def test_detectors_take_images_of_any_size(name, size):
    model = small(name).eval()
    image = torch.randint(256, (3, *size), dtype=torch.uint8)
    assert model([{"image": image}])[0]["instances"].image_size == size
    images = model.preprocess_image([{"image": image}])
    features, plain = model.backbone(images.tensor), model.backbone.pyramid(images.tensor)
    assert {k: v.shape for k, v in features.items()} == {k: v.shape for k, v in plain.items()}
    assert all(level.isfinite().all() for level in features.values())


def test_half_precision_training_gives_finite_gradients():
    model = small(RCNN).train()
    x = torch.randn(2, 3, 96, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = model.backbone(x)
    sum(level.float().square().mean() for level in features.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.backbone.parameters())
