"""No intermediate result is on the CPU, as tensors with a device but without values show."""

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.utils.events import EventStorage
from torch._subclasses.fake_tensor import FakeTensorMode

from pisa_d2.attention import Positives, Samples, carl_loss, isr_weights
from pisa_d2.ranking import ImageLayout
from pisa_d2.samplers import (
    Candidates,
    HardSampler,
    InstanceBalancedSampler,
    IoUBalancedSampler,
    IoUHLRSampler,
    Predictions,
    ScoreHLRSampler,
)
from pisa_d2.samplers.together import Images
from pisa_d2.settings import CARL, ISR, NegativeISR

GPU = torch.device("cuda:0")
SIZES = [30, 20]
TRANSFORM = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))


@pytest.fixture(autouse=True)
def fake_tensors(monkeypatch):
    """Answer that all boxes have settled, since tensors without values cannot tell."""
    monkeypatch.setattr(torch, "equal", lambda *tensors: True)
    with FakeTensorMode(), EventStorage():
        yield


def numbers(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device=GPU)


def indices(*shape):
    return numbers(*shape, dtype=torch.int64)


def test_tensors_of_two_devices_are_noticed():
    with pytest.raises(RuntimeError, match="device"):
        _ = numbers(3) + torch.empty(3)


@pytest.mark.parametrize("n_max", ["shared", "class"])
@pytest.mark.parametrize("sizes", [SIZES, [25, 25]])
def test_losses(sizes, n_max):
    positives = Positives(
        *(numbers(12, 4), numbers(12, 4), indices(12), indices(12), numbers(12, 4)),
        *(numbers(12), numbers(12), numbers(12)),
    )
    samples = Samples(
        ImageLayout(sizes, GPU),
        *(numbers(50, 4), numbers(50, 4), indices(50), indices(50), numbers(50, 4)),
        *(numbers(50), indices(12)),
        negative=numbers(50, dtype=torch.bool),
        scores=numbers(50),
        ranked=numbers(50, dtype=torch.bool),
    )
    parts = ISR(n_max=n_max), NegativeISR(beta=0.1)
    weights = isr_weights(*parts, samples, positives, TRANSFORM)
    assert weights.device == GPU and weights.shape == (50,)
    assert carl_loss(CARL(gamma=2.0, beta=0.0, loss_weight=2.0), positives).device == GPU


@pytest.mark.parametrize(
    "sampler",
    [
        HardSampler(),
        IoUHLRSampler(),
        ScoreHLRSampler(),
        InstanceBalancedSampler(),
        IoUBalancedSampler(),
        IoUBalancedSampler(floor_thresh=0.1, floor_fraction=0.5),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
@pytest.mark.parametrize("as_tensors", [False, True])
def test_samplers(sampler, as_tensors):
    predictions = Predictions(numbers(50), numbers(50), numbers(50), numbers(50, 4), numbers(50))
    candidates = Candidates(numbers(50, 4), numbers(50), indices(50), indices(50), predictions)
    ends = (0.0, numbers(())) if as_tensors else (0.0, 0.5)
    images = Images(ImageLayout(SIZES, GPU), [12, 9], [ends, ends])
    draws = [sampler.draw(size, GPU) for size in SIZES]
    draws = [torch.cat(parts) for parts in zip(*draws, strict=True)]
    order = sampler.order(candidates, images, *draws)
    assert order.device == GPU and order.shape == (50,)
    for values in sampler.ranks_in_order(candidates, images) or ():
        assert values.device == GPU
