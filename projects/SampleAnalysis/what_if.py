"""
What a better classifier would buy: the same classification loss is taken from some of the
positives or from others, and AP is measured again.

The boxes stay as they are. Positives are the proposals that training would call so; each chosen
one has the logit of its class raised by one amount, common to all chosen ones of the data set,
which is found by bisection so that their losses fall by the budget in total. Then scores, NMS for
each class and COCO AP follow as in the detector.

Shape shorthand in this module:

    P: number of positives, of an image or of all
    M: number of (proposal, class) pairs of an image that may become detections
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from coco_scores import Evaluation
from dataset_detections import Detections
from detectron2.layers import batched_nms
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from findings import ScoredBoxes
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from pisa_d2.hlr import local_rank

FRACTIONS = (0.2, 0.5, 0.8)  # budgets, of the largest that all choices can meet
HIGHEST_RAISE = 30.0  # of a logit; by then a loss is 0 in float32
STEPS = 40  # of the bisection: 30 / 2^40 is below the precision of float32


@dataclass
class Positives:
    """Of each: class, object (unique over images), IoU as regressed; see :class:`ScoredBoxes`."""

    classes: Tensor
    objects: Tensor
    ious: Tensor
    losses: Tensor
    own_logits: Tensor
    rest_logits: Tensor | None


@dataclass
class Outcome:
    """
    Attributes:
        delta: the raise of the logits that takes ``budget`` from the losses.
        thresholds, recalls: see :class:`Evaluation`.
        precision: (IoU thresholds, recalls), the mean over classes that have objects.
    """

    choice: str
    budget: float
    delta: float
    num_raised: int
    thresholds: np.ndarray
    recalls: np.ndarray
    precision: np.ndarray


def gather(images: Iterable[ScoredBoxes]) -> Positives:
    found: dict[str, list[Tensor]] = {
        name: [] for name in ("gt_classes", "objects", "ious", "losses", "own_logits")
    }
    rest: list[Tensor] = []
    first = 0
    for image in images:
        for name, values in found.items():
            values.append(getattr(image, name))
        found["objects"][-1] = image.objects + first
        first += int(image.objects.max()) + 1 if len(image.objects) else 0
        if image.rest_logits is not None:
            rest.append(image.rest_logits)
    values = [torch.cat(parts) for parts in found.values()]
    return Positives(*values, torch.cat(rest) if rest else None)


def choices(positives: Positives) -> dict[str, Tensor]:
    """Bool (P,): whose scores are raised."""
    by_iou = local_rank(positives.ious, positives.objects)
    by_loss = local_rank(positives.losses, positives.objects)
    return {
        "top 5 by IoU-HLR": by_iou < 5,
        "top 25 by IoU-HLR": by_iou < 25,
        "hardest 5": by_loss < 5,
        "all": torch.ones_like(by_iou, dtype=torch.bool),
    }


def losses_after(positives: Positives, chosen: Tensor, delta: float, predictor: Any) -> Tensor:
    """Classification losses of the chosen positives, with their own logits raised."""
    own = positives.own_logits[chosen]
    if positives.rest_logits is None:
        # Of the sum over classes, the part of the own one changes.
        return positives.losses[chosen] + F.softplus(-own - delta) - F.softplus(-own)
    # All other classes together are one: the loss of the own one is the same.
    logits = torch.stack([own + delta, positives.rest_logits[chosen]], dim=1)
    return predictor.classification_losses(logits, torch.zeros_like(positives.classes[chosen]))


def reduction(positives: Positives, chosen: Tensor, delta: float, predictor: Any) -> float:
    """How much less the losses of all positives are in total."""
    after = losses_after(positives, chosen, delta, predictor)
    return float((positives.losses[chosen].double() - after.double()).sum())


def find_raise(positives: Positives, chosen: Tensor, budget: float, predictor: Any) -> float:
    """The raise of the chosen logits that takes ``budget`` from the losses."""
    low, high = 0.0, HIGHEST_RAISE
    for _ in range(STEPS):
        middle = (low + high) / 2
        if reduction(positives, chosen, middle, predictor) < budget:
            low = middle
        else:
            high = middle
    return high


def raised_scores(image: ScoredBoxes, chosen: Tensor, delta: float) -> Tensor:
    """
    Scores (M,) with the logits of the chosen positives' own classes raised.

    Args:
        chosen: bool (P,).
    """
    scores = image.scores.clone()
    pairs = ((image.owners >= 0) & chosen[image.owners.clamp(min=0)]).nonzero()[:, 0]
    owners = image.owners[pairs]
    is_own = image.classes[pairs] == image.gt_classes[owners]
    own = image.own_logits + delta
    if image.rest_logits is None:
        scores[pairs[is_own]] = own.sigmoid()[owners[is_own]]
        return scores
    before, after = (
        torch.stack([logits, image.rest_logits], dim=1).log_softmax(dim=1)
        for logits in (image.own_logits, own)
    )
    # Those of other classes keep their shares of what the own class leaves.
    shrunk = scores[pairs] * (after - before)[owners, 1].exp()
    scores[pairs] = torch.where(is_own, after[owners, 0].exp(), shrunk)
    return scores


def detect(image: ScoredBoxes, chosen: Tensor, delta: float, predictor: Any) -> Instances:
    """
    The detections of an image, as the detector makes them from its scores.

    Args:
        chosen: bool, of the positives of the image.
    """
    scores = raised_scores(image, chosen, delta) if len(chosen) else image.scores
    kept = scores > predictor.test_score_thresh
    boxes, scores, classes = image.boxes[kept], scores[kept], image.classes[kept]
    kept = batched_nms(boxes, scores, classes, predictor.test_nms_thresh)
    kept = kept[: predictor.test_topk_per_image]
    found = Instances(
        image.input_size,
        pred_boxes=Boxes(boxes[kept]),
        scores=scores[kept],
        pred_classes=classes[kept],
    )
    return detector_postprocess(found, *image.image_size)


def spend(
    images: Iterable[ScoredBoxes], predictor: Any, evaluate: Callable[[Detections], Evaluation]
) -> list[Outcome]:
    """
    Args:
        images: gone through once for each outcome.
        predictor: the box predictor.

    Returns:
        The detector as it is, of budget 0, and each choice with each budget; that alone where no
        image has a positive.
    """
    positives = gather(images)
    everyone = choices(positives)
    nobody = torch.zeros_like(positives.classes, dtype=torch.bool)
    plans = [("as it is", 0.0, 0.0, nobody)]
    if len(positives.classes):
        largest = min(reduction(positives, c, HIGHEST_RAISE, predictor) for c in everyone.values())
        for fraction in FRACTIONS:
            for name, chosen in everyone.items():
                budget = fraction * largest
                delta = find_raise(positives, chosen, budget, predictor)
                plans.append((name, budget, delta, chosen))
    outcomes = []
    for name, budget, delta, chosen in tqdm(plans, desc="what if", delay=5):
        detections, first = Detections(), 0
        for image in images:
            part = chosen[first : (first := first + len(image.gt_classes))]
            detections.add(detect(image, part, delta, predictor), image.image_id)
        found = evaluate(detections)
        precision = mean_precision(found)
        outcomes.append(
            Outcome(
                *(name, budget, delta, int(chosen.sum())),
                *(found.thresholds, found.recalls, precision),
            )
        )
    return outcomes


def mean_precision(evaluation: Evaluation) -> np.ndarray:
    """Precision (IoU thresholds, recalls), the mean over classes that have objects."""
    precision = evaluation.precision[:, :, :, 0]
    return precision[:, :, precision[0, 0] >= 0].mean(axis=2)
