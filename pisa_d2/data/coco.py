"""A reader of COCO's json format that is more tolerant than Detectron2's."""

import json
import logging
import os
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import log_first_n
from pycocotools import mask

from .coco_checks import check_coco
from .mask_checks import MASK_FAULT

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CocoData:
    """
    The contents of a file of COCO annotations.

    Attributes:
        records: one dict per image, in Detectron2's format, sorted by image id.
        classes: names of the categories, sorted by category id.
        class_ids: the contiguous class, from 0, of each category id.
    """

    records: list[dict[str, Any]]
    classes: list[str]
    class_ids: dict[int, int]


def load_coco(json_file: str | os.PathLike, image_root: str | os.PathLike) -> list[dict[str, Any]]:
    """
    Load a COCO json as Detectron2's ``load_coco_json`` does, but also accept annotations whose ids
    are missing, begin at 0 or repeat, ``iscrowd: null``, and ``ignore: 1``.

    Args:
        json_file: the annotations.
        image_root: the folder to which the file names are relative.

    Returns:
        One dict per image in Detectron2's format, with contiguous classes in the order of the
        category ids. Objects marked ``ignore`` are kept and carry ``"ignore": 1``. An object whose
        polygons are all unusable keeps its box. Instead of "segmentation" it has "mask_fault", the
        reason why a model with masks drops it.

    Raises:
        ValueError: the file is not in COCO's format. The message names the entry, see
            :func:`check_coco`.
    """
    return read_coco(json_file, image_root).records


def read_coco(json_file: str | os.PathLike, image_root: str | os.PathLike) -> CocoData:
    """Like :func:`load_coco`, and also return the classes."""
    with PathManager.open(str(json_file), "rb") as file:
        content = json.loads(file.read())  # bytes may have a byte order mark

    def warn(text: str) -> None:
        logger.warning("'%s': %s", json_file, text)

    check_coco(content, str(json_file), masks=False, warn=warn, strict=False)
    categories = sorted(content["categories"], key=lambda category: category["id"])
    class_ids = {category["id"]: i for i, category in enumerate(categories)}
    classes = [category["name"] for category in categories]

    annotations: dict[Any, list[dict]] = defaultdict(list)
    for annotation in content.get("annotations", []):
        annotations[annotation["image_id"]].append(_read_object(annotation, class_ids))
    records = [
        {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": annotations[image["id"]],
        }
        for image in sorted(content["images"], key=lambda image: image["id"])
    ]
    _warn_of_super_categories(json_file, categories, content.get("annotations", []))
    return CocoData(records, classes, class_ids)


def _read_object(annotation: dict[str, Any], class_ids: dict[int, int]) -> dict[str, Any]:
    item: dict[str, Any] = {"bbox_mode": BoxMode.XYWH_ABS}
    if "bbox" in annotation:
        item["bbox"] = annotation["bbox"]
    if "iscrowd" in annotation:
        crowd = annotation["iscrowd"]  # the check of the dataset refuses other values
        item["iscrowd"] = int(crowd or 0) if crowd in (None, 0, 1, "0", "1") else crowd
    if annotation.get("ignore"):
        item["ignore"] = 1
    item["category_id"] = class_ids[annotation["category_id"]]
    if MASK_FAULT in annotation:  # tells check_masks that the mask is faulty, not missing
        item[MASK_FAULT] = annotation[MASK_FAULT]
    shape = annotation.get("segmentation")
    if isinstance(shape, dict):
        compressed = not isinstance(shape["counts"], list)
        item["segmentation"] = shape if compressed else mask.frPyObjects(shape, *shape["size"])
    elif shape:
        item["segmentation"] = [p for p in shape if len(p) % 2 == 0 and len(p) >= 6]
    points = annotation.get("keypoints")
    if points:
        # As in Detectron2, pixel indices become pixel centres. The third number is visibility.
        item["keypoints"] = [v if i % 3 == 2 else v + 0.5 for i, v in enumerate(points)]
    return item


def _warn_of_super_categories(json_file: Any, categories: list[dict], boxes: list[dict]) -> None:
    used = {annotation["category_id"] for annotation in boxes}
    parents = {c.get("supercategory") for c in categories if c.get("supercategory") != c["name"]}
    for category in categories:
        if boxes and category["id"] not in used and category["name"] in parents:
            log_first_n(
                logging.WARNING,
                f"'{json_file}': category {category['name']!r} (id {category['id']}) is the "
                "supercategory of others and has no box. It stays a class, which is harmless; to "
                'get rid of it, remove it from "categories" in the files of all splits.',
                name=__name__,
                key="message",
            )
