"""Checks of the masks and keypoints of a dataset in Detectron2's format."""

import math
from typing import Any

import numpy as np

from .messages import Warn, named
from .objects import Objects

# The key of an annotation with the reason why it was loaded without its mask.
MASK_FAULT = "mask_fault"


def segmentation_fault(segmentation: Any) -> str | None:
    """
    Find the fault of a mask. A usable mask is a list of polygons, at least one with three points; a
    run-length code; or an array.

    Returns:
        The fault, or None for a usable mask.
    """
    if isinstance(segmentation, dict):
        return None if {"counts", "size"} <= segmentation.keys() else "has no counts and size"
    if not isinstance(segmentation, list):
        return None if isinstance(segmentation, np.ndarray) else "is not polygons or a mask"
    try:
        long = [polygon for polygon in segmentation if len(polygon) >= 6 and len(polygon) % 2 == 0]
        finite = all(math.isfinite(sum(polygon)) for polygon in long)
    except TypeError:
        return "has no list of polygons of numbers, [[x1, y1, x2, y2, x3, y3, ...], ...]"
    if not long:
        return "has no polygon of at least three points (six numbers)"
    return None if finite else "has a polygon that is not finite"


def check_masks(objects: Objects, name: str, mask_format: str | None, warn: Warn) -> Objects:
    """
    Check the masks of all objects that are not crowds.

    Args:
        mask_format: ``INPUT.MASK_FORMAT`` for training; None for evaluation, which reads all
            formats.

    Returns:
        The usable objects. Objects whose polygons have fewer than three points are dropped, and a
        warning names them.

    Raises:
        ValueError: objects have no mask, or a mask of the wrong format or size.
    """
    wanted = [i for i, crowd in enumerate(objects.crowds) if not crowd]
    masks: list[Any] = [annotation.get("segmentation") for annotation in objects.annotations]
    faults = {i: objects.annotations[i].get(MASK_FAULT) for i in wanted}
    without = [i for i in wanted if not faults[i] and (masks[i] is None or len(masks[i]) == 0)]
    if without:
        files = list(dict.fromkeys(objects.file(i) for i in without))
        some = "none" if len(without) == len(wanted) else f"{len(wanted) - len(without)}"
        raise ValueError(
            f"Dataset '{name}': {some} of {len(wanted)} objects have a mask ('segmentation'), but "
            f"the model needs one for each: missing in {named(files)}. "
            "Add the masks, or set MODEL.MASK_ON False to train on boxes alone."
        )
    coded = [i for i in wanted if not faults[i] and not isinstance(masks[i], list)]
    if coded and mask_format == "polygon":
        raise ValueError(
            f"Dataset '{name}': {len(coded)} of {len(wanted)} masks are not polygons, such as in "
            f"{objects.file(coded[0])}, but INPUT.MASK_FORMAT is 'polygon'. Set "
            "INPUT.MASK_FORMAT bitmask, which reads polygons too."
        )
    sizes = objects.sizes()
    for i in coded:
        if not isinstance(masks[i], dict) or "size" not in masks[i]:
            continue
        width, height = sizes[i]
        if math.isfinite(width) and list(masks[i]["size"]) != [height, width]:
            raise ValueError(
                f"Dataset '{name}': a mask of {objects.file(i)} has size "
                f"{list(masks[i]['size'])}, but the image has [height, width] = "
                f"[{height:g}, {width:g}]. Correct the mask or the image's size."
            )
    faults = {i: fault or segmentation_fault(masks[i]) for i, fault in faults.items()}
    bad = [f"a mask of {objects.file(i)} {fault}" for i, fault in faults.items() if fault]
    if not bad:
        return objects
    warn(f"dropped {len(bad)} object(s) without a usable mask: {named(bad)}.")
    kept = np.array([not faults.get(i) for i in range(len(masks))], dtype=bool)
    return objects.keep(kept)


def check_keypoints(objects: Objects, name: str, num: int) -> None:
    """
    Check the number of keypoints of each object.

    Args:
        num: the number per object, ``MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS``.

    Raises:
        ValueError: an object has a different number.
    """
    for i, annotation in enumerate(objects.annotations):
        keypoints = annotation.get("keypoints") or []
        if not annotation.get("iscrowd", 0) and len(keypoints) != 3 * num:
            raise ValueError(
                f"Dataset '{name}': an object of {objects.file(i)} has {len(keypoints)} keypoint "
                f"numbers instead of {3 * num}: x, y and visibility of each of the "
                f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = {num}. Correct the number or the "
                "annotations, or set MODEL.KEYPOINT_ON False to train on boxes alone."
            )
