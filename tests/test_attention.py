from dataclasses import replace

import numpy as np
import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.utils.events import EventStorage
from helpers import random_boxes
from oracles import (
    slow_carl_weights,
    slow_hierarchical_local_rank,
    slow_iou,
    slow_negative_weights,
    slow_nms_groups,
    slow_positive_weights,
)
from torch import tensor
from torch.testing import assert_close

from pisa_d2.attention import (
    Positives,
    Samples,
    carl_loss,
    isr_p_weights,
    isr_weights,
    rank_samples,
)
from pisa_d2.ranking import ImageLayout
from pisa_d2.settings import CARL, ISR, NegativeISR

pytestmark = pytest.mark.usefixtures("storage")

TRANSFORM = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))
SIZES = [20, 0, 15, 25]
NUM_CLASSES = 3
ISR_N = NegativeISR(gamma=0.5, beta=0.1, nms_thresh=0.3, score_thresh=0.4)


def batch_of(sizes=SIZES, seed=0) -> Samples:
    """Draw samples, a third of them positive, some of equal score."""
    generator = torch.Generator().manual_seed(seed)
    num = sum(sizes)
    boxes = random_boxes(num, generator)
    classes = torch.randint(NUM_CLASSES, (num,), generator=generator)
    negative = torch.rand(num, generator=generator) < 2 / 3
    scores = torch.randint(10, (num,), generator=generator) / 10
    return Samples(
        layout=ImageLayout(sizes, torch.device("cpu")),
        boxes=boxes,
        gt_boxes=boxes + 6 * torch.rand(num, 4, generator=generator) - 3,
        objects=3 * classes + torch.randint(3, (num,), generator=generator),
        classes=classes.masked_fill(negative, NUM_CLASSES),
        deltas=0.3 * torch.randn(num, 4, generator=generator),
        cls_losses=0.1 + torch.rand(num, generator=generator),
        positives=(~negative).nonzero()[:, 0],
        negative=negative,
        scores=scores,
        ranked=negative & (scores > ISR_N.score_thresh),
    )


def positives_of(samples: Samples) -> Positives:
    rows = samples.positives
    names = ("boxes", "gt_boxes", "objects", "classes", "deltas", "cls_losses")
    own = {name: getattr(samples, name)[rows] for name in names}
    probs = torch.rand(len(rows), generator=torch.Generator().manual_seed(1))
    return Positives(**own, probs=probs, box_losses=2 * own["cls_losses"])


def regressed(samples: Samples) -> torch.Tensor:
    return TRANSFORM.apply_deltas(samples.deltas, samples.boxes)


def ious_of(samples: Samples) -> list[float]:
    pairs = zip(regressed(samples).tolist(), samples.gt_boxes.tolist(), strict=True)
    return [slow_iou(box, gt_box, np.float32) for box, gt_box in pairs]


def images_of(samples: Samples) -> list[list[int]]:
    """List the indices of the negatives of each image."""
    sizes = samples.layout.num_samples
    rows = torch.arange(sum(sizes)).split(sizes)
    return [[i for i in image.tolist() if samples.negative[i]] for image in rows]


def positive_weights(samples: Samples, isr: ISR) -> dict[int, float]:
    ious = ious_of(samples)
    of_positives = {i: ious[i] for i in samples.positives.tolist()}
    lists = (samples.objects, samples.classes, samples.cls_losses)
    lists = (values.tolist() for values in lists)
    return slow_positive_weights(of_positives, *lists, isr.gamma, isr.beta)


def negative_weights(samples: Samples) -> dict[int, float]:
    lists = (regressed(samples), samples.scores, samples.cls_losses)
    lists = (values.tolist() for values in lists)
    settings = ISR_N.gamma, ISR_N.beta, ISR_N.score_thresh, ISR_N.nms_thresh
    return slow_negative_weights(images_of(samples), *lists, *settings)


@pytest.mark.parametrize("isr_p", [None, ISR(), ISR(gamma=0.5, beta=0.3)])
@pytest.mark.parametrize("isr_n", [None, ISR_N])
@pytest.mark.parametrize("seed", range(3))
def test_weights_of_samples_are_those_of_loops_over_both_kinds(isr_p, isr_n, seed):
    samples = batch_of(seed=seed)
    expected = dict.fromkeys(range(sum(SIZES)), 1.0)
    if isr_p is not None:
        expected |= positive_weights(samples, isr_p)
    if isr_n is not None:
        expected |= negative_weights(samples)
    weights = isr_weights(isr_p, isr_n, samples, positives_of(samples), TRANSFORM)
    assert_close(weights, tensor(list(expected.values())), rtol=1e-4, atol=1e-6)


def test_samples_of_neither_kind_keep_their_weight():
    samples = batch_of()
    kept = samples.positives[::2]
    others = samples.positives[1::2]
    samples = replace(samples, positives=kept)
    weights = isr_weights(ISR(), ISR_N, samples, positives_of(samples), TRANSFORM)
    assert (weights[others] == 1).all()
    assert (weights[kept] != 1).any() and (weights[samples.negative] != 1).any()


def test_importance_that_a_sampler_gave_replaces_the_ranks_of_negatives():
    samples = batch_of()
    importance = torch.rand(sum(SIZES), generator=torch.Generator().manual_seed(2))
    given = replace(samples, negative_importance=importance)
    args = positives_of(samples), TRANSFORM
    weights = isr_weights(None, ISR_N, given, *args)
    own = ((1 - ISR_N.beta) * importance + ISR_N.beta) ** ISR_N.gamma
    losses = samples.cls_losses * samples.negative
    expected = torch.where(samples.negative, own * losses.sum() / (own * losses).sum(), 1.0)
    assert_close(weights, expected)
    # Positives are ranked as always.
    assert_close(
        isr_weights(ISR(), ISR_N, given, *args)[samples.positives],
        isr_weights(ISR(), None, samples, *args)[samples.positives],
    )


