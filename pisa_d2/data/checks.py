"""
Validation of datasets before training. Detectron2's loader would ignore these faults, or fail hours
later without naming a file.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from .box_checks import check_boxes
from .coco_checks import AnnotationError, checking_coco
from .formats import describe_unreadable
from .image_checks import check_images
from .mask_checks import check_keypoints, check_masks
from .messages import Warn
from .needs import Classes, Needs
from .objects import Objects
from .record_checks import (
    check_classes,
    check_has_objects,
    check_keypoint_names,
    describe_regions,
    with_known_crowds,
    with_whole_sizes,
)
from .registered import check_registered

__all__ = ["Classes", "Needs", "check_dataset", "check_when_loaded", "usable_boxes"]

logger = logging.getLogger(__name__)


def check_dataset(
    dicts: list[dict], name: str, needs: Needs | None = None, warn: Warn | None = None
) -> list[dict]:
    """
    Check a dataset. Only the headers of its images are read.

    Args:
        dicts: one dict per image, in Detectron2's format.
        name: the name of the dataset; its metadata may have the classes.
        needs: the requirements of the model.
        warn: called with each warning, without the dataset's name; logs it by default.

    Returns:
        The dataset without its unusable parts: boxes without area, outside the image, of negative
        size, or not of four finite numbers; objects without a usable mask, if the model needs one;
        damaged images, unless the dataset is for evaluation. A warning counts them and names the
        first ones.

    Raises:
        FileNotFoundError: images are missing.
        ValueError: a different fault makes the dataset unusable. Messages name the dataset, the
            file, the value and the fix.
    """
    needs = needs or Needs()

    def log(text: str) -> None:
        logger.warning("Dataset '%s': %s", name, text)

    warn = warn or log
    if not dicts:
        raise ValueError(f"Dataset '{name}' has no images: check its annotation file.")
    dicts = with_whole_sizes(dicts, name)
    dicts = check_images(dicts, name, needs.reading, warn)
    if not any("annotations" in record for record in dicts):
        return dicts
    objects = Objects(dicts)
    check_classes(objects, name, needs)
    objects = check_boxes(with_known_crowds(objects, name), warn)
    # Other evaluators use only boxes.
    if needs.train or MetadataCatalog.get(name).get("evaluator_type") == "coco":
        if needs.masks is not None:
            objects = check_masks(objects, name, needs.masks if needs.train else None, warn)
        if needs.keypoints:
            check_keypoints(objects, name, needs.keypoints)
    check_has_objects(objects, name, needs, warn)
    if needs.train and (line := describe_regions(objects, needs.ignores_regions)):
        logger.info("Dataset '%s': %s", name, line)
    return objects.dicts


def usable_boxes(dicts: list[dict]) -> list[dict]:
    """Return a dataset without the boxes that :func:`check_dataset` drops."""
    return check_boxes(Objects(dicts), lambda text: None).dicts


@dataclass
class _CheckedDataset:
    """A dataset in the catalog that is checked whenever it is loaded."""

    name: str
    load: Callable[[], Any]
    needs: Needs
    said: set[str] = field(default_factory=set)

    def warn(self, text: str) -> None:
        """Log a warning once, though each evaluation loads its dataset again."""
        if text not in self.said:
            self.said.add(text)
            logger.warning("Dataset '%s': %s", self.name, text)

    def __call__(self) -> Any:
        file = MetadataCatalog.get(self.name).get("json_file")
        source = f" from '{file}'" if file else ""
        try:
            with checking_coco(file or "", self.needs.masks is not None, self.warn):
                dicts = self.load()
        except AnnotationError as error:
            place = f" ('{file}')" if file else ""
            raise ValueError(f"Dataset '{self.name}'{place}: {error}") from None
        except OSError as error:
            if error.errno is None:  # the loader's own message
                raise
            raise type(error)(
                f"Dataset '{self.name}' cannot be read{source}: {error}. Put it there, or set the "
                "environment variable DETECTRON2_DATASETS to the folder of the datasets."
            ) from error
        except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
            known = describe_unreadable(file) if file else None
            raise ValueError(
                f"Dataset '{self.name}' cannot be read{source}, which {known}."
                if known
                else f"Dataset '{self.name}' cannot be read{source}: {type(error).__name__}: "
                f"{error}. Its annotations do not seem to be in the format that its loader expects."
            ) from error
        if not isinstance(dicts, list):
            return dicts
        return check_dataset(dicts, self.name, self.needs, self.warn)


def check_when_loaded(names: Iterable[str], key: str, needs: Needs) -> None:
    """
    Make Detectron2 load datasets through :func:`check_dataset` from now on.

    Args:
        names: the names of the datasets, the value of the config key ``key``.
        needs: see :func:`check_dataset`.

    Raises:
        ValueError: a name is not registered, or its dataset does not name its keypoints, which the
            model needs.
    """
    names = list(names)
    check_registered(key, names)
    for name in names:
        if needs.train and needs.keypoints:
            check_keypoint_names(name, needs.keypoints)
        load = DatasetCatalog.pop(name)
        if isinstance(load, _CheckedDataset):
            load = load.load
        DatasetCatalog.register(name, _CheckedDataset(name, load, needs))
