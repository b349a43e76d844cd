"""Results on a GPU equal those on the CPU, in every floating type."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from helpers import IMAGE_SIZE, random_boxes
from torch.testing import assert_close

from pisa_d2.config import CARL, ISR, NegativeISR
from pisa_d2.hlr import hierarchical_local_rank, local_rank, nms_groups
from pisa_d2.reweighting import carl_weights, importance_weights, preserve_total
from pisa_d2.roi_heads.fast_rcnn import PISAFastRCNNOutputLayers
from pisa_d2.roi_heads.sample_fields import OBJECT_FIELD
from pisa_d2.samplers import (
    Candidates,
    HardSampler,
    IoUHLRSampler,
    OHEMSampler,
    Predictions,
    Quota,
    ScoreHLRSampler,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
EXTREME = [0.0, -0.0, 1e30, -1e30, float("nan"), float("inf"), -float("inf")]

pytestmark = [
    pytest.mark.parametrize("device", DEVICES),
    pytest.mark.parametrize("dtype", DTYPES, ids=str),
]


def values_and_boxes(size, dtype):
    """Draw values and boxes, the first ones extreme."""
    generator = torch.Generator().manual_seed(0)
    values, boxes = torch.rand(size, generator=generator), random_boxes(size, generator)
    values[: len(EXTREME)] = torch.tensor(EXTREME)
    for i, value in enumerate(EXTREME):
        boxes[i, i % 4] = value
        boxes[i + len(EXTREME)] = value
    return values.to(dtype), boxes.to(dtype)


def test_ranks_and_groups(device, dtype):
    values, boxes = values_and_boxes(60, dtype)
    groups, partitions = torch.arange(60) % 7, torch.arange(60) % 2
    for function, args in (
        (local_rank, (values, groups)),
        (hierarchical_local_rank, (values, groups, partitions)),
        (nms_groups, (boxes, values, 0.3, partitions)),
    ):
        there = [x.to(device) if isinstance(x, torch.Tensor) else x for x in args]
        # Half precision is computed in float32, which can represent the same numbers.
        full = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in args]
        result = function(*there)
        assert result.device.type == device and result.dtype == torch.int64
        assert_close(result.cpu(), function(*args))
        if function is not nms_groups:
            assert_close(result.cpu(), function(*full))


def test_weights(device, dtype):
    generator = torch.Generator().manual_seed(0)
    probs, losses = torch.rand(2, 30, generator=generator).to(dtype)
    ranks = torch.arange(30)
    for function, args in (
        (preserve_total, (probs, losses)),
        (carl_weights, (probs, 1.0, 0.2)),
        (importance_weights, (ranks, torch.tensor(30), 2.0, 0.0)),
    ):
        there = [x.to(device) if isinstance(x, torch.Tensor) else x for x in args]
        assert_close(function(*there).cpu(), function(*args))


@pytest.mark.parametrize(
    "sampler",
    [HardSampler(), OHEMSampler(), IoUHLRSampler(), ScoreHLRSampler()],
    ids=lambda sampler: type(sampler).__name__,
)
def test_samplers(device, dtype, sampler):
    values, boxes = values_and_boxes(60, dtype)
    objects = torch.arange(60) % 7
    predictions = [values, values.flip(0), values, boxes, values]
    tensors = [boxes.float(), values, objects, objects % 2]
    here = Candidates(*tensors, Predictions(*predictions))
    there = Candidates(
        *(x.to(device) for x in tensors), Predictions(*(x.to(device) for x in predictions))
    )
    if isinstance(sampler, OHEMSampler):
        quota = Quota(20, positive_fraction=0.25, num_classes=1)
        chosen, expected = (sampler([c], quota)[0].indices for c in (there, here))
    else:
        chosen, expected = sampler(there, 20), sampler(here, 20)
    assert chosen.device.type == device
    assert_close(chosen.cpu(), expected)


@pytest.mark.parametrize("loss_type", ["smooth_l1", "giou"])
def test_losses(device, dtype, loss_type):
    generator = torch.Generator().manual_seed(0)
    gt_boxes = random_boxes(30, generator)
    proposals = Instances(IMAGE_SIZE)
    proposals.proposal_boxes = Boxes(gt_boxes + torch.rand(30, 4, generator=generator))
    proposals.gt_boxes = Boxes(gt_boxes)
    proposals.gt_classes = torch.arange(30) % 4
    proposals.set(OBJECT_FIELD, torch.arange(30) // 4)
    scores = torch.randn(30, 4, generator=generator).to(dtype)
    deltas = torch.randn(30, 12, generator=generator).to(dtype) / 4
    predictor = PISAFastRCNNOutputLayers(
        ShapeSpec(channels=1),
        box2box_transform=Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0)),
        num_classes=3,
        box_reg_loss_type=loss_type,
        isr_p=ISR(2.0, 0.0),
        isr_n=NegativeISR(0.5, 0.0, 0.5, 0.05),
        carl=CARL(1.0, 0.2, 1.0),
    )

    def losses(device):
        predictions = scores.to(device).requires_grad_(), deltas.to(device).requires_grad_()
        with EventStorage():
            result = predictor.losses(predictions, [proposals.to(device)])
        gradients = torch.autograd.grad(sum(result.values()), predictions)
        assert all(g.isfinite().all() for g in gradients)
        return result, gradients

    for ours, expected in zip(losses(device)[0].values(), losses("cpu")[0].values(), strict=True):
        assert ours.isfinite() and ours.device.type == device
        assert_close(ours.cpu(), expected, rtol=1e-4, atol=1e-5)
    for ours, expected in zip(losses(device)[1], losses("cpu")[1], strict=True):
        assert_close(ours.cpu(), expected, rtol=1e-2, atol=1e-4)
