"""
Comparison of the public functions and the losses with tests/oracles.py on random input. ``make
fuzz`` tries many more cases than the hundred per test in a regular run.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec, ciou_loss, diou_loss
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from fvcore.nn import giou_loss, smooth_l1_loss
from hypothesis import given
from hypothesis import strategies as st
from oracles import (
    slow_carl_weights,
    slow_hierarchical_local_rank,
    slow_importance,
    slow_iou,
    slow_iou_hlr,
    slow_joint_choice,
    slow_local_rank,
    slow_negative_weights,
    slow_nms_groups,
    slow_positive_weights,
    slow_preserve_total,
    slow_score_hlr,
)
from torch.nn import functional as F
from torch.testing import assert_close

from pisa_d2.config import CARL, ISR, NegativeISR
from pisa_d2.hlr import hierarchical_local_rank, local_rank, nms_groups
from pisa_d2.reweighting import carl_weights, importance_weights, preserve_total
from pisa_d2.roi_heads.fast_rcnn import PISAFastRCNNOutputLayers
from pisa_d2.roi_heads.sample_fields import OBJECT_FIELD
from pisa_d2.samplers import (
    PROPOSAL_SAMPLER_REGISTRY,
    Candidates,
    OHEMSampler,
    Predictions,
    Quota,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
KINDS = ["ties", "plain", "wild", "mixed"]
WILD = [
    *(math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, 1e-38, 1e-8, 0.5, 1.0, -1.0, 1e4),
    *(65504.0, 1e19, 1e30, -1e30, 3e38, 1e300),
]
NUM_CLASSES = 3
TRANSFORM = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))
BOX_LOSSES = {"giou": giou_loss, "diou": diou_loss, "ciou": ciou_loss}


class Case(NamedTuple):
    """The settings of random input: a seed instead of numbers, so that drawing takes no time."""

    seed: int
    size: int
    kind: str
    dtype: torch.dtype
    gamma: float
    beta: float
    thresh: float

    @property
    def rng(self):
        return np.random.default_rng(self.seed)


CASES = st.builds(
    Case,
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(0, 9),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    gamma=st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.5]),
    beta=st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    thresh=st.sampled_from([0.0, 0.05, 0.3, 0.5, 0.7, 1.0]),
)


def numbers(rng, kind, dtype, *shape):
    """Draw normal numbers, few different ones, or ones that break sums, sorts and comparisons."""
    values = rng.normal(size=shape)
    if kind == "ties":
        values = rng.choice([0.0, 0.25, 0.5, 0.75, 1.0], shape)
    if kind == "wild":
        values = rng.choice(WILD, shape)
    if kind == "mixed":
        values = np.where(rng.random(shape) < 0.2, rng.choice(WILD, shape), values)
    return torch.from_numpy(np.asarray(values)).to(dtype)


def boxes_of(rng, kind, dtype, *shape):
    """Draw crowded boxes, some without area or of negative size, or with any numbers."""
    if kind == "wild":
        return numbers(rng, kind, dtype, *shape, 4)
    corners, sizes = rng.integers(0, 5, (*shape, 2)), rng.integers(-1, 5, (*shape, 2))
    boxes = np.concatenate([corners, corners + sizes], axis=-1).astype(np.float64)
    if kind != "ties":
        boxes += rng.normal(size=boxes.shape) * 0.1
    if kind == "mixed":
        boxes = np.where(rng.random(boxes.shape) < 0.05, rng.choice(WILD, boxes.shape), boxes)
    return torch.from_numpy(boxes).to(dtype)


def ids(rng, size, num=3):
    return torch.from_numpy(rng.integers(0, num, size))


def computed_in(dtype):
    return np.float64 if dtype == torch.float64 else np.float32


@given(CASES)
def test_ranks(case):
    rng = case.rng
    values = numbers(rng, case.kind, case.dtype, case.size)
    groups, partitions = ids(rng, case.size), ids(rng, case.size)
    lists = values.tolist(), groups.tolist(), partitions.tolist()
    assert local_rank(values, groups).tolist() == slow_local_rank(*lists[:2])
    ranks = hierarchical_local_rank(values, groups, partitions)
    assert ranks.tolist() == slow_hierarchical_local_rank(*lists)


@given(CASES, st.integers(1, 3))
def test_groups(case, num_images):
    rng = case.rng
    shape = num_images, case.size
    boxes = boxes_of(rng, case.kind, case.dtype, *shape)
    scores = numbers(rng, case.kind, case.dtype, *shape)
    partitions = ids(rng, shape, 2)
    groups = nms_groups(boxes, scores, case.thresh, partitions)
    for row, *image in zip(groups.tolist(), boxes, scores, partitions, strict=True):
        b, s, p = (values.tolist() for values in image)
        assert row == slow_nms_groups(b, s, case.thresh, p, computed_in(case.dtype))


@given(CASES)
def test_weights(case):
    rng = case.rng
    n_max = int(rng.integers(0, 12))
    ranks = ids(rng, case.size, 12)
    weights = importance_weights(ranks, n_max, case.gamma, case.beta)
    expected = [slow_importance(rank, n_max, case.gamma, case.beta) for rank in ranks.tolist()]
    assert_close(weights, torch.tensor(expected, dtype=torch.float32))
    assert ((weights >= 0) & (weights <= 1)).all()

    losses = numbers(rng, case.kind, case.dtype, case.size).abs()
    scaled = preserve_total(weights, losses)
    assert scaled.isfinite().all() and not scaled.requires_grad
    if all(1e-30 < loss < 1e30 for loss in losses.tolist() if loss != 0):
        by_loop = slow_preserve_total(dict(enumerate(weights.tolist())), losses.tolist())
        expected = torch.tensor(list(by_loop.values()), dtype=scaled.dtype)
        assert_close(scaled, expected, rtol=1e-4, atol=0)

    probs = numbers(rng, case.kind, case.dtype, case.size).clamp(0, 1).requires_grad_()
    carl = carl_weights(probs, case.gamma, case.beta)
    (carl * torch.arange(case.size)).sum().backward()
    if not probs.isnan().any() and case.size:
        assert carl.isfinite().all() and probs.grad.isfinite().all()
        tiny = torch.finfo(carl.dtype).tiny
        expected = slow_carl_weights([max(p, tiny) for p in probs.tolist()], case.gamma, case.beta)
        assert_close(carl.double(), torch.tensor(expected).double(), rtol=1e-3, atol=1e-5)


def sampler(name, thresh=0.5):
    cls = PROPOSAL_SAMPLER_REGISTRY.get(name)
    return cls(nms_thresh=thresh) if name == "ScoreHLRSampler" else cls()


def candidates(rng, case, size):
    def values():
        return numbers(rng, case.kind, case.dtype, size)

    predictions = Predictions(
        *(values(), values(), values()), boxes_of(rng, case.kind, case.dtype, size), values()
    )
    boxes = boxes_of(rng, case.kind, torch.float32, size)
    return Candidates(boxes, values(), ids(rng, size), ids(rng, size) - 1, predictions)


NAMES = ["RandomSampler", "InstanceBalancedSampler", "IoUBalancedSampler", "HardSampler"]
NAMES += ["IoUHLRSampler", "ScoreHLRSampler"]


@given(CASES, st.sampled_from(NAMES), st.integers(0, 12))
def test_samplers(case, name, num):
    given_ = candidates(case.rng, case, case.size)
    chosen = sampler(name, case.thresh)(given_, num)
    indices = chosen.tolist()
    assert len(indices) == len(set(indices)) == min(num, case.size)
    assert set(indices) <= set(range(case.size))
    predictions = given_.predictions
    if name == "HardSampler":
        expected = slow_local_rank(predictions.cls_losses.tolist(), [0] * case.size)
        assert [expected[i] for i in indices] == list(range(len(indices)))
    if name == "IoUHLRSampler":
        values = predictions.ious, given_.objects, given_.classes
        assert indices == slow_iou_hlr(*(v.tolist() for v in values))[:num]
    if name == "ScoreHLRSampler":
        values = predictions.boxes.tolist(), predictions.scores.tolist()
        if case.dtype == torch.float32:
            order = slow_score_hlr(*values, 0.05, case.thresh)
            assert indices[: len(order)] == order[:num]
        ranks, n_max = sampler(name, case.thresh).ranks(given_, chosen, num)
        assert ((ranks >= 0) & (ranks < n_max.clamp(min=1))).all()


@given(CASES, st.lists(st.integers(0, 6), max_size=3), st.integers(0, 12))
def test_joint_sampling(case, sizes, num):
    case = case._replace(dtype=torch.float32)
    rng = case.rng
    batch = [candidates(rng, case, size) for size in [case.size, *sizes]]
    num *= len(batch)
    quota = Quota(num // len(batch), positive_fraction=0.25, num_classes=1)
    choices = OHEMSampler(nms_thresh=case.thresh)(batch, quota)
    images = [
        (c.boxes, c.predictions.cls_losses + c.predictions.box_losses, c.classes) for c in batch
    ]
    images = [tuple(values.tolist() for values in image) for image in images]
    chosen = {(image, i) for image, c in enumerate(choices) for i in c.indices.tolist()}
    assert chosen == slow_joint_choice(images, num, case.thresh)


@functools.cache
def predictor(cls, loss_type, agnostic):
    return cls(
        ShapeSpec(channels=1),
        box2box_transform=TRANSFORM,
        num_classes=NUM_CLASSES,
        box_reg_loss_type=loss_type,
        cls_agnostic_bbox_reg=agnostic,
        smooth_l1_beta=0.5,
    )


def proposals_of(rng, size, first_object):
    """Make the results of label_and_sample_proposals, some without objects or proposals."""

    def boxes(num):
        corners = rng.integers(0, 40, (num, 2)) + rng.choice([0, 0.5])
        return torch.from_numpy(
            np.concatenate([corners, corners + rng.integers(1, 40, (num, 2))], 1)
        )

    proposals = Instances((96, 128))
    proposals.proposal_boxes = Boxes(boxes(size).float())
    num_objects = int(rng.integers(0, 4))
    if num_objects == 0:
        proposals.gt_classes = torch.full((size,), NUM_CLASSES)
        return proposals
    matched = ids(rng, size, num_objects)
    classes = ids(rng, num_objects, NUM_CLASSES)[matched]
    negative = torch.from_numpy(rng.random(size) < rng.choice([0.0, 0.5, 0.9, 1.0]))
    proposals.gt_classes = classes.masked_fill(negative, NUM_CLASSES)
    proposals.gt_boxes = Boxes(boxes(num_objects).float()[matched])
    proposals.set(OBJECT_FIELD, matched + first_object)
    return proposals


def losses_by_loops(parts, scores, deltas, proposals, loss_type):
    """Compute the three losses in float64 from single samples' losses and decoded boxes."""
    if not proposals:
        return {"loss_cls": 0.0, "loss_box_reg": 0.0, "loss_carl": 0.0}
    classes = torch.cat([p.gt_classes for p in proposals])
    boxes = torch.cat([p.proposal_boxes.tensor for p in proposals])
    gt = [(p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes).tensor for p in proposals]
    gt_boxes = torch.cat(gt)
    objects = [
        x
        for p in proposals
        for x in (p.get(OBJECT_FIELD).tolist() if p.has(OBJECT_FIELD) else [-1] * len(p))
    ]
    num = len(classes)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    cls_losses = F.cross_entropy(scores, classes, reduction="none").tolist()
    probs = scores.softmax(dim=1)
    top_scores, top_classes = probs[:, :NUM_CLASSES].max(dim=1)
    positive = classes < NUM_CLASSES
    own = deltas.view(num, deltas.shape[1] // 4, 4)
    rows = torch.arange(num)
    columns = torch.where(positive, classes, top_classes) if own.shape[1] > 1 else classes * 0
    own = own[rows, columns]
    decoded = TRANSFORM.apply_deltas(own, boxes)

    positives = positive.nonzero()[:, 0].tolist()
    ious = {
        i: slow_iou(decoded[i].tolist(), gt_boxes[i].tolist(), computed_in(decoded.dtype))
        for i in positives
    }
    weights = dict.fromkeys(range(num), 1.0)
    isr_p, isr_n, carl = (parts[name] for name in ("isr_p", "isr_n", "carl"))
    weights |= slow_positive_weights(
        ious, objects, classes.tolist(), cls_losses, isr_p.gamma, isr_p.beta
    )
    images = [part.tolist() for part in rows.split([len(p) for p in proposals])]
    images = [[i for i in image if not positive[i]] for image in images]
    weights |= slow_negative_weights(
        images,
        *(decoded.tolist(), top_scores.tolist(), cls_losses),
        *(isr_n.gamma, isr_n.beta, isr_n.score_thresh, isr_n.nms_thresh),
    )

    if loss_type == "smooth_l1":
        targets = TRANSFORM.get_deltas(boxes, gt_boxes)
        box_losses = smooth_l1_loss(own, targets, 0.5, reduction="none").sum(dim=1)
    else:
        broken = decoded.isnan().any(dim=1, keepdim=True)
        box_losses = BOX_LOSSES[loss_type](
            torch.where(broken, gt_boxes.to(decoded.dtype), decoded), gt_boxes, reduction="none"
        ).masked_fill(broken[:, 0], math.nan)
    box_losses = [box_losses[i].item() for i in positives]
    tiny = torch.finfo(probs.dtype).tiny
    of_class = [max(probs[i, classes[i]].item(), tiny) for i in positives]
    carls = slow_carl_weights(of_class, carl.gamma, carl.beta)
    sums = {
        "loss_cls": sum(w * cls_losses[i] for i, w in weights.items()),
        "loss_box_reg": sum(box_losses),
        "loss_carl": carl.loss_weight * sum(c * x for c, x in zip(carls, box_losses, strict=True)),
    }
    return {name: total / max(num, 1) for name, total in sums.items()}


@given(
    CASES,
    st.lists(st.integers(0, 6), max_size=3),
    st.sampled_from(["smooth_l1", *BOX_LOSSES]),
    st.booleans(),
    st.sampled_from([0.1, 1.0, 8.0]),
)
def test_losses(case, sizes, loss_type, agnostic, scale):
    rng = case.rng
    proposals = [proposals_of(rng, size, 10 * i) for i, size in enumerate(sizes)]
    num = sum(sizes)
    scores = (scale * numbers(rng, case.kind, case.dtype, num, NUM_CLASSES + 1)).requires_grad_()
    width = 4 if agnostic else 4 * NUM_CLASSES
    kind = case.kind if rng.random() < 0.5 else "plain"
    deltas = (scale * numbers(rng, kind, case.dtype, num, width)).requires_grad_()
    parts = {
        "isr_p": ISR(case.gamma, case.beta),
        "isr_n": NegativeISR(case.gamma, case.beta, case.thresh, score_thresh=0.05),
        "carl": CARL(case.gamma, case.beta, loss_weight=0.5),
    }
    ours = predictor(PISAFastRCNNOutputLayers, loss_type, agnostic)
    for name, part in parts.items():
        setattr(ours, name, part)
    # In the 20th iteration the logged scalars are computed too.
    with EventStorage(int(rng.choice([3, 19]))):
        losses = ours.losses((scores, deltas), proposals)
    expected = losses_by_loops(parts, scores.detach(), deltas.detach(), proposals, loss_type)
    for name, value in expected.items():
        loss = losses[name]
        assert loss.shape == () and loss.requires_grad
        if not math.isfinite(value):
            assert not loss.isfinite(), name
        elif abs(value) < 1e30:
            assert loss.item() == pytest.approx(value, rel=2e-3, abs=1e-5), name

    if all(loss.isfinite() for loss in losses.values()) and proposals:
        gradients = torch.autograd.grad(sum(losses.values()), (scores, deltas))
        with EventStorage():
            stock = predictor(FastRCNNOutputLayers, loss_type, agnostic)
            theirs = stock.losses((scores, deltas), proposals)
        plain = torch.autograd.grad(sum(theirs.values()), (scores, deltas))
        for gradient, stock_gradient in zip(gradients, plain, strict=True):
            assert gradient.isfinite().all() or not stock_gradient.isfinite().all()
