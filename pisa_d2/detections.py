"""Saving detections for evaluations that keep none."""

import json
import os
from typing import Any

from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.utils import comm


class DetectionsWriter(DatasetEvaluator):
    """
    Save detections in the file and format of Detectron2's ``COCOEvaluator``, with contiguous class
    ids, next to an evaluation that saves none, such as Pascal VOC's. It has no result of its own.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self.reset()

    def reset(self) -> None:
        self._detections: list[dict[str, Any]] = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        for image, found in zip(inputs, outputs, strict=True):
            instances = found["instances"].to("cpu")
            self._detections += instances_to_coco_json(instances, image["image_id"])

    def evaluate(self) -> None:
        of_processes = comm.gather(self._detections, dst=0)
        if comm.is_main_process():
            os.makedirs(self._folder, exist_ok=True)
            with open(os.path.join(self._folder, "coco_instances_results.json"), "w") as file:
                json.dump([detection for some in of_processes for detection in some], file)
