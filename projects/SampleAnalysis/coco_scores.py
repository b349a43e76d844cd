"""
COCO evaluation of boxes by pycocotools, and the spread of AP over images.

Shape shorthand in this module:

    I: number of images
    T: number of IoU thresholds
    K: number of classes
    A: number of ranges of object size
"""

import contextlib
import io
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from detectron2.data import MetadataCatalog
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pisa_d2.evaluation import coco_truth, index_coco

SIZES = ("all", "small", "medium", "large")


def ground_truth(dataset: str) -> COCO:
    """Return the ground truth of a dataset, with the dataset's own ids of the classes."""
    return index_coco(coco_truth(dataset))


def class_ids(dataset: str, truth: COCO) -> list[int]:
    """The data set's own id of each contiguous class."""
    mapping = MetadataCatalog.get(dataset).get("thing_dataset_id_to_contiguous_id")
    if mapping is None:
        return sorted(truth.getCatIds())
    return sorted(mapping, key=mapping.get)


def evaluate(
    truth: COCO,
    detections: list[dict],
    image_ids: list[int | str],
    ids_of_classes: list[int],
    with_sizes: bool = True,
) -> COCOeval:
    """
    Args:
        truth: see :func:`ground_truth`.
        detections: COCO results, of contiguous classes.
        image_ids: the images that count.
        ids_of_classes: the data set's own id of each contiguous class.
        with_sizes: if not, of objects of all sizes together alone.

    Returns:
        Evaluated and accumulated. Its ``cocoDt`` numbers the detections from 1, in their sequence.
    """
    found = [
        {
            **detection,
            "id": i + 1,  # 0 would read as "no match"
            "category_id": ids_of_classes[detection["category_id"]],
            "area": detection["bbox"][2] * detection["bbox"][3],
            "iscrowd": 0,
        }
        for i, detection in enumerate(detections)
    ]
    results = index_coco({**truth.dataset, "annotations": found})
    evaluation = COCOeval(truth, results, "bbox")
    evaluation.params.imgIds = image_ids
    evaluation.params.catIds = ids_of_classes
    if not with_sizes:
        evaluation.params.areaRng = evaluation.params.areaRng[:1]
        evaluation.params.areaRngLbl = evaluation.params.areaRngLbl[:1]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def average_precision(evaluation: COCOeval) -> np.ndarray:
    """AP (T, K, A) in percent, at most 100 detections an image; NaN where there is no object."""
    precision = evaluation.eval["precision"][..., -1]  # (T, recalls, K, A)
    ap = 100 * precision.mean(axis=1)
    return np.where(precision[:, 0] < 0, np.nan, ap)


class _Marks(NamedTuple):
    """Detections of a class and a size range, highest score first."""

    images: np.ndarray
    right: np.ndarray  # (T, D)
    wrong: np.ndarray  # (T, D)
    num_objects: np.ndarray  # (I,)


class Resampler:
    """AP of an evaluated data set in which each image counts any number of times."""

    def __init__(self, evaluation: COCOeval) -> None:
        params = evaluation._paramsEval
        self.recalls = params.recThrs
        self.shape = len(params.catIds), len(params.areaRng)
        self.num_images, self.num_thresholds = len(params.imgIds), len(params.iouThrs)
        self._marks = [self._collect(m) for m in blocks(evaluation)]

    def _collect(self, of_images: list[dict | None]) -> _Marks:
        num_objects = np.zeros(self.num_images)
        scores, images = [np.zeros(0)], [np.zeros(0, dtype=np.int64)]
        nothing = np.zeros((self.num_thresholds, 0), dtype=bool)
        right, wrong = [nothing], [nothing]
        for i, result in enumerate(of_images):
            if result is None:
                continue
            num_objects[i] = np.sum(np.asarray(result["gtIgnore"]) == 0)
            matched = np.asarray(result["dtMatches"]) != 0
            counted = ~np.asarray(result["dtIgnore"], dtype=bool)
            scores.append(result["dtScores"])
            images.append(np.full(len(result["dtScores"]), i))
            right.append(matched & counted)
            wrong.append(~matched & counted)
        order = np.argsort(-np.concatenate(scores), kind="mergesort")
        return _Marks(
            np.concatenate(images)[order],
            np.concatenate(right, axis=1)[:, order],
            np.concatenate(wrong, axis=1)[:, order],
            num_objects,
        )

    def average_precision(self, counts: np.ndarray) -> np.ndarray:
        """
        Args:
            counts: integer (I,), how often each image counts.

        Returns:
            As :func:`average_precision`.
        """
        ap = np.full((len(self._marks), self.num_thresholds), np.nan)
        for row, marks in zip(ap, self._marks, strict=True):
            total = marks.num_objects @ counts
            if total == 0:
                continue
            weights = counts[marks.images]
            right = (marks.right * weights).cumsum(axis=1)
            wrong = (marks.wrong * weights).cumsum(axis=1)
            precision = right / np.maximum(right + wrong, 1)
            best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            for t in range(self.num_thresholds):
                at = np.searchsorted(right[t] / total, self.recalls)
                reached = at < len(weights)
                row[t] = 100 * best[t, at[reached]].sum() / len(self.recalls)
        return ap.reshape(*self.shape, -1).transpose(2, 0, 1)


def blocks(evaluation: COCOeval) -> Iterator[list[dict | None]]:
    """The results of all images, for each class and each size range of it."""
    num_images = len(evaluation._paramsEval.imgIds)
    for start in range(0, len(evaluation.evalImgs), num_images):
        yield evaluation.evalImgs[start : start + num_images]


def bootstrap(evaluations: list[COCOeval], num_draws: int, seed: int) -> list[np.ndarray]:
    """
    AP (draws, T, K, A) of each evaluation, over images drawn with replacement. They are the same
    in all evaluations, so differences can be taken draw by draw.
    """
    resamplers = [Resampler(evaluation) for evaluation in evaluations]
    num_images = resamplers[0].num_images
    draws = np.random.default_rng(seed).multinomial(
        num_images, np.full(num_images, 1 / num_images), size=num_draws
    )
    return [np.stack([r.average_precision(counts) for counts in draws]) for r in resamplers]
