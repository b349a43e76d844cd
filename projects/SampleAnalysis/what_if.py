"""
What a better classifier would buy: the same classification loss is taken from some of the
positives or from others, and AP is measured again.

The boxes stay as they are. Positives are the proposals that training would call so; each chosen
one has the logit of its class raised by one amount, common to all chosen ones of the data set,
which is found by bisection so that their losses fall by the budget in total. Then scores, NMS for
each class and COCO AP follow as in the detector.

Shape shorthand in this module:

    P: number of positives of all images
    K: number of foreground classes
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from collect import as_results
from detectron2.layers import batched_nms
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from findings import ScoredBoxes
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from pisa_d2.hlr import local_rank

FRACTIONS = (0.2, 0.5, 0.8)  # budgets, of the largest that all choices can meet
HIGHEST_RAISE = 30.0  # of a logit; by then a loss is 0 in float32
STEPS = 40  # of the bisection: 30 / 2^40 is below the precision of float32


@dataclass
class Positives:
    """Logits (P, K + 1), and for each: class, object (unique over images), IoU as regressed."""

    logits: Tensor
    classes: Tensor
    objects: Tensor
    ious: Tensor
    losses: Tensor


@dataclass
class Outcome:
    """``delta`` is the raise of the logits that takes ``budget`` from the losses."""

    choice: str
    budget: float
    delta: float
    num_raised: int
    evaluation: COCOeval


def gather(images: list[ScoredBoxes], losses_of: Callable[[Tensor, Tensor], Tensor]) -> Positives:
    """
    Args:
        losses_of: classification losses (P,) of logits and classes.
    """
    logits = torch.cat([image.logits for image in images])
    classes = torch.cat([image.gt_classes for image in images])
    objects, first = [], 0
    for image in images:
        objects.append(image.objects + first)
        first += int(image.objects.max()) + 1 if len(image.objects) else 0
    ious = torch.cat([image.ious for image in images])
    return Positives(logits, classes, torch.cat(objects), ious, losses_of(logits, classes))


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


def raised(logits: Tensor, classes: Tensor, delta: float, chosen: Tensor) -> Tensor:
    """Logits with those of the chosen rows' own classes raised."""
    amounts = (delta * chosen).to(logits.dtype)
    return logits.scatter_add(1, classes[:, None], amounts[:, None])


def reduction(
    positives: Positives,
    chosen: Tensor,
    delta: float,
    losses_of: Callable[[Tensor, Tensor], Tensor],
) -> float:
    """How much less the losses of all positives are in total."""
    logits = positives.logits[chosen]
    classes = positives.classes[chosen]
    after = losses_of(raised(logits, classes, delta, torch.ones_like(classes)), classes)
    return float((positives.losses[chosen].double() - after.double()).sum())


def find_raise(
    positives: Positives,
    chosen: Tensor,
    budget: float,
    losses_of: Callable[[Tensor, Tensor], Tensor],
) -> float:
    """The raise of the chosen logits that takes ``budget`` from the losses."""
    low, high = 0.0, HIGHEST_RAISE
    for _ in range(STEPS):
        middle = (low + high) / 2
        if reduction(positives, chosen, middle, losses_of) < budget:
            low = middle
        else:
            high = middle
    return high


def detect(image: ScoredBoxes, chosen: Tensor, delta: float, predictor: Any) -> Instances:
    """
    The detections of an image, as the detector makes them from its scores.

    Args:
        chosen: bool, of the positives of the image.
    """
    logits = raised(image.logits, image.gt_classes, delta, chosen)
    probs = predictor.predict_probs((logits, logits), [logits])[0]
    of_positive = image.owners >= 0
    scores = image.scores.clone()
    scores[of_positive] = probs[image.owners[of_positive], image.classes[of_positive]]
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
    images: list[ScoredBoxes], predictor: Any, evaluate: Callable[[list[dict]], COCOeval]
) -> list[Outcome]:
    """
    Args:
        predictor: the box predictor.
        evaluate: of COCO results.

    Returns:
        The detector as it is, of budget 0, and each choice with each budget; that alone where no
        image has a positive.
    """

    def losses_of(logits: Tensor, classes: Tensor) -> Tensor:
        # Federated loss draws the classes that count: the same before and after the raise.
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return predictor.classification_losses(logits, classes)

    def outcome(name: str, budget: float, delta: float, chosen: Tensor) -> Outcome:
        parts = chosen.split([len(image.logits) for image in images])
        results: list[dict] = []
        for image, part in zip(images, parts, strict=True):
            results += as_results(detect(image, part, delta, predictor), image.image_id)
        return Outcome(name, budget, delta, int(chosen.sum()), evaluate(results))

    positives = gather(images, losses_of)
    everyone = choices(positives)
    nobody = torch.zeros_like(positives.classes, dtype=torch.bool)
    outcomes = [outcome("as it is", 0.0, 0.0, nobody)]
    if len(positives.classes) == 0:
        return outcomes
    largest = min(reduction(positives, c, HIGHEST_RAISE, losses_of) for c in everyone.values())
    for fraction in FRACTIONS:
        for name, chosen in everyone.items():
            budget = fraction * largest
            delta = find_raise(positives, chosen, budget, losses_of)
            outcomes.append(outcome(name, budget, delta, chosen))
    return outcomes


def mean_precision(evaluation: COCOeval) -> np.ndarray:
    """Precision (IoU thresholds, recalls), the mean over classes that have objects."""
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    return precision[:, :, precision[0, 0] >= 0].mean(axis=2)
