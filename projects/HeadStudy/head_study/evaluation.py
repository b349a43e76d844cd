"""COCO AP of a box head on cached views of test images."""

import contextlib
import copy
import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling import ROIHeads
from detectron2.modeling.postprocessing import detector_postprocess
from pycocotools.cocoeval import COCOeval

from pisa_d2.engine.metrics import COCO_METRICS
from pisa_d2.evaluation import coco_truth, index_coco

from .bootstrap import Array, average_precision, matches_of
from .cache import View, run_head


class Scores(NamedTuple):
    """
    Attributes:
        metrics: COCO's, in percent, by the names in :data:`COCO_METRICS`.
        resampled: AP (B,) on each resample of the test images.
    """

    metrics: dict[str, float]
    resampled: Array


class Truth(NamedTuple):
    """
    Attributes:
        content: annotations in COCO's format.
        category_ids: of COCO's, by contiguous class; None where they are the same.
    """

    content: dict[str, Any]
    category_ids: dict[int, int] | None


def truth_of(dataset: str, ignored_regions: bool = False) -> Truth:
    """
    Args:
        dataset: a registered dataset of Detectron2.
        ignored_regions: whether annotations with ``ignore: 1`` are crowds, not objects.

    Raises:
        ValueError: the dataset's own evaluation is not COCO's.
    """
    metadata = MetadataCatalog.get(dataset)
    if metadata.get("evaluator_type") == "lvis":
        raise ValueError(
            f"DATASETS.TEST = {dataset!r} is not annotated exhaustively, as COCO AP needs it."
        )
    to_contiguous = metadata.get("thing_dataset_id_to_contiguous_id")
    category_ids = to_contiguous and {v: k for k, v in to_contiguous.items()}
    return Truth(coco_truth(dataset, ignored_regions), category_ids)


class Evaluator:
    """
    Args:
        truth: annotations.
        image_ids: the images of it that are evaluated, in the order of the views.
        weights: int (B, I), resamples of these images, see :func:`bootstrap.resamples`.
    """

    def __init__(self, truth: Truth, image_ids: Sequence[int | str], weights: Array) -> None:
        self.truth = index_coco(truth.content)
        self.category_ids = truth.category_ids
        # COCO's evaluation sorts the images; a weight stays with its image.
        self.image_ids = sorted(image_ids)
        order = sorted(range(len(image_ids)), key=lambda i: image_ids[i])
        self.weights = weights[:, order]

    @torch.no_grad()
    def __call__(self, head: ROIHeads, views: Sequence[View]) -> Scores:
        head.eval()
        device = next(head.parameters()).device
        detections: list[dict[str, Any]] = []
        for view in views:
            (instances,), _ = run_head(head, [view], device)
            instances = detector_postprocess(instances, view.height, view.width).to("cpu")
            detections += instances_to_coco_json(instances, view.image_id)
        return self.score(detections)

    def score(self, detections: list[dict[str, Any]]) -> Scores:
        """
        Args:
            detections: in COCO's format, with contiguous category ids.
        """
        if not detections:
            nothing = dict.fromkeys(COCO_METRICS, 0.0)
            return Scores(nothing, self.weights.sum(axis=1) * 0.0)
        if self.category_ids:
            detections = [
                {**d, "category_id": self.category_ids[d["category_id"]]} for d in detections
            ]
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(self.truth, self.truth.loadRes(copy.deepcopy(detections)), "bbox")
            evaluation.params.imgIds = self.image_ids
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        metrics = {
            name: 100 * float(value) if value >= 0 else math.nan
            for name, value in zip(COCO_METRICS, evaluation.stats[:6], strict=True)
        }
        return Scores(metrics, average_precision(matches_of(evaluation), self.weights))
