"""Scalars that show the effect of PISA, in TensorBoard and metrics.json under ``pisa/``."""

import math
from collections.abc import Sequence

import torch
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor

from .hlr import local_rank
from .regions import inside_regions, regions_of

# Detectron2's writers write every 20 iterations. In between, a scalar would cost a useless copy to
# the host.
_PERIOD = 20


def is_time() -> bool:
    """Return whether scalars are logged in this iteration."""
    return (get_event_storage().iter + 1) % _PERIOD == 0


def _put(scalars: dict[str, Tensor]) -> None:
    values = torch.stack([value.float() for value in scalars.values()]).tolist()
    for name, value in zip(scalars, values, strict=True):
        if not math.isnan(value):  # the mean of no samples is NaN
            get_event_storage().put_scalar(f"pisa/{name}", value, smoothing_hint=False)


def log_ignored(
    name: str,
    labels: Sequence[Tensor],
    boxes: Sequence[Tensor],
    targets: Sequence[Instances],
    ioa_thresh: float,
) -> None:
    """
    Log the number of boxes per image that are ignored and lie inside a region.

    Args:
        name: the kind of boxes, "proposals" or "anchors".
        labels, boxes: for each image integer (N,), -1 for ignored boxes, and floating (N, 4).
        targets, ioa_thresh: see :func:`pisa_d2.regions.ignore_inside`.
    """
    if not is_time():
        return
    nums = []
    for label, box, target in zip(labels, boxes, targets, strict=True):
        inside = inside_regions(box, regions_of(target).tensor, ioa_thresh)
        nums.append((inside & (label == -1)).sum())
    _put({f"ignored_{name}": torch.stack(nums).float().mean()})


def log_positives(ious: Tensor, objects: Tensor, probs: Tensor, weights: Tensor) -> None:
    """
    Log the effect of ISR-P.

    Args:
        ious: (P,), IoU of the regressed boxes with their ground truth.
        objects: int64 (P,), the matched object.
        probs: (P,), probability of the ground-truth class.
        weights: (P,), the weights of ISR-P.
    """
    if len(ious) == 0 or not is_time():
        return
    is_first = local_rank(ious, objects) == 0
    share = weights / weights.sum()
    _put(
        {
            "positive_iou": ious.mean(),
            "positive_iou_weighted": (share * ious).sum(),
            "positive_prob": probs.mean(),
            "positive_prob_weighted": (share * probs).sum(),
            # The best positives of the objects: their share of the positives, and of the weight.
            "first_rank_share": is_first.float().mean(),
            "first_rank_weight": (share * is_first).sum(),
        }
    )


def log_negatives(
    scores: Tensor, negative: Tensor, ranked: Tensor, weights: Tensor, num_images: int
) -> None:
    """
    Log the effect of ISR-N.

    Args:
        scores: (R,), highest foreground probability of each sample.
        negative, ranked: bool (R,), the negatives, and the negatives with a rank of their own.
        weights: (R,), the weights of ISR-N.
        num_images: number of images in the batch.
    """
    if len(scores) == 0 or not is_time():
        return
    share = weights * negative / (weights * negative).sum()
    _put(
        {
            "negative_score": (scores * negative).sum() / negative.sum(),
            "negative_score_weighted": (share * scores).sum(),
            "ranked_negatives": ranked.sum() / num_images,
            "ranked_weight": (share * ranked).sum(),
        }
    )
