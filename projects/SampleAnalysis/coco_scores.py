"""
COCO evaluation of boxes by pycocotools, and the spread of AP over images.

Shape shorthand in this module:

    I: number of images
    T: number of IoU thresholds
    R: number of recalls
    K: number of classes
    A: number of ranges of object size
"""

import contextlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from dataset_detections import Detections
from detectron2.data import MetadataCatalog
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval, Params
from tqdm import tqdm

from pisa_d2.evaluation import coco_truth, index_coco

SIZES = ("all", "small", "medium", "large")


# Fields of an annotation; outlines would take most of the memory.
_KEPT = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")


def ground_truth(dataset: str) -> COCO:
    """Return the ground truth of a dataset, with the dataset's own ids of the classes."""
    content = coco_truth(dataset)
    annotations = [
        {name: value for name, value in annotation.items() if name in _KEPT}
        for annotation in content.get("annotations", [])
    ]
    images = [{"id": image["id"]} for image in content["images"]]
    return index_coco({**content, "images": images, "annotations": annotations})


def class_ids(dataset: str, truth: COCO) -> list[int]:
    """The dataset's own id of each contiguous class."""
    mapping = MetadataCatalog.get(dataset).get("thing_dataset_id_to_contiguous_id")
    if mapping is None:
        return sorted(truth.getCatIds())
    return sorted(mapping, key=mapping.get)


class _Marks(NamedTuple):
    """
    Detections of a class and a size range, highest score first; and the images that have objects.
    """

    scores: np.ndarray  # float32 (D,), as detectors give them
    images: np.ndarray  # int32 (D,)
    right: np.ndarray  # bits of (T, D), packed along T
    wrong: np.ndarray  # the same
    images_of_objects: np.ndarray
    num_objects: np.ndarray


_NOTHING = np.zeros(0, np.int32)
_NO_MARKS = _Marks(*[_NOTHING] * 6)


@dataclass
class Evaluation:
    """
    The results of a COCO evaluation.

    Attributes:
        truth, detections: what was evaluated.
        image_ids: the evaluated images, in ascending order.
        ids_of_classes: the dataset's own id of each contiguous class.
        thresholds, recalls: of IoU (T,), and of the precision-recall curves (R,).
        precision: (T, R, K, A), of at most 100 detections per class and image; -1 where a class
            has no object.
        marks: of each class and size range, for :class:`Resampler`.
        best: the index of each detection that is described: in each class the highest scored, as
            many as the class has objects, so that detectors with different scales of scores can be
            compared. Each has the ids of the objects that it matches at IoU 0.5 and at 0.75, or 0.
            Detections of a crowd are left out.
    """

    truth: COCO
    detections: Detections
    image_ids: list[int | str]
    ids_of_classes: list[int]
    thresholds: np.ndarray
    recalls: np.ndarray
    precision: np.ndarray
    marks: list[_Marks] = field(default_factory=list)
    best: dict[int, tuple[int, int]] = field(default_factory=dict)


def evaluate(
    truth: COCO,
    detections: Detections,
    image_ids: Iterable[int | str],
    ids_of_classes: list[int],
    with_details: bool = True,
) -> Evaluation:
    """
    Evaluate one class after another: pycocotools keeps the matches of each image and class, which
    take gigabytes for all classes at once.

    Args:
        truth: see :func:`ground_truth`.
        detections: of contiguous classes.
        image_ids: the evaluated images.
        ids_of_classes: the dataset's own id of each contiguous class.
        with_details: also evaluate by object size, and keep the details that :class:`Resampler` and
            :mod:`mistakes` need.
    """
    image_ids = sorted(set(image_ids))
    places = {image: place for place, image in enumerate(image_ids)}
    objects: dict[int, list[dict]] = {}
    for annotation in truth.dataset["annotations"]:
        if annotation["image_id"] in places:
            objects.setdefault(annotation["category_id"], []).append(annotation)
    params = Params(iouType="bbox")
    num_sizes = len(params.areaRng) if with_details else 1
    shape = len(params.iouThrs), len(params.recThrs), len(ids_of_classes), num_sizes
    result = Evaluation(
        truth,
        detections,
        image_ids,
        ids_of_classes,
        params.iouThrs,
        params.recThrs,
        np.full(shape, -1.0),
    )
    rows_of_classes = detections.by_class(len(ids_of_classes))
    classes = zip(ids_of_classes, rows_of_classes, strict=True)
    progress = tqdm(classes, desc="COCO evaluation", total=len(ids_of_classes), delay=5)
    for class_, (own_id, rows) in enumerate(progress):
        of_class = _evaluate_class(
            own_id, objects.get(own_id, []), detections, rows, places, num_sizes
        )
        if of_class is None:
            result.marks += [_NO_MARKS] * (num_sizes if with_details else 0)
            continue
        result.precision[:, :, class_] = of_class.eval["precision"][:, :, 0, :, -1]
        if with_details:
            result.best.update(_best_detections(of_class))
            result.marks += [_collect(block, of_class, places) for block in blocks(of_class)]
    return result


