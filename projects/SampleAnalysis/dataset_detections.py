"""The detections of a whole dataset, in arrays: LVIS has millions of them."""

from collections.abc import Iterable, Iterator
from functools import cached_property

import numpy as np
from detectron2.structures import BoxMode, Instances


class Detections:
    """
    Detections of contiguous classes, image after image. Iterating over them gives COCO results.
    """

    def __init__(self) -> None:
        self._image_ids: list[int | str] = []
        self._parts: dict[str, list[np.ndarray]] = {
            "images": [np.zeros(0, np.int32)],
            "classes": [np.zeros(0, np.int32)],
            "scores": [np.zeros(0, np.float32)],
            "boxes": [np.zeros((0, 4), np.float32)],
        }

    @classmethod
    def of_results(cls, results: Iterable[dict]) -> "Detections":
        """Return the detections of COCO results, in their sequence."""
        detections = cls()
        for result in results:
            detections._append(
                result["image_id"],
                np.array([result["category_id"]]),
                np.array([result["score"]]),
                np.array([result["bbox"]]),
            )
        return detections

    def add(self, found: Instances, image_id: int | str) -> None:
        """Add the detections of an image."""
        found = found.to("cpu")
        boxes = found.pred_boxes.tensor.detach().numpy()
        boxes = BoxMode.convert(boxes, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
        classes, scores = found.pred_classes.numpy(), found.scores.detach().numpy()
        self._append(image_id, classes, scores, boxes)

    def _append(
        self, image_id: int | str, classes: np.ndarray, scores: np.ndarray, boxes: np.ndarray
    ) -> None:
        self.__dict__.pop("arrays", None)
        images = np.full(len(classes), len(self._image_ids), np.int32)
        self._image_ids.append(image_id)
        values = {"images": images, "classes": classes, "scores": scores, "boxes": boxes}
        for name, parts in self._parts.items():
            parts.append(values[name].astype(parts[0].dtype))

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """``images`` (an index), ``classes``, ``scores`` (N,) and ``boxes`` (N, 4), XYWH."""
        arrays = {name: np.concatenate(parts) for name, parts in self._parts.items()}
        self._parts = {name: [values] for name, values in arrays.items()}
        return arrays

    def by_class(self, num_classes: int) -> Iterator[np.ndarray]:
        """Yield the indices of the detections of each class, in their sequence."""
        classes = self.arrays["classes"]
        order = np.argsort(classes, kind="stable").astype(np.int32)
        ends = np.bincount(classes, minlength=num_classes).cumsum()[:num_classes]
        yield from np.split(order, ends)[:num_classes]

    def results(self, rows: np.ndarray) -> list[dict]:
        """COCO results of some of them."""
        of_rows = (self.arrays[name][rows].tolist() for name in self._parts)
        return [
            {
                "image_id": self._image_ids[image],
                "category_id": class_,
                "score": score,
                "bbox": box,
            }
            for image, class_, score, box in zip(*of_rows, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.arrays["classes"])

    def __iter__(self) -> Iterator[dict]:
        yield from self.results(np.arange(len(self)))
