"""
Prime Sample Attention over a batch (https://arxiv.org/abs/1904.04821): ISR-P and CARL over the
positives, for every kind of detector; ISR-P and ISR-N over all samples, for two-stage ones.

Shape shorthand in this module:

    R: number of samples of all images
    P: number of positives among them
"""

from dataclasses import dataclass
from typing import Any

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from torch import Tensor

from .boxes import box_iou
from .hlr import hierarchical_local_rank
from .isr import negative_weights, positive_weights, weights_of_positive_ranks
from .ranking import ImageLayout, groups_of_eligible, last_ranks
from .reweighting import carl_weights, importance
from .scalars import is_time, log_negatives, log_positives
from .settings import CARL, ISR, NegativeISR


@dataclass(frozen=True)
class Positives:
    """
    The positives of a batch. Boxes are XYXY in pixels.

    Attributes:
        boxes: floating (P, 4), the proposals, anchors or default boxes.
        gt_boxes: floating (P, 4), the boxes of the matched objects.
        objects: int64 (P,), the matched object, unique in the batch; only ISR-P reads it.
        classes: int64 (P,), its class.
        deltas: floating (P, 4), predicted for this class.
        probs: floating (P,), predicted probability of this class, with gradient.
        cls_losses, box_losses: floating (P,), with gradient.
    """

    boxes: Tensor
    gt_boxes: Tensor
    objects: Tensor
    classes: Tensor
    deltas: Tensor
    probs: Tensor
    cls_losses: Tensor
    box_losses: Tensor


@dataclass(frozen=True)
class Samples:
    """
    The sampled proposals of a batch, image after image. Boxes are XYXY in pixels.

    Attributes:
        layout: the layout of the images.
        boxes: floating (R, 4), the proposals.
        gt_boxes: floating (R, 4), the boxes of the matched objects; any boxes for negatives.
        objects: int64 (R,), the matched object, unique in the batch; any number for negatives.
        classes: int64 (R,), its class, from 0; any other number for negatives.
        deltas: floating (R, 4), predicted for the class of a positive, and for the highest-scored
            class of a negative.
        cls_losses: floating (R,).
        positives: int64 (P,), the indices of positives.
        negative: bool (R,).
        scores: floating (R,), highest foreground probability; only ISR-N reads it.
        ranked: bool (R,), the negatives that ISR-N ranks; only ISR-N reads it.
        negative_importance: float (R,), see :func:`pisa_d2.reweighting.importance`, of negatives
            that their sampler ranked; None to let ISR-N rank them.
    """

    layout: ImageLayout
    boxes: Tensor
    gt_boxes: Tensor
    objects: Tensor
    classes: Tensor
    deltas: Tensor
    cls_losses: Tensor
    positives: Tensor
    negative: Tensor
    scores: Any = None  # a tensor with ISR-N
    ranked: Any = None  # likewise
    negative_importance: Tensor | None = None


@torch.no_grad()
def isr_weights(
    isr_p: ISR | None,
    isr_n: NegativeISR | None,
    samples: Samples,
    positives: Positives,
    box2box_transform: Box2BoxTransform,
) -> Tensor:
    """
    Compute the weights of all samples' classification losses. One pass ranks positives by the IoU
    of their regressed boxes in each class, and negatives by their score in each image.

    Args:
        positives: the positives among the samples.

    Returns:
        (R,), weights that keep the sum of the losses of positives and of negatives; 1 for a kind
        that is not weighted, and for samples of neither kind.
    """
    if len(samples.cls_losses) == 0:
        return torch.ones_like(samples.cls_losses)
    boxes = box2box_transform.apply_deltas(samples.deltas, samples.boxes)
    ious = box_iou(boxes, samples.gt_boxes)
    ranks = rank_samples(samples, boxes, ious, None if isr_n is None else isr_n.nms_thresh)
    if isr_n is None:
        weights = torch.ones_like(samples.cls_losses)
    else:
        own = _weights_of_negatives(isr_n, samples, ranks)
        weights = torch.where(samples.negative, own, 1.0)
    if isr_p is not None:
        rows = samples.positives
        own = weights_of_positive_ranks(
            ranks[rows],
            positives.classes,
            positives.cls_losses,
            gamma=isr_p.gamma,
            beta=isr_p.beta,
            n_max=isr_p.n_max,
        )
        if is_time():
            log_positives(ious[rows], samples.objects[rows], positives.probs, own)
        weights = weights.index_copy(0, rows, own.to(weights.dtype))
    return weights


def rank_samples(samples: Samples, boxes: Tensor, ious: Tensor, nms_thresh: float | None) -> Tensor:
    """
    Rank positives by IoU-HLR in each class, and negatives by Score-HLR in each image.

    Args:
        boxes: floating (R, 4), the regressed boxes.
        ious: floating (R,), their IoU with the matched object.
        nms_thresh: IoU above which boxes of negatives form a group; None to leave negatives out.

    Returns:
        int64 (R,); meaningless for samples without a rank: negatives that are left out, score too
        low, or were ranked by their sampler.
    """
    values, groups, partitions = ious, samples.objects, samples.classes
    if nms_thresh is not None and samples.negative_importance is None:
        negative, ranked, scores = samples.negative, samples.ranked, samples.scores
        clusters = groups_of_eligible(boxes, scores, ranked, samples.layout, nms_thresh)
        values = torch.where(negative, scores, values)
        groups = torch.where(negative, clusters, groups)
        # Images are partitions too, with numbers that no class has.
        partitions = torch.where(ranked, -2 - samples.layout.images, partitions)
    return hierarchical_local_rank(values, groups, partitions)


def _weights_of_negatives(isr_n: NegativeISR, samples: Samples, ranks: Tensor) -> Tensor:
    """Weight the negatives: (R,), meaningless for other samples."""
    negative, ranked, layout = samples.negative, samples.ranked, samples.layout
    of_negatives = samples.negative_importance
    if of_negatives is None:
        ranks = torch.where(ranked, ranks, last_ranks(ranked, layout))
        of_negatives = importance(ranks, layout.counts(negative).max().clamp(min=1))
    weights = negative_weights(
        of_negatives, negative, samples.cls_losses, gamma=isr_n.gamma, beta=isr_n.beta
    )
    log_negatives(samples.scores, negative, ranked, weights, len(layout.num_samples))
    return weights


@torch.no_grad()
def isr_p_weights(isr: ISR, positives: Positives, box2box_transform: Box2BoxTransform) -> Tensor:
    """
    Weight the positives' classification losses by the IoU of their regressed boxes.

    Returns:
        (P,), weights that keep the sum of the losses.
    """
    boxes = box2box_transform.apply_deltas(positives.deltas, positives.boxes)
    ious = box_iou(boxes, positives.gt_boxes)
    weights = positive_weights(
        ious,
        positives.objects,
        positives.classes,
        positives.cls_losses,
        gamma=isr.gamma,
        beta=isr.beta,
        n_max=isr.n_max,
    )
    log_positives(ious, positives.objects, positives.probs, weights)
    return weights


def carl_loss(carl: CARL, positives: Positives) -> Tensor:
    """
    Compute the classification-aware regression loss.

    Returns:
        (), the sum over the positives.
    """
    weights = carl_weights(positives.probs, carl.gamma, carl.beta)
    loss = (weights * positives.box_losses).sum()
    return loss if carl.loss_weight == 1 else carl.loss_weight * loss