def _evaluate_class(
    own_id: int,
    objects: list[dict],
    detections: Detections,
    rows: np.ndarray,
    places: dict[int | str, int],
    num_sizes: int,
) -> COCOeval | None:
    """Evaluate the images with an object or a detection of the class; None without any."""
    results = [
        {
            **detection,
            "id": row + 1,  # 0 would read as "no match"
            "category_id": own_id,
            "area": detection["bbox"][2] * detection["bbox"][3],
            "iscrowd": 0,
        }
        for row, detection in zip(rows.tolist(), detections.results(rows), strict=True)
        if detection["image_id"] in places
    ]
    image_ids = sorted({item["image_id"] for item in (*objects, *results)})
    if not image_ids:
        return None
    content = {"images": [{"id": i} for i in image_ids], "categories": [{"id": own_id}]}
    evaluation = COCOeval(
        index_coco({**content, "annotations": objects}),
        index_coco({**content, "annotations": results}),
        "bbox",
    )
    evaluation.params.imgIds, evaluation.params.catIds = image_ids, [own_id]
    evaluation.params.maxDets = evaluation.params.maxDets[-1:]  # AP uses the highest alone
    evaluation.params.areaRng = evaluation.params.areaRng[:num_sizes]
    evaluation.params.areaRngLbl = evaluation.params.areaRngLbl[:num_sizes]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def blocks(evaluation: COCOeval) -> Iterator[list[dict | None]]:
    """Yield the results of all images, for each size range."""
    num_images = len(evaluation._paramsEval.imgIds)
    for start in range(0, len(evaluation.evalImgs), num_images):
        yield evaluation.evalImgs[start : start + num_images]


def _best_detections(evaluation: COCOeval) -> dict[int, tuple[int, int]]:
    """See :class:`Evaluation`."""
    num_objects, found = 0, []
    for result in next(blocks(evaluation)):  # the first range holds all sizes
        if result is None:
            continue
        num_objects += int(np.sum(np.asarray(result["gtIgnore"]) == 0))
        counted = ~np.asarray(result["dtIgnore"], dtype=bool)[0]
        matches = np.asarray(result["dtMatches"])[[0, 5]].astype(np.int64).T.tolist()
        items = zip(result["dtScores"], result["dtIds"], matches, counted, strict=True)
        found += [(score, i - 1, tuple(match)) for score, i, match, counts in items if counts]
    found.sort(key=lambda item: -item[0])
    return {row: match for _, row, match in found[:num_objects]}


def _collect(
    of_images: list[dict | None], evaluation: COCOeval, places: dict[int | str, int]
) -> _Marks:
    nothing = np.zeros((len(evaluation._paramsEval.iouThrs), 0), dtype=bool)
    scores: list[np.ndarray] = [np.zeros(0, np.float32)]
    images: list[np.ndarray] = [np.zeros(0, np.int32)]
    right, wrong = [nothing], [nothing]
    num_objects: dict[int, int] = {}
    for image_id, result in zip(evaluation._paramsEval.imgIds, of_images, strict=True):
        if result is None:
            continue
        place = places[image_id]
        if num := int(np.sum(np.asarray(result["gtIgnore"]) == 0)):
            num_objects[place] = num
        matched = np.asarray(result["dtMatches"]) != 0
        counted = ~np.asarray(result["dtIgnore"], dtype=bool)
        scores.append(np.asarray(result["dtScores"], dtype=np.float32))
        images.append(np.full(len(result["dtScores"]), place, np.int32))
        right.append(matched & counted)
        wrong.append(~matched & counted)
    all_scores = np.concatenate(scores)
    order = np.argsort(-all_scores, kind="mergesort")
    all_right, all_wrong = (np.concatenate(x, axis=1)[:, order] for x in (right, wrong))
    counts = (all_right | all_wrong).any(axis=0)
    return _Marks(
        all_scores[order][counts],
        np.concatenate(images)[order][counts],
        np.packbits(all_right[:, counts], axis=0),
        np.packbits(all_wrong[:, counts], axis=0),
        np.fromiter(num_objects.keys(), np.int64, len(num_objects)),
        np.fromiter(num_objects.values(), np.int64, len(num_objects)),
    )


def scored_marks(evaluation: Evaluation, threshold: float) -> tuple[np.ndarray, np.ndarray, int]:
    """
    Detections of all classes together.

    Args:
        evaluation: with details.
        threshold: of IoU, one of ``evaluation.thresholds``.

    Returns:
        Scores (D,), highest first; whether each detection is right, bool (D,); and the number of
        objects.
    """
    row = int(np.argmin(np.abs(evaluation.thresholds - threshold)))
    of_all_sizes = evaluation.marks[:: evaluation.precision.shape[3]]
    scores, right, total = [np.zeros(0)], [np.zeros(0, dtype=bool)], 0
    for marks in of_all_sizes:
        total += int(marks.num_objects.sum())
        if len(marks.scores):
            bits = np.unpackbits(marks.right, axis=0, count=len(evaluation.thresholds))[row]
            wrong = np.unpackbits(marks.wrong, axis=0, count=len(evaluation.thresholds))[row]
            counted = (bits | wrong).astype(bool)
            scores.append(marks.scores[counted])
            right.append(bits[counted].astype(bool))
    all_scores, all_right = np.concatenate(scores), np.concatenate(right)
    order = np.argsort(-all_scores, kind="stable")
    return all_scores[order], all_right[order], total


def average_precision(evaluation: Evaluation) -> np.ndarray:
    """AP (T, K, A) in percent, at most 100 detections per image; NaN where there is no object."""
    ap = 100 * evaluation.precision.mean(axis=1)
    return np.where(evaluation.precision[:, 0] < 0, np.nan, ap)
