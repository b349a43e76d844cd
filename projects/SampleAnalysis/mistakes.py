"""What a detector's best detections are: right, or wrong in one of four ways."""

from dataclasses import dataclass, field

import numpy as np
from coco_scores import blocks
from pycocotools import mask
from pycocotools.cocoeval import COCOeval

KINDS = ("classification", "localisation", "duplicate", "background")
RIGHT_IOU, NEAR_IOU = 0.5, 0.1


@dataclass
class Detection:
    """``box`` XYWH in pixels; ``right_at`` the IoU thresholds at which it is right."""

    box: list[float]
    class_id: int
    score: float
    right_at: set[float] = field(default_factory=set)
    mistake: str | None = None


@dataclass
class ImageResult:
    """
    The objects of an image and those of its detections that are looked at. ``missed_at`` has, for
    each object, the IoU thresholds at which none of these finds it. Crowds are left out.
    """

    image_id: int | str
    objects: list[dict]
    detections: list[Detection]
    missed_at: list[set[float]]

    @property
    def num_errors(self) -> int:
        """False positives and missed objects, at IoU 0.5 and at 0.75."""
        wrong = sum(len({0.5, 0.75} - d.right_at) for d in self.detections)
        return wrong + sum(len(missed) for missed in self.missed_at)


def best_detections(evaluation: COCOeval) -> set[int]:
    """
    Ids of the detections that are looked at: in each class as many as it has objects, the highest
    scored. So two detectors compare whose scores mean different things. Detections of a crowd are
    left out.
    """
    chosen: set[int] = set()
    num_areas = len(evaluation._paramsEval.areaRng)
    for number, of_images in enumerate(blocks(evaluation)):
        if number % num_areas:  # the first range holds all sizes
            continue
        num_objects, scores, ids = 0, [], []
        for result in of_images:
            if result is None:
                continue
            num_objects += int(np.sum(np.asarray(result["gtIgnore"]) == 0))
            counted = ~np.asarray(result["dtIgnore"], dtype=bool)[0]
            scores += [s for s, c in zip(result["dtScores"], counted, strict=True) if c]
            ids += [i for i, c in zip(result["dtIds"], counted, strict=True) if c]
        order = np.argsort(-np.asarray(scores), kind="stable")[:num_objects]
        chosen.update(ids[i] for i in order)
    return chosen


def describe_images(evaluation: COCOeval) -> list[ImageResult]:
    """The best detections of each image, matched by pycocotools, in the sequence of ``imgIds``."""
    truth, found = evaluation.cocoGt, evaluation.cocoDt
    params = evaluation._paramsEval
    chosen = best_detections(evaluation)
    matches = _matches(evaluation)
    thresholds = {0.5: 0, 0.75: 5}
    images = []
    for image_id in params.imgIds:
        objects = [o for o in truth.imgToAnns[image_id] if not o["iscrowd"]]
        taken: dict[float, set[int]] = {t: set() for t in thresholds}
        detections = []
        for result in sorted(found.imgToAnns[image_id], key=lambda d: -d["score"]):
            if result["id"] not in chosen:
                continue
            detection = Detection(result["bbox"], result["category_id"], result["score"])
            for threshold, row in thresholds.items():
                if matched := int(matches[result["id"]][row]):
                    detection.right_at.add(threshold)
                    taken[threshold].add(matched)
            if RIGHT_IOU not in detection.right_at:
                detection.mistake = kind_of_mistake(result, objects)
            detections.append(detection)
        missed = [{t for t in thresholds if o["id"] not in taken[t]} for o in objects]
        images.append(ImageResult(image_id, objects, detections, missed))
    return images


def _matches(evaluation: COCOeval) -> dict[int, np.ndarray]:
    """Of each detection the id of its object at each IoU threshold, or 0."""
    matches = {}
    num_areas = len(evaluation._paramsEval.areaRng)
    for number, of_images in enumerate(blocks(evaluation)):
        for result in of_images if number % num_areas == 0 else []:
            if result is not None:
                matches.update(zip(result["dtIds"], result["dtMatches"].T, strict=True))
    return matches


def kind_of_mistake(detection: dict, objects: list[dict]) -> str:
    """
    Of a detection that matches no object at IoU 0.5, the first that holds: ``duplicate``, it
    overlaps one of its class by 0.5 or more, which another detection took; ``classification``, one
    of another class by 0.5 or more; ``localisation``, one of its class by 0.1 or more; and
    otherwise ``background``.
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
    """The pairs whose numbers of errors differ most; of equal ones the earlier image."""
    pairs = list(zip(first, second, strict=True))
    return sorted(pairs, key=lambda pair: -abs(pair[0].num_errors - pair[1].num_errors))[:num]
