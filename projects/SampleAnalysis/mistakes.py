"""Describe a detector's best detections: right, or wrong in one of four ways."""

from dataclasses import dataclass

import numpy as np
from coco_scores import Evaluation
from pycocotools import mask

KINDS = ("classification", "localisation", "duplicate", "background")
RIGHT_IOU, NEAR_IOU = 0.5, 0.1
THRESHOLDS = (0.5, 0.75)


@dataclass(slots=True)  # a dataset has hundreds of thousands
class Detection:
    """A detection: ``box`` XYWH in pixels; ``right_at`` the IoU thresholds at which it is right."""

    box: list[float]
    class_id: int
    score: float
    right_at: tuple[float, ...]
    mistake: str | None


@dataclass(slots=True)
class ImageResult:
    """
    The objects and the best detections of one image. ``missed_at`` has, for each object, the IoU
    thresholds at which none of these detections finds it. Crowds are left out.
    """

    image_id: int | str
    objects: list[dict]
    detections: list[Detection]
    missed_at: list[tuple[float, ...]]

    @property
    def num_errors(self) -> int:
        """False positives and missed objects, at IoU 0.5 and at 0.75."""
        wrong = sum(len(THRESHOLDS) - len(d.right_at) for d in self.detections)
        return wrong + sum(len(missed) for missed in self.missed_at)


def describe_images(evaluation: Evaluation) -> list[ImageResult]:
    """Return the best detections of each image, matched by pycocotools."""
    rows = np.array(sorted(evaluation.best), dtype=np.int64)
    found: dict[int | str, list[tuple[dict, tuple[int, int]]]] = {}
    for row, result in zip(rows.tolist(), evaluation.detections.results(rows), strict=True):
        result["category_id"] = evaluation.ids_of_classes[result["category_id"]]
        found.setdefault(result["image_id"], []).append((result, evaluation.best[row]))
    images = []
    for image_id in evaluation.image_ids:
        objects = [o for o in evaluation.truth.imgToAnns[image_id] if not o["iscrowd"]]
        taken: dict[float, set[int]] = {t: set() for t in THRESHOLDS}
        detections = []
        for result, matches in sorted(found.pop(image_id, []), key=lambda d: -d[0]["score"]):
            matched = {t: own for t, own in zip(THRESHOLDS, matches, strict=True) if own}
            for threshold, own in matched.items():
                taken[threshold].add(own)
            mistake = None if RIGHT_IOU in matched else kind_of_mistake(result, objects)
            box, class_id, score = (result[name] for name in ("bbox", "category_id", "score"))
            detections.append(Detection(box, class_id, score, tuple(matched), mistake))
        missed = [tuple(t for t in THRESHOLDS if o["id"] not in taken[t]) for o in objects]
        images.append(ImageResult(image_id, objects, detections, missed))
    return images


def kind_of_mistake(detection: dict, objects: list[dict]) -> str:
    """
    Return the kind of a detection that matches no object at IoU 0.5, the first that holds:
    ``duplicate``, it overlaps an object of its class by 0.5 or more, which another detection took;
    ``classification``, an object of another class by 0.5 or more; ``localisation``, an object of
    its class by 0.1 or more; and otherwise ``background``.
    """
    ious = {True: 0.0, False: 0.0}
    if objects:
        boxes = [o["bbox"] for o in objects]
        overlaps = mask.iou([detection["bbox"]], boxes, [0] * len(boxes))[0]
        for item, iou in zip(objects, overlaps, strict=True):
            same = item["category_id"] == detection["category_id"]
            ious[same] = max(ious[same], float(iou))
    if ious[True] >= RIGHT_IOU:
        return "duplicate"
    if ious[False] >= RIGHT_IOU:
        return "classification"
    return "localisation" if ious[True] >= NEAR_IOU else "background"


def count_mistakes(images: list[ImageResult]) -> dict[str, int]:
    kinds = [d.mistake for image in images for d in image.detections]
    return {kind: kinds.count(kind) for kind in KINDS}


def most_different(
    first: list[ImageResult], second: list[ImageResult], num: int
) -> list[tuple[ImageResult, ImageResult]]:
    """Return the pairs whose numbers of errors differ most; of equal ones the earlier image."""
    pairs = list(zip(first, second, strict=True))
    return sorted(pairs, key=lambda pair: -abs(pair[0].num_errors - pair[1].num_errors))[:num]
