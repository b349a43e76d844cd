"""
BCCD, 364 photographs of blood cells (https://github.com/Shenggan/BCCD_Dataset, MIT licence), in the
layout of Pascal VOC, as ``bccd_train``, ``bccd_val``, ``bccd_trainval`` and ``bccd_test``.
"""

import functools
import logging
import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from detectron2.data.datasets.pascal_voc import load_voc_instances

from .catalog import register_dataset

logger = logging.getLogger(__name__)

CLASSES = ("RBC", "WBC", "Platelets")
SPLITS = ("train", "val", "trainval", "test")


def load_bccd(folder: str | os.PathLike, split: str) -> list[dict[str, Any]]:
    """
    Load a split of BCCD.

    Args:
        folder: the folder with "Annotations", "ImageSets" and "JPEGImages".
        split: "train", "val", "trainval" or "test".

    Returns:
        One dict per image in Detectron2's format. Boxes without area (two in the real data) mark no
        cell and are left out, with a warning.

    Raises:
        FileNotFoundError: the dataset or one of its files is missing.
        ValueError: an annotation file cannot be parsed. The message names it.
    """
    folder = Path(folder)
    image_set = folder / "ImageSets" / "Main" / f"{split}.txt"
    if not image_set.is_file():
        raise FileNotFoundError(
            f"'{image_set}' is missing. Put BCCD into '{folder}', or set the environment variable "
            "DETECTRON2_DATASETS to the folder that contains BCCD. The expected files are "
            "BCCD/Annotations/*.xml, BCCD/ImageSets/Main/{train,val,trainval,test}.txt and "
            "BCCD/JPEGImages/*.jpg."
        )
    try:
        records = load_voc_instances(str(folder), split, CLASSES)
    except (ElementTree.ParseError, AttributeError, IndexError, TypeError, ValueError):
        # The loader's own error does not name the file.
        for image_id in image_set.read_text().split():
            _check_annotation(folder / "Annotations" / f"{image_id}.xml")
        raise

    dropped = []
    for record in records:
        record["image_id"] = str(record["image_id"])  # a checkpoint cannot load NumPy's str
        boxes = [a for a in record["annotations"] if _has_area(a["bbox"])]
        dropped += [f"{record['image_id']}.xml"] * (len(record["annotations"]) - len(boxes))
        record["annotations"] = boxes
    if dropped:
        logger.warning(
            "Dropped %d box(es) without area, in %s of '%s'.",
            len(dropped),
            ", ".join(dropped),
            folder / "Annotations",
        )
    return records


def _has_area(box: list[float]) -> bool:
    # The loader subtracts 1 from xmin and ymin, so a box with xmin = xmax in the file is 1 wide.
    return box[2] - box[0] > 1 and box[3] - box[1] > 1


def _check_annotation(path: Path) -> None:
    try:
        root = ElementTree.parse(path).getroot()
        for length in ("height", "width"):
            int(root.findtext(f"size/{length}", f"no {length}"))
        for item in root.iter("object"):
            CLASSES.index(item.findtext("name", "no name"))
            for side in ("xmin", "ymin", "xmax", "ymax"):
                float(item.findtext(f"bndbox/{side}", f"no {side}"))
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(
            f"'{path}' is not a Pascal VOC annotation of the classes {', '.join(CLASSES)} "
            f"({error}). It may be corrupt: copy or download it again."
        ) from error


def register_bccd(root: str | os.PathLike, replace: bool = True) -> None:
    """
    Register the four splits, which are read from ``<root>/BCCD`` when they are loaded. Registered
    names are replaced, or kept with ``replace=False``.
    """
    folder = Path(root).expanduser() / "BCCD"
    for split in SPLITS:
        register_dataset(
            f"bccd_{split}",
            functools.partial(load_bccd, folder, split),
            replace,
            thing_classes=list(CLASSES),
            evaluator_type="coco",
        )
