"""
The value of a better classifier: AP is measured again after the same classification loss is taken
from different choices of positives.

The boxes stay as they are. Positives are the proposals that training would call positive. The logit
of its class is raised for each chosen positive, by one amount for all chosen positives of the
dataset, which bisection finds so that their losses fall by the budget in total. Scores, NMS of each
class and COCO AP follow as in the detector.

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
STEPS = 60  # of the bisection: 30 / 2^60 is below the precision of float64
AS_IT_IS, FIRST_5, FIRST_25 = "as it is", "first 5 by IoU-HLR", "first 25 by IoU-HLR"
LAST_5, HARDEST_5, ALL = "last 5 by IoU", "hardest 5", "all"
# Outcomes whose AP gets an interval over images.
COMPARED = ((FIRST_5, FRACTIONS[1]), (FIRST_25, FRACTIONS[1]), (LAST_5, FRACTIONS[-1]))


@dataclass
class Positives:
    """
    Class, object (unique over images) and IoU as regressed of each positive; losses and logits in
    float64, see :class:`ScoredBoxes`.
    """

    classes: Tensor
    objects: Tensor
    ious: Tensor
    losses: Tensor
    own_logits: Tensor
    rest_logits: Tensor | None

    @property
    def most_per_object(self) -> int:
        return int(self.objects.bincount().max()) if len(self.objects) else 0


@dataclass
class Outcome:
    """
    Attributes:
        delta: the raise of the logits that takes ``budget`` from the losses.
        chosen: bool (P,), the raised positives.
        evaluation: with details where the outcome is compared by images.
    """

    choice: str
    budget: float
    delta: float
    chosen: Tensor
    evaluation: Evaluation

    @property
    def num_raised(self) -> int:
        return int(self.chosen.sum())

    @property
    def precision(self) -> np.ndarray:
        """(IoU thresholds, recalls), the mean over classes that have objects; NaN without any."""
        precision = self.evaluation.precision[:, :, :, 0]
        of_classes = precision[:, :, precision[0, 0] >= 0]
        if not of_classes.shape[2]:
            return np.full(precision.shape[:2], np.nan)
        return of_classes.mean(axis=2)

    @property
    def ap(self) -> float:
        """COCO AP in percent."""
        return 100 * float(self.precision.mean())


def gather(images: Iterable[ScoredBoxes]) -> Positives:
    """Return the positives of all images together."""
    found: dict[str, list[Tensor]] = {
        name: [] for name in ("gt_classes", "objects", "ious", "losses", "own_logits")
    }
    rest: list[Tensor] = []
    first = 0
    for image in images:
        for name, values in found.items():
            value = getattr(image, name)
            values.append(value.double() if name in ("losses", "own_logits") else value)
        found["objects"][-1] = image.objects + first
        first += int(image.objects.max()) + 1 if len(image.objects) else 0
        if image.rest_logits is not None:
            rest.append(image.rest_logits.double())
    classes, objects, ious, losses, own_logits = (torch.cat(parts) for parts in found.values())
    rest_logits = torch.cat(rest) if rest else None
    return Positives(classes, objects, ious, losses, own_logits, rest_logits)


def choices(positives: Positives) -> dict[str, Tensor]:
    """Return the positives whose scores are raised, bool (P,), by the name of the choice."""
    by_iou = local_rank(positives.ious, positives.objects)
    from_last = local_rank(-positives.ious, positives.objects)
    by_loss = local_rank(positives.losses, positives.objects)
    return {
        FIRST_5: by_iou < 5,
        FIRST_25: by_iou < 25,
        LAST_5: from_last < 5,
        HARDEST_5: by_loss < 5,
        ALL: torch.ones_like(by_iou, dtype=torch.bool),
    }


def losses_after(positives: Positives, chosen: Tensor, delta: float, predictor: Any) -> Tensor:
    """Return the classification losses of the chosen positives with their own logits raised."""
    own = positives.own_logits[chosen]
    if positives.rest_logits is None:
        # In the sum over classes only the own class's part changes.
        return positives.losses[chosen] + F.softplus(-own - delta) - F.softplus(-own)
    # All other classes together are one: the loss of the own one is the same.
    logits = torch.stack([own + delta, positives.rest_logits[chosen]], dim=1)
    return predictor.classification_losses(logits, torch.zeros_like(positives.classes[chosen]))


def reduction(positives: Positives, chosen: Tensor, delta: float, predictor: Any) -> float:
    """Return by how much the losses of all positives fall in total."""
    before, after = (losses_after(positives, chosen, d, predictor) for d in (0.0, delta))
    return float((before - after).sum())


def total_loss(positives: Positives, predictor: Any) -> float:
    everyone = torch.ones_like(positives.classes, dtype=torch.bool)
    return float(losses_after(positives, everyone, 0.0, predictor).sum())


def find_raise(positives: Positives, chosen: Tensor, budget: float, predictor: Any) -> float:
    """Find the raise of the chosen logits that takes ``budget`` from the losses."""
    low, high = 0.0, HIGHEST_RAISE
    before = losses_after(positives, chosen, 0.0, predictor)
    for _ in range(STEPS):
        middle = (low + high) / 2
        after = losses_after(positives, chosen, middle, predictor)
        if float((before - after).sum()) < budget:
            low = middle
        else:
            high = middle
    return high


def raised_scores(image: ScoredBoxes, chosen: Tensor, delta: float) -> Tensor:
    """
    Return scores (M,) with the logits of the chosen positives' own classes raised.

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
    # Other classes keep their shares of the probability that the own class leaves.
    shrunk = scores[pairs] * (after - before)[owners, 1].exp()
    scores[pairs] = torch.where(is_own, after[owners, 0].exp(), shrunk)
    return scores


def detect(image: ScoredBoxes, chosen: Tensor, delta: float, predictor: Any) -> Instances:
    """
    Make the detections of an image from its scores, as the detector does.

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
    images: Iterable[ScoredBoxes],
    predictor: Any,
    evaluate: Callable[[Detections, bool], Evaluation],
) -> list[Outcome]:
    """
    Args:
        images: read once for each outcome.
        predictor: the box predictor.
        evaluate: evaluates detections, with details if the second argument says so.

    Returns:
        The detector as it is, of budget 0, and each choice with each budget. Only the former where
        no image has a positive.
    """
    positives = gather(images)
    everyone = choices(positives)
    nobody = torch.zeros_like(positives.classes, dtype=torch.bool)
    plans = [(AS_IT_IS, 0.0, 0.0, nobody, True)]
    if len(positives.classes):
        largest = min(reduction(positives, c, HIGHEST_RAISE, predictor) for c in everyone.values())
        for fraction in FRACTIONS:
            for name, chosen in everyone.items():
                budget = fraction * largest
                delta = find_raise(positives, chosen, budget, predictor)
                plans.append((name, budget, delta, chosen, (name, fraction) in COMPARED))
    outcomes = []
    for name, budget, delta, chosen, with_details in tqdm(plans, desc="what if", delay=5):
        detections, first = Detections(), 0
        for image in images:
            part = chosen[first : (first := first + len(image.gt_classes))]
            detections.add(detect(image, part, delta, predictor), image.image_id)
        evaluation = evaluate(detections, with_details)
        outcomes.append(Outcome(name, budget, delta, chosen, evaluation))
    return outcomes
