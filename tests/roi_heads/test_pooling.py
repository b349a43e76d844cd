import copy

import pytest
import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from helpers import random_boxes

from pisa_d2.roi_heads.pooling import ReusingPooler
from pisa_d2.roi_heads.step import PooledFeatures, Step

SCALES = (1 / 4, 1 / 8, 1 / 16)


def feature_maps(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(
            2, 5, int(96 * s), int(128 * s), generator=generator, dtype=dtype
        ).requires_grad_()
        for s in SCALES
    ]


def boxes_of_images(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [Boxes(2 * random_boxes(size, generator)) for size in sizes]


def reusing(*args):
    pooler = ROIPooler(*args)
    ReusingPooler.adopt(pooler)
    return pooler


def remember(pooler, boxes, known):
    pooler.step = Step({}, PooledFeatures(boxes, known))


def pooled_twice(pooler, features, boxes, all_boxes, rows):
    """Pool all boxes without gradient, then the chosen ones."""
    with torch.no_grad():
        known = pooler(features, all_boxes)[rows]
    remember(pooler, boxes, known)
    return pooler(features, boxes)


@pytest.mark.parametrize("kind", ["ROIAlign", "ROIAlignV2", "ROIPool"])
@pytest.mark.parametrize("scales", [SCALES, SCALES[:1]])
@pytest.mark.parametrize("chosen", [[3, 2], [4, 0], [0, 0]])
def test_what_is_pooled_once_has_the_gradient_of_pooling_it_again(kind, scales, chosen):
    stock, ours_pooler = ROIPooler(4, scales, 2, kind), reusing(4, scales, 2, kind)
    all_boxes = boxes_of_images(6, 5)
    boxes = [b[:n] for b, n in zip(all_boxes, chosen, strict=True)]
    rows = torch.cat([torch.arange(chosen[0]), 6 + torch.arange(chosen[1])])
    results = []
    for reuse in (True, False):
        features = feature_maps()[: len(scales)]
        if reuse:
            output = pooled_twice(ours_pooler, features, boxes, all_boxes, rows)
        else:
            output = stock(features, boxes)
        weights = torch.arange(output.numel(), dtype=torch.float32).view_as(output)
        grads = torch.autograd.grad((weights * output).sum(), features, allow_unused=True)
        results.append([output, *grads])
    for ours, theirs in zip(*results, strict=True):
        if theirs is None:
            assert not ours.any()
        else:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_gradients_are_those_of_finite_differences():
    features = feature_maps(torch.float64)
    all_boxes = [Boxes(b.tensor.double()) for b in boxes_of_images(3, 2)]
    boxes = [b[:1] for b in all_boxes]
    pooler = reusing(2, SCALES, 2, "ROIAlignV2")

    def pool(*features):
        return pooled_twice(pooler, list(features), boxes, all_boxes, torch.tensor([0, 3]))

    assert torch.autograd.gradcheck(pool, features, fast_mode=True)


def calls_of(pooler):
    calls = []
    pooler.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_only_the_very_boxes_that_were_remembered_are_reused_and_once():
    features, boxes = feature_maps(), boxes_of_images(3, 2)
    pooler = reusing(4, SCALES, 2, "ROIAlignV2")
    calls = calls_of(pooler)
    known = torch.zeros(5, 5, 4, 4)
    remember(pooler, boxes, known)
    assert not pooler(features, boxes).any() and not calls
    assert pooler(features, boxes).any() and len(calls) == 1
    for others in (boxes_of_images(3, 2), boxes[:1], boxes[::-1]):
        remember(pooler, boxes, known)
        assert pooler([f[: len(others)] for f in features], others).any()
    remember(pooler, boxes, known)
    pooler.step = None
    assert pooler(features, boxes).any()


def test_deterministic_algorithms_pool_again():
    features, boxes = feature_maps(), boxes_of_images(3, 2)
    pooler = reusing(4, SCALES, 2, "ROIAlignV2")
    torch.use_deterministic_algorithms(True)
    try:
        remember(pooler, boxes, torch.zeros(5, 5, 4, 4))
        assert pooler(features, boxes).any()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_pooler_keeps_its_attributes_and_can_be_copied():
    pooler, stock = reusing(4, SCALES, 2, "ROIAlignV2"), ROIPooler(4, SCALES, 2, "ROIAlignV2")
    assert not pooler.state_dict() and pooler.output_size == stock.output_size
    features, boxes = feature_maps(), boxes_of_images(3, 2)
    assert torch.equal(copy.deepcopy(pooler)(features, boxes), stock(features, boxes))


def test_a_pooler_of_another_class_stays_as_it_is():
    class OwnPooler(ROIPooler):
        pass

    pooler = OwnPooler(4, SCALES, 2, "ROIAlignV2")
    ReusingPooler.adopt(pooler)
    assert type(pooler) is OwnPooler