@pytest.mark.parametrize("sizes", [[], [0], [0, 0]])
def test_no_samples_have_no_weights(sizes):
    samples = batch_of(sizes)
    weights = isr_weights(ISR(), ISR_N, samples, positives_of(samples), TRANSFORM)
    assert weights.shape == (0,)


@pytest.mark.parametrize("kind", ["positive", "negative"])
def test_samples_of_one_kind_alone_are_weighted(kind):
    samples = batch_of()
    if kind == "positive":
        none = torch.zeros(sum(SIZES), dtype=torch.bool)
        classes = samples.classes.clamp(max=NUM_CLASSES - 1)
        rows = torch.arange(sum(SIZES))
        samples = replace(samples, negative=none, ranked=none, classes=classes, positives=rows)
        expected = positive_weights(samples, ISR())
    else:
        every = torch.ones(sum(SIZES), dtype=torch.bool)
        classes = torch.full_like(samples.classes, NUM_CLASSES)
        ranked = samples.scores > ISR_N.score_thresh
        nothing = samples.positives[:0]
        samples = replace(
            samples, negative=every, ranked=ranked, classes=classes, positives=nothing
        )
        expected = negative_weights(samples)
    weights = isr_weights(ISR(), ISR_N, samples, positives_of(samples), TRANSFORM)
    assert_close(weights, tensor([expected[i] for i in range(sum(SIZES))]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("nms_thresh", [None, 0.3])
def test_positives_rank_in_each_class_and_negatives_in_each_image(nms_thresh):
    samples = batch_of()
    boxes, ious = regressed(samples), tensor(ious_of(samples))
    ranks = rank_samples(samples, boxes, ious, nms_thresh)
    rows = samples.positives
    lists = (values[rows].tolist() for values in (ious, samples.objects, samples.classes))
    assert ranks[rows].tolist() == slow_hierarchical_local_rank(*lists)
    if nms_thresh is not None:
        for image in images_of(samples):
            ranked = [i for i in image if samples.ranked[i]]
            scores, one = samples.scores[ranked].tolist(), [0] * len(ranked)
            own = boxes[ranked].tolist()
            groups = slow_nms_groups(own, scores, nms_thresh, one, np.float32)
            assert ranks[ranked].tolist() == slow_hierarchical_local_rank(scores, groups, one)


@pytest.mark.parametrize("isr", [ISR(), ISR(gamma=0.5, beta=0.3), ISR(n_max="class")])
def test_weights_of_positives_alone_are_those_among_all_samples(isr):
    samples = batch_of()
    positives = positives_of(samples)
    weights = isr_p_weights(isr, positives, TRANSFORM)
    among_all = isr_weights(isr, None, samples, positives, TRANSFORM)[samples.positives]
    assert torch.equal(weights, among_all)
    if isr.n_max == "shared":
        expected = positive_weights(samples, isr)
        assert_close(weights, tensor(list(expected.values())), rtol=1e-4, atol=1e-6)
    else:
        assert not torch.equal(weights, isr_p_weights(ISR(), positives, TRANSFORM))


def test_weights_carry_no_gradient():
    samples = batch_of()
    positives = positives_of(samples)
    for values in (samples.deltas, samples.cls_losses, positives.deltas, positives.cls_losses):
        values.requires_grad_()
    assert not isr_weights(ISR(), ISR_N, samples, positives, TRANSFORM).requires_grad
    assert not isr_p_weights(ISR(), positives, TRANSFORM).requires_grad


@pytest.mark.parametrize("carl", [CARL(), CARL(gamma=2.0, beta=0.0, loss_weight=0.5)])
def test_carl_weights_box_losses_by_probability_and_reaches_the_scores(carl):
    positives = positives_of(batch_of())
    positives.probs.requires_grad_()
    loss = carl_loss(carl, positives)
    weights = slow_carl_weights(positives.probs.tolist(), carl.gamma, carl.beta)
    pairs = zip(weights, positives.box_losses.tolist(), strict=True)
    expected = carl.loss_weight * sum(weight * box_loss for weight, box_loss in pairs)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    # A positive whose box loss is larger than others' gets a lower score.
    assert positives.probs.grad[positives.box_losses.argmax()] > 0
    assert positives.probs.grad[positives.box_losses.argmin()] < 0


@pytest.mark.parametrize(("iteration", "logged"), [(18, False), (19, True)])
def test_scalars_of_the_weighted_kinds_are_logged_every_20_iterations(iteration, logged):
    samples = batch_of()
    positives = positives_of(samples)
    found = []
    for run in (
        lambda: isr_weights(ISR(), None, samples, positives, TRANSFORM),
        lambda: isr_weights(None, ISR_N, samples, positives, TRANSFORM),
        lambda: isr_p_weights(ISR(), positives, TRANSFORM),
    ):
        with EventStorage(iteration) as storage:
            run()
        found.append({name.split("_")[0] for name in storage.latest()})
    if logged:
        of_positives, of_negatives = {"pisa/positive", "pisa/first"}, {"pisa/negative"}
        assert found == [of_positives, {*of_negatives, "pisa/ranked"}, of_positives]
    else:
        assert found == [set()] * 3
