"""
What is wrong with a data set is said before training starts: in the loader of Detectron2 it would
go unnoticed, or end the training hours later without the name of a file.
"""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from .registered import check_registered

logger = logging.getLogger(__name__)

# How many of a kind are named; the rest is counted.
_MAX_NAMED = 5


@dataclass(frozen=True)
class Classes:
    """
    How many classes a model has.

    Attributes:
        key: the config key that says so.
        num: its value.
    """

    key: str
    num: int


def _named(items: Sequence[str]) -> str:
    rest = len(items) - _MAX_NAMED
    return ", ".join(items[:_MAX_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def box_fault(box: Any, mode: BoxMode, size: tuple[int, int] | None) -> str | None:
    """
    What makes a box of no use for training.

    Args:
        box: as it stands in the annotation.
        mode: how it is meant.
        size: (width, height) of the image in pixels, None if it is not known.

    Returns:
        What is wrong, or None. Rotated boxes and such with relative coordinates are not looked at.
    """
    if mode not in (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS):
        return None
    try:
        numbers = [float(value) for value in box if isinstance(value, Real)]
    except TypeError:
        return "is not four numbers"
    if len(numbers) != 4 or len(box) != 4:
        return "is not four numbers"
    if not all(map(math.isfinite, numbers)):
        return "is not finite"
    x1, y1, x2, y2 = numbers
    if mode == BoxMode.XYWH_ABS:  # BoxMode.convert would make tensors: 20 s for COCO
        x2, y2 = x1 + x2, y1 + y2
    if x2 < x1 or y2 < y1:
        return "has a negative size"
    if x2 == x1 or y2 == y1:
        return "has no area"
    if x2 <= 0 or y2 <= 0 or (size is not None and (x1 >= size[0] or y1 >= size[1])):
        return "lies outside the image"
    return None


def _drop_boxes(dicts: list[dict], name: str) -> list[dict]:
    """Without the boxes of no use, with a warning that names them unless ``name`` is empty."""
    faults = []
    checked = []
    for record in dicts:
        size = (record["width"], record["height"]) if {"width", "height"} <= record.keys() else None
        good = []
        for annotation in record.get("annotations", []):
            box = annotation.get("bbox")
            fault = box_fault(box, annotation.get("bbox_mode", BoxMode.XYXY_ABS), size)
            if fault is None or annotation.get("iscrowd", 0):
                good.append(annotation)
            else:
                faults.append(f"{box} of '{record.get('file_name')}' {fault}")
        same = len(good) == len(record.get("annotations", []))
        checked.append(record if same else {**record, "annotations": good})
    if faults and name:
        logger.warning(
            "Data set '%s': left out %d box(es) that nothing can be learnt from: %s.",
            *(name, len(faults), _named(faults)),
        )
    return checked


def usable_boxes(dicts: list[dict]) -> list[dict]:
    """Return a dataset without the boxes that :func:`check_dataset` leaves out."""
    return _drop_boxes(dicts, "")


def _check_images(dicts: list[dict], name: str) -> None:
    # What is on another machine would take a request each.
    names = [str(record["file_name"]) for record in dicts if "file_name" in record]
    missing = [f"'{n}'" for n in names if "://" not in n and not PathManager.isfile(n)]
    if missing:
        raise FileNotFoundError(
            f"Data set '{name}' lacks {len(missing)} of its {len(dicts)} images: "
            f"{_named(missing)}. Put them there, or set the environment variable "
            "DETECTRON2_DATASETS to the folder that has the data sets."
        )


def _check_classes(dicts: list[dict], name: str, classes: Classes | None) -> None:
    things = MetadataCatalog.get(name).get("thing_classes")
    limits = [] if things is None else [(len(things), "the data set has")]
    limits += [] if classes is None else [(classes.num, f"{classes.key} is")]
    for record in dicts:
        for annotation in record.get("annotations", []):
            category = annotation.get("category_id")
            for num, what in limits:
                if not isinstance(category, Integral) or not 0 <= int(category) < num:
                    raise ValueError(
                        f"Data set '{name}': '{record.get('file_name')}' has category_id = "
                        f"{category!r}, but {what} {num}, so that ids go from 0 to {num - 1}. "
                        "Mend the annotation, or the number of classes."
                    )
    if things is not None and classes is not None and len(things) != classes.num:
        raise ValueError(
            f"{classes.key} = {classes.num}, but dataset '{name}' has {len(things)} class(es): "
            f"{', '.join(things)}. Set the key to {len(things)}."
        )


def check_dataset(
    dicts: list[dict], name: str, classes: Classes | None = None, needs_objects: bool = False
) -> list[dict]:
    """
    Check a data set without opening its images.

    Args:
        dicts: one an image, in Detectron2's format.
        name: of the data set, whose metadata, where it has any, give the classes.
        classes: those of the model, if it is known how many there are.
        needs_objects: whether to refuse a data set in which nothing is labelled.

    Returns:
        The same without boxes of no area, outside the image, of negative size or with values that
        are not finite numbers. They are counted, and the first of them named, in a warning; so are
        images that have only crowds, whose fate is ``DATALOADER.FILTER_EMPTY_ANNOTATIONS``.

    Raises:
        FileNotFoundError: an image is not there.
        ValueError: a category is out of range, or there are no objects; a message says where.
    """
    _check_images(dicts, name)
    if not any("annotations" in record for record in dicts):
        return dicts
    _check_classes(dicts, name, classes)
    dicts = _drop_boxes(dicts, name)
    crowded = []
    num_objects = 0
    for record in dicts:
        crowds = [bool(a.get("iscrowd", 0)) for a in record.get("annotations", [])]
        num_objects += len(crowds) - sum(crowds)
        if crowds and all(crowds):
            crowded.append(f"'{record.get('file_name')}'")
    if crowded:
        logger.warning(
            "Data set '%s': %d image(s) have only crowd boxes, which are no objects to train on: "
            "%s.",
            *(name, len(crowded), _named(crowded)),
        )
    if num_objects == 0 and needs_objects:
        raise ValueError(
            f"Data set '{name}' has {len(dicts)} image(s) but no object to train on. Look at its "
            "annotation file: boxes have to be there, and not all with iscrowd = 1."
        )
    return dicts


@dataclass
class _CheckedDataset:
    """Stands in the catalog for a data set that is checked whenever it is loaded."""

    name: str
    load: Callable[[], Any]
    classes: Classes | None
    needs_objects: bool

    def __call__(self) -> Any:
        file = MetadataCatalog.get(self.name).get("json_file")
        source = f" from '{file}'" if file else ""
        try:
            dicts = self.load()
        except OSError as error:
            if error.errno is None:  # a loader's own words
                raise
            raise type(error)(
                f"Data set '{self.name}' cannot be read{source}: {error}. Put it there, or set the "
                "environment variable DETECTRON2_DATASETS to the folder that has the data sets."
            ) from error
        except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f"Data set '{self.name}' cannot be read{source}: {type(error).__name__}: {error}. "
                "Its annotations may be torn, or of another format: copy them anew."
            ) from error
        if not isinstance(dicts, list):
            return dicts
        return check_dataset(dicts, self.name, self.classes, self.needs_objects)


def check_when_loaded(
    names: Iterable[str], key: str, classes: Classes | None, needs_objects: bool
) -> None:
    """
    Have Detectron2 load data sets through :func:`check_dataset` from now on.

    Args:
        names: of the data sets, the value of the config key ``key``.
        classes, needs_objects: see :func:`check_dataset`.

    Raises:
        ValueError: a name is not registered.
    """
    names = list(names)
    check_registered(key, names)
    for name in names:
        load = DatasetCatalog.pop(name)
        if isinstance(load, _CheckedDataset):
            load = load.load
        DatasetCatalog.register(name, _CheckedDataset(name, load, classes, needs_objects))
