"""The annotations of a dataset in lists."""

import math
from collections.abc import Sequence
from itertools import chain

import numpy as np
from detectron2.structures import BoxMode


class Objects:
    """
    All annotations of a dataset in one list, to check them without a Python loop for each test.

    Attributes:
        dicts: the dataset, one dict per image.
        annotations: the annotations of all images, N in all.
        owner: int64 (N,), the index of each annotation's image.
        boxes, modes, categories, crowds: N values each of bbox, bbox_mode, category_id and iscrowd,
            as they are in the annotations.
    """

    def __init__(self, dicts: list[dict]) -> None:
        self.dicts = dicts
        lists = [record.get("annotations", ()) for record in dicts]
        self.annotations: list[dict] = list(chain.from_iterable(lists))
        self.owner = np.repeat(np.arange(len(dicts)), [len(annotations) for annotations in lists])
        self.boxes: list = []
        self.modes: list = []
        self.categories: list = []
        self.crowds: list = []
        # In one pass, whose time goes to fetching a million dicts from memory.
        for annotation in self.annotations:
            get = annotation.get
            self.boxes.append(get("bbox"))
            self.modes.append(get("bbox_mode", BoxMode.XYXY_ABS))
            self.categories.append(get("category_id"))
            self.crowds.append(get("iscrowd", 0))

    def file(self, index: int) -> str:
        """Return the name of an annotation's image, in quotes."""
        return f"'{self.dicts[self.owner[index]].get('file_name')}'"

    def sizes(self) -> np.ndarray:
        """Return width and height of each annotation's image, float64 (N, 2); NaN if unknown."""
        sizes = [
            [record.get(key, math.nan) for record in self.dicts] for key in ("width", "height")
        ]
        return np.array(sizes, dtype=np.float64).T[self.owner]

    def keep(self, kept: np.ndarray) -> "Objects":
        """Return a copy with only the annotations for which ``kept``, bool (N,), is true."""
        annotations = [a if keep else None for a, keep in zip(self.annotations, kept, strict=True)]
        return self.replace(annotations)

    def replace(self, annotations: Sequence[dict | None]) -> "Objects":
        """Return a copy with other annotations, N in all; None drops an annotation."""
        dicts = list(self.dicts)
        pairs = zip(annotations, self.annotations, strict=True)
        changed = np.fromiter((new is not old for new, old in pairs), bool, len(annotations))
        for image in np.unique(self.owner[changed]).tolist():
            first, last = np.searchsorted(self.owner, [image, image + 1])
            chosen = [a for a in annotations[first:last] if a is not None]
            dicts[image] = {**dicts[image], "annotations": chosen}
        return Objects(dicts)
