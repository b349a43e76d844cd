"""Boxes drawn on an image."""

from collections.abc import Iterable
from itertools import repeat
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke


def show_image(axes: Axes, image: np.ndarray, alpha: float = 0.5) -> None:
    """
    Args:
        image: uint8 (H, W, 3), RGB.
        alpha: 1 for full colours; less lets the boxes stand out.
    """
    axes.imshow(image, alpha=alpha)
    axes.set_axis_off()
    axes.set_xlim(0, image.shape[1])
    axes.set_ylim(image.shape[0], 0)


def draw_regions(axes: Axes, boxes: np.ndarray) -> None:
    """
    Hatch regions to ignore.

    Args:
        boxes: (M, 4), XYXY in pixels.
    """
    for x0, y0, x1, y1 in boxes:
        size = (x1 - x0, y1 - y0)
        axes.add_patch(Rectangle((x0, y0), *size, fill=False, ec="0.25", lw=0.8, hatch="///"))


def draw_boxes(
    axes: Axes,
    boxes: np.ndarray,
    colors: Iterable[Any],
    widths: Iterable[float] = repeat(1.1),
    style: str = "-",
) -> None:
    """
    Args:
        boxes: (N, 4), XYXY in pixels; the last is on top.
        colors, widths: of each box, N or more.
    """
    for (x0, y0, x1, y1), color, width in zip(boxes, colors, widths, strict=False):
        axes.add_patch(
            Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ec=color, lw=width, ls=style)
        )


def label_box(
    axes: Axes, box: np.ndarray, shape: tuple[int, ...], text: str, color: Any, fontsize: int = 9
) -> None:
    """
    Write a text above a box, or inside it at the upper border of the image.

    Args:
        box: (4,), XYXY in pixels.
        shape: of the image, height first: the text stays inside.
    """
    x0, y, x1, _ = box
    at_right = x0 > 0.6 * shape[1]
    axes.text(
        *(min(x1, shape[1]) if at_right else max(x0, 0), max(y, 0)),
        text,
        parse_math=False,
        ha="right" if at_right else "left",
        color=color,
        fontsize=fontsize,
        fontweight="bold",
        va="top" if y < 0.05 * shape[0] else "bottom",
        path_effects=[withStroke(linewidth=3, foreground="white")],
    )
