"""Reads annotations in COCO's json format, more tolerantly than Detectron2's own loader."""

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

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CocoData:
    """
    A file of COCO annotations.

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
        image_root: the folder that its file names are relative to.

    Returns:
        One dict per image in Detectron2's format, with contiguous classes in the order of the
        category ids. Objects marked ``ignore`` are kept and carry ``"ignore": 1``. An object whose
        polygons are all unusable keeps its box and has no "segmentation".

    Raises:
        ValueError: the file is not in COCO's format; the message says where.
    """
    return read_coco(json_file, image_root).records


def read_coco(json_file: str | os.PathLike, image_root: str | os.PathLike) -> CocoData:
    """Like :func:`load_coco`, and also return the classes."""
    with PathManager.open(str(json_file), "rb") as file:
        content = json.loads(file.read())  # of bytes: with or without a byte order mark
    for part in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(part), list):
            raise ValueError(f"it has no list of {part!r}, as COCO's format does")
    categories = sorted(content["categories"], key=lambda category: category["id"])
    class_ids = {category["id"]: i for i, category in enumerate(categories)}
    classes = [category["name"] for category in categories]
    if len(class_ids) < len(categories):
        raise ValueError("several of its categories have the same id")

    images = sorted(content["images"], key=lambda image: image["id"])
    annotations: dict[Any, list[dict]] = defaultdict(list)
    for annotation in content["annotations"]:
        annotations[annotation["image_id"]].append(annotation)
    records, bad_polygons = [], 0
    for image in images:
        record = {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
        }
        objects = [_read_object(a, class_ids) for a in annotations.pop(image["id"], [])]
        bad_polygons += sum("segmentation" in o and not o["segmentation"] for o in objects)
        for item in objects:
            if not item.get("segmentation", True):
                del item["segmentation"]
        records.append({**record, "annotations": objects})
    if len({record["image_id"] for record in records}) < len(records):
        raise ValueError("several of its images have the same id")

    _warn(json_file, bad_polygons, sum(map(len, annotations.values())))
    _warn_of_super_categories(json_file, categories, content["annotations"])
    return CocoData(records, classes, class_ids)


def _read_object(annotation: dict[str, Any], class_ids: dict[int, int]) -> dict[str, Any]:
    item: dict[str, Any] = {"bbox_mode": BoxMode.XYWH_ABS}
    if "bbox" in annotation:
        item["bbox"] = annotation["bbox"]
    if "iscrowd" in annotation:
        item["iscrowd"] = int(bool(annotation["iscrowd"]))
    if annotation.get("ignore"):
        item["ignore"] = 1
    category = annotation["category_id"]
    if category not in class_ids:
        raise ValueError(
            f"an annotation of image {annotation['image_id']!r} has category_id={category!r}, "
            'which "categories" does not list'
        )
    item["category_id"] = class_ids[category]
    shape = annotation.get("segmentation")
    if isinstance(shape, dict):
        compressed = not isinstance(shape["counts"], list)
        item["segmentation"] = shape if compressed else mask.frPyObjects(shape, *shape["size"])
    elif shape:
        item["segmentation"] = [p for p in shape if len(p) % 2 == 0 and len(p) >= 6]
    points = annotation.get("keypoints")
    if points:
        # Pixel indices, as in Detectron2: their centres are 0.5 further. The third is visibility.
        item["keypoints"] = [v if i % 3 == 2 else v + 0.5 for i, v in enumerate(points)]
    return item


def _warn(json_file: Any, bad_polygons: int, strays: int) -> None:
    if bad_polygons:
        logger.warning(
            "'%s': %d object(s) have no polygon of at least 3 points; their boxes are used.",
            *(json_file, bad_polygons),
        )
    if strays:
        logger.warning(
            "'%s': ignored %d annotation(s) whose image_id is not listed in its images.",
            *(json_file, strays),
        )


def _warn_of_super_categories(json_file: Any, categories: list[dict], boxes: list[dict]) -> None:
    used = {annotation["category_id"] for annotation in boxes}
    parents = {c.get("supercategory") for c in categories if c.get("supercategory") != c["name"]}
    for category in categories:
        if boxes and category["id"] not in used and category["name"] in parents:
            log_first_n(
                logging.WARNING,
                f"'{json_file}': category {category['name']!r} (id {category['id']}) is the "
                "supercategory of others and has no box. It stays a class, which is harmless; to "
                'do without it, remove it from "categories" in the files of all splits.',
                name=__name__,
                key="message",
            )
