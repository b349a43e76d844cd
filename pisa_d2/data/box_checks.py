"""Checks of the boxes of a dataset in Detectron2's format."""

import contextlib
import math
from array import array
from itertools import chain
from numbers import Real
from typing import Any

import numpy as np
from detectron2.structures import BoxMode

from .messages import Warn, named
from .objects import Objects

# Faults that make a box unusable; messages name the first one that applies.
_BOX_FAULTS = (
    "is not four numbers",
    "is not finite",
    "has a negative size",
    "has no area",
    "lies outside the image",
)
# Implausible boxes are reported if they are at least this share of all.
_CONSPICUOUS = 0.05
# A different reading of the boxes is proposed if it fits this share of them.
_FITTING = 0.95
_MODES = (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)


def _four_numbers(box: Any) -> list[float] | None:
    try:
        numbers = [float(value) for value in box if isinstance(value, Real)]
    except OverflowError:
        return [math.inf] * 4
    except TypeError:
        return None
    return numbers if len(numbers) == 4 == len(box) else None


def _as_array(boxes: list) -> tuple[np.ndarray, np.ndarray]:
    """
    Convert boxes to an array.

    Returns:
        float64 (N, 4), NaN for boxes that are not four numbers; bool (N,), which boxes are.
    """
    with contextlib.suppress(TypeError, OverflowError):
        if set(map(len, boxes)) <= {4}:
            numbers = array("d", chain.from_iterable(boxes))  # several times faster than np.array
            return np.array(numbers).reshape(-1, 4), np.ones(len(boxes), dtype=bool)
    fours = [_four_numbers(box) for box in boxes]
    filled = [four or [math.nan] * 4 for four in fours]
    valid = np.array([four is not None for four in fours], dtype=bool)
    return np.array(filled, dtype=np.float64).reshape(-1, 4), valid


def _modes(objects: Objects) -> np.ndarray:
    modes = objects.modes
    if modes and modes.count(modes[0]) == len(modes):  # faster than converting each enum
        return np.full(len(modes), int(modes[0]))
    return np.array([int(mode) for mode in modes], dtype=np.int64)


def _find_faults(boxes: np.ndarray, xywh: np.ndarray, images: np.ndarray) -> list[np.ndarray]:
    """For each of :data:`_BOX_FAULTS` except the first, find the boxes that have it."""
    with np.errstate(invalid="ignore", over="ignore"):
        sizes = np.where(xywh[:, None], boxes[:, 2:], boxes[:, 2:] - boxes[:, :2])
        ends = boxes[:, :2] + sizes
        return [
            ~np.isfinite(boxes).all(axis=1),
            (sizes < 0).any(axis=1),
            (sizes == 0).any(axis=1),
            (ends <= 0).any(axis=1) | (boxes[:, :2] >= images).any(axis=1),
        ]


def check_boxes(objects: Objects, warn: Warn) -> Objects:
    """
    Check all boxes except rotated ones and ones with relative coordinates.

    Returns:
        The objects without unusable boxes, which a warning counts and names. Another warning shows
        an example if boxes seem to be fractions of the image's size, corners or centres against
        their mode, or to belong to images of a different size.
    """
    boxes, valid = _as_array(objects.boxes)
    images, mode = objects.sizes(), _modes(objects)
    known, xywh = np.isin(mode, _MODES), mode == BoxMode.XYWH_ABS
    faults = np.select(
        [~known, ~valid, *_find_faults(boxes, xywh, images)],
        [-1, *range(len(_BOX_FAULTS))],
        default=-1,
    )
    usable = faults < 0
    bad = np.flatnonzero(~usable).tolist()
    if bad:
        texts = [
            f"{objects.annotations[i]['bbox']} of {objects.file(i)} {_BOX_FAULTS[faults[i]]}"
            if "bbox" in objects.annotations[i]
            else f"an annotation of {objects.file(i)} has no bbox"
            for i in bad
        ]
        warn(f"dropped {len(bad)} of {len(boxes)} box(es) as unusable: {named(texts)}.")
    checked = np.flatnonzero(usable & known & np.isfinite(images).all(axis=1))
    found = _find_implausible(boxes[checked], xywh[checked], images[checked])
    if found is not None:
        which, fact, advice = found
        i = int(checked[np.argmax(which)])
        box = [float(f"{value:g}") for value in boxes[i]]
        warn(
            f"{which.sum()} of {len(which)} boxes {fact}, such as {box} of {objects.file(i)}, "
            f"which is {images[i, 0]:g} x {images[i, 1]:g}. {advice}"
        )
    return objects.keep(usable) if bad else objects


def _find_implausible(
    boxes: np.ndarray, xywh: np.ndarray, images: np.ndarray
) -> tuple[np.ndarray, str, str] | None:
    """Find implausible boxes. Return which these are, their fault and their likely meaning."""
    if len(boxes) == 0:
        return None
    tiny = np.all((boxes >= 0) & (boxes <= 1) & (images > 2).all(axis=1, keepdims=True), axis=1)
    if tiny.mean() >= _FITTING:
        advice = (
            "They seem to be fractions of the image's size, but pixels are expected: multiply them "
            "by width and height."
        )
        return tiny, "lie between 0 and 1", advice
    starts, others = boxes[:, :2], boxes[:, 2:]
    outside = np.any(np.where(xywh[:, None], starts + others, others) > images + 1, axis=1)
    if outside.mean() < _CONSPICUOUS:
        return None
    readings = {
        "corners [x1, y1, x2, y2]": (starts, others),
        "centres [x, y, width, height]": (starts - others / 2, starts + others / 2),
    }
    advice = "They are clipped to the image. Do they belong to images of a different size?"
    for name, (first, last) in readings.items():
        # With an area and inside the image, up to a pixel of rounding.
        fits = np.all((first < last) & (first >= -1) & (last <= images + 1), axis=1)
        if xywh.all() and fits.mean() >= _FITTING:
            advice = (
                f"Read as {name}, {fits.sum()} of them fit into their image, so that is probably "
                "what they are. COCO's boxes are [left, top, width, height]: convert them."
            )
            break
    return outside, "extend beyond the right or lower edge of their image", advice
