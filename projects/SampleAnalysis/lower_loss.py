"""
Two sets of scores for the boxes of one object: the set with the lower classification loss can have
the lower AP.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from findings import ScoredBoxes
from torch import Tensor
from torchvision.ops import nms
from what_if import Outcome, gather, losses_after, raised_scores

FEWEST_BOXES = 6  # of an object that is shown


@dataclass
class ScoreSet:
    """The scores (N,) of the boxes of an object, their loss in total, and the object's AP."""

    scores: np.ndarray
    loss: float
    ap: float


@dataclass
class ObjectScores:
    """
    Attributes:
        boxes: (N, 4), the positives of the object as regressed, XYXY in pixels of the image.
        ious: (N,), with the object.
        sets: by name.
    """

    image_id: int | str
    class_: int
    boxes: np.ndarray
    ious: np.ndarray
    sets: dict[str, ScoreSet]


def object_ap(
    boxes: Tensor, scores: Tensor, ious: Tensor, nms_thresh: float, thresholds: np.ndarray
) -> float:
    """
    Return COCO AP, from 0 to 1, of one object by its own boxes alone: at each IoU threshold, one
    over the place of the first right box among the boxes that NMS leaves.

    Args:
        boxes: (N, 4).
        scores, ious: (N,).
        thresholds: of IoU.
    """
    kept = ious[nms(boxes, scores.to(boxes.dtype), nms_thresh)].cpu().numpy()
    places = [np.flatnonzero(kept >= t) for t in thresholds]
    return float(np.mean([1 / (place[0] + 1) if len(place) else 0.0 for place in places]))


def clearest_object(
    images: Iterable[ScoredBoxes], outcomes: dict[str, Outcome], predictor: Any
) -> ObjectScores | None:
    """
    Find the object, of those with at least ``FEWEST_BOXES`` positives, whose AP falls most from
    the first outcome to the last although the loss of its boxes falls too; the earliest of equals.
    None where there is no such object.

    Args:
        outcomes: by the names of the sets of scores.
    """
    best, found, first = 0.0, None, 0
    names = list(outcomes)
    for image in images:
        size = len(image.gt_classes)
        rows = slice(first, first + size)
        first += size
        if not size:
            continue
        sets = {
            name: _scores_and_losses(image, outcome, outcome.chosen[rows], predictor)
            for name, outcome in outcomes.items()
        }
        boxes = _own(image, image.boxes)
        for object_ in image.objects.unique().tolist():
            own = (image.objects == object_).nonzero()[:, 0]
            if len(own) < FEWEST_BOXES:
                continue
            of_object = {}
            for name, (scores, losses) in sets.items():
                thresholds = outcomes[name].evaluation.thresholds
                values = boxes[own], scores[own], image.ious[own]
                ap = object_ap(*values, predictor.test_nms_thresh, thresholds)
                values_of_set = scores[own].cpu().numpy(), float(losses[own].sum()), ap
                of_object[name] = ScoreSet(*values_of_set)
            before, after = of_object[names[0]], of_object[names[-1]]
            if after.loss < before.loss and before.ap - after.ap > best:
                best = before.ap - after.ap
                height, width = (
                    of / to for of, to in zip(image.image_size, image.input_size, strict=True)
                )
                scale = np.array([width, height, width, height])
                found = ObjectScores(
                    image.image_id,
                    int(image.gt_classes[own[0]]),
                    boxes[own].cpu().numpy() * scale,
                    image.ious[own].cpu().numpy(),
                    of_object,
                )
    return found


def _own(image: ScoredBoxes, values: Tensor) -> Tensor:
    """Pick, of values of all (proposal, class) pairs, the positives' with their own classes."""
    is_own = (image.owners >= 0) & (image.classes == image.gt_classes[image.owners.clamp(min=0)])
    rows = is_own.nonzero()[:, 0]
    return values[rows[image.owners[rows].argsort()]]


def _scores_and_losses(
    image: ScoredBoxes, outcome: Outcome, chosen: Tensor, predictor: Any
) -> tuple[Tensor, Tensor]:
    positives = gather([image])
    everyone = torch.ones_like(chosen)
    losses = losses_after(positives, everyone, 0.0, predictor)
    losses[chosen] = losses_after(positives, chosen, outcome.delta, predictor)
    return _own(image, raised_scores(image, chosen, outcome.delta)), losses
