"""
Average precision on resampled test images, and what the choice of test images does to a difference.

Shape shorthand in this module:

    I: number of test images
    D: number of detections of a class on all images
    T: number of IoU thresholds
    B: number of resamples
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Matches(NamedTuple):
    """
    The detections of a class, best score first, as COCO's evaluation has matched them.

    Attributes:
        images: int (D,), the image of each.
        hit: bool (T, D), whether it found an object.
        ignored: bool (T, D), whether it is left out, such as one on a crowd.
        num_objects: int (I,), objects of each image that should be found.
    """

    images: Array
    hit: Array
    ignored: Array
    num_objects: Array


def matches_of(evaluation: Any) -> list[Matches]:
    """
    Args:
        evaluation: a ``pycocotools.cocoeval.COCOeval`` after ``evaluate()``.

    Returns:
        The matches of each class, over objects of all sizes and as many detections per image as
        AP is computed from.
    """
    params = evaluation.params
    num_images, num_areas = len(params.imgIds), len(params.areaRng)
    limit = params.maxDets[-1]
    matches = []
    for k in range(len(params.catIds)):
        first = k * num_areas * num_images  # the first area is "all"
        of_images = evaluation.evalImgs[first : first + num_images]
        num_objects = np.zeros(num_images, dtype=np.int64)
        images, scores, hits, ignored = [], [], [], []
        for i, found in enumerate(of_images):
            if found is None:  # neither objects nor detections
                continue
            num_objects[i] = np.count_nonzero(np.asarray(found["gtIgnore"]) == 0)
            score = np.asarray(found["dtScores"][:limit], dtype=float)
            scores.append(score)
            images.append(np.full(len(score), i))
            hits.append(np.asarray(found["dtMatches"])[:, :limit] != 0)
            ignored.append(np.asarray(found["dtIgnore"])[:, :limit].astype(bool))
        if not scores:
            none = np.zeros((len(params.iouThrs), 0), dtype=bool)
            matches.append(Matches(np.zeros(0, dtype=np.int64), none, none, num_objects))
            continue
        order = np.argsort(-np.concatenate(scores), kind="mergesort")
        matches.append(
            Matches(
                np.concatenate(images)[order],
                np.concatenate(hits, axis=1)[:, order],
                np.concatenate(ignored, axis=1)[:, order],
                num_objects,
            )
        )
    return matches


def average_precision(matches: list[Matches], weights: Array) -> Array:
    """
    COCO AP where every image stands ``weights`` times in the test set.

    Args:
        matches: those of each class.
        weights: int (B, I).

    Returns:
        (B,), in percent. Classes without an object in a resample do not take part in its mean; it
        is NaN if there is none with any.
    """
    values = np.stack([_of_class(m, weights) for m in matches])
    valid = np.isfinite(values)
    total = np.where(valid, values, 0).sum(axis=0)
    return 100 * np.divide(
        total, valid.sum(axis=0), out=np.full(len(weights), math.nan), where=valid.any(axis=0)
    )


RECALLS = np.linspace(0.0, 1.0, 101)


def _of_class(matches: Matches, weights: Array) -> Array:
    """(B,), NaN where there is no object."""
    num_objects = weights @ matches.num_objects
    of_detections = weights[:, matches.images]
    sums = np.zeros(len(weights))
    for hit, ignored in zip(matches.hit, matches.ignored, strict=True):
        true = np.cumsum(of_detections * (hit & ~ignored), axis=1)
        false = np.cumsum(of_detections * (~hit & ~ignored), axis=1)
        recall = true / np.maximum(num_objects, 1)[:, None]
        precision = true / (true + false + np.spacing(1))
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        # One more column, of 0, for recalls that are not reached.
        precision = np.pad(precision, ((0, 0), (0, 1)))
        for b in range(len(weights)):
            reached = np.searchsorted(recall[b], RECALLS, side="left")
            sums[b] += precision[b, reached].mean()
    return np.where(num_objects > 0, sums / len(matches.hit), math.nan)


def resamples(num_images: int, num: int, seed: int) -> Array:
    """int (num, num_images): how often a resample with replacement has each image."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(num_images, np.full(num_images, 1 / num_images), size=num)


def bootstrap_error(differences: Array) -> float:
    """
    Standard error of a difference of mean AP that comes from the choice of test images, with the
    seeds as they are.

    Args:
        differences: (B,), of the mean over runs on each resample of the test images.
    """
    return float(differences.std(ddof=1))
