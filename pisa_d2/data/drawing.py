"""
Drawing of the images of the digits datasets: the place, the visible part and the ink of digits.

Shapes and units in this module:

    H, W: 192, 256, height and width of an image in pixels
    h, w: height and width of a drawn digit in pixels
    box: x0, y0, x1, y1, its corners in pixels, so that x1 - x0 is the width
    opacity: 0 (no ink) to 1
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 256, 192

INK = 0.25  # opacity from which a pixel counts as ink, for boxes and for visibility

_CROP_WIDTHS = (120, 240)  # columns of a photograph that are resized to W
_EMPTY = 0.04  # share of images without digits


@dataclass(frozen=True)
class Style:
    """
    The look of a dataset's digits. By default they range from COCO's small to its large objects,
    partly over one another, some of them faint.

    Attributes:
        max_digits: the largest number to place in an image, which may not have room for all.
        sizes: the range of the nominal height of a digit, in pixels.
        contrasts: the range of the grey levels between the ink and the mean of its background.
        min_visible: the least share of a digit's ink that others do not cover.
        max_iou: the largest IoU of two digits' boxes.
    """

    max_digits: int = 9
    sizes: tuple[int, int] = (20, 128)
    contrasts: tuple[int, int] = (90, 190)
    min_visible: float = 0.7
    max_iou: float = 0.4


EASY = Style(max_digits=5, sizes=(44, 112), contrasts=(120, 220), min_visible=0.9, max_iou=0.15)


@dataclass(frozen=True)
class Digit:
    """
    A digit and its place.

    Attributes:
        source: its index in ``load_digits``.
        opacity: (h, w) float, cropped to the ink.
        x, y: its left and upper edge in the image, in pixels.
    """

    source: int
    opacity: np.ndarray
    x: int
    y: int

    @property
    def window(self) -> tuple[slice, slice]:
        """Return the rows and columns of the image that it is drawn on."""
        height, width = self.opacity.shape
        return slice(self.y, self.y + height), slice(self.x, self.x + width)


def draw_digit(scan: np.ndarray, size: float, angle: float) -> np.ndarray:
    """
    Enlarge and rotate a scan.

    Args:
        scan: (8, 8), ink from 0 to 16.
        size: height of the 8 rows in pixels.
        angle: degrees, counter-clockwise.

    Returns:
        (h, w) opacity, cropped to the ink.
    """
    padded = np.pad(scan, 1)  # strokes reach the edge and need room to fade out
    side = round(size * len(padded) / len(scan))
    image = Image.fromarray((padded * (255 / 16)).astype(np.uint8))
    image = image.resize((side, side), Image.Resampling.BICUBIC)
    image = image.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    # Enlarging 8 pixels to 100 gives blurred blobs; a steeper ramp gives them sharp edges.
    opacity = np.clip((np.asarray(image, dtype=np.float32) / 255 - 0.3) / 0.4, 0, 1)
    x0, y0, x1, y1 = ink_box(opacity >= INK)
    return opacity[y0:y1, x0:x1]


def ink_box(ink: np.ndarray) -> tuple[int, int, int, int]:
    """Return the smallest box around the true pixels of ``ink``, of which there must be some."""
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def topmost(digits: list[Digit]) -> np.ndarray:
    """
    Find the digit that is seen at each pixel. Later digits cover earlier ones.

    Returns:
        (H, W) int: its index in ``digits``, -1 for none.
    """
    owner = np.full((HEIGHT, WIDTH), -1)
    for index, digit in enumerate(digits):
        owner[digit.window][digit.opacity >= INK] = index
    return owner


def _is_legible(digits: list[Digit], style: Style) -> bool:
    owner = topmost(digits)
    boxes = []
    for index, digit in enumerate(digits):
        visible = owner[digit.window] == index
        if visible.sum() < style.min_visible * (digit.opacity >= INK).sum():
            return False
        boxes.append(np.add(ink_box(visible), (digit.x, digit.y) * 2))
    return all(_iou(a, b) <= style.max_iou for i, a in enumerate(boxes) for b in boxes[:i])


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    intersection = np.prod(np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None))
    union = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - intersection
    return intersection / union


def place_digits(
    scans: np.ndarray,
    sources: np.ndarray,
    rng: np.random.Generator,
    style: Style,
) -> list[Digit]:
    """
    Place random digits in an image, all inside it and none mostly covered.

    Args:
        scans: (1797, 8, 8), ink from 0 to 16.
        sources: indices of the scans to choose from.
        style: its ``max_digits`` also sets the smallest number: a third of it, rounded down, but
            at least 1.

    Returns:
        The digits, the lowest layer first.
    """
    digits: list[Digit] = []
    if rng.random() < _EMPTY:
        return digits
    count = rng.integers(max(style.max_digits // 3, 1), style.max_digits, endpoint=True)
    for source in rng.choice(sources, count):
        size = np.exp(rng.uniform(*np.log(style.sizes)))  # as many of 20 to 40 as of 40 to 80
        opacity = draw_digit(scans[source], size, angle=rng.uniform(-15, 15))
        height, width = opacity.shape
        for _ in range(20):
            x = int(rng.integers(WIDTH - width, endpoint=True))
            y = int(rng.integers(HEIGHT - height, endpoint=True))
            candidate = [*digits, Digit(int(source), opacity, x, y)]
            if _is_legible(candidate, style):
                digits = candidate
                break
    return digits


def crop_photo(photo: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """
    Crop a random part of a photograph, possibly mirrored, and make it darker or brighter.

    Returns:
        (H, W, 3) float, 0..255.
    """
    width = int(rng.integers(*_CROP_WIDTHS, endpoint=True))
    height = round(width * HEIGHT / WIDTH)
    x = int(rng.integers(photo.width - width, endpoint=True))
    y = int(rng.integers(photo.height - height, endpoint=True))
    crop = photo.resize(
        (WIDTH, HEIGHT), Image.Resampling.BICUBIC, box=(x, y, x + width, y + height)
    )
    pixels = np.asarray(crop, dtype=np.float32) * rng.uniform(0.7, 1.2)
    return np.clip(pixels[:, ::-1] if rng.random() < 0.5 else pixels, 0, 255)


def paint_digits(
    background: np.ndarray, digits: list[Digit], rng: np.random.Generator, style: Style
) -> np.ndarray:
    """
    Paint digits over a background in dark or light ink, some of them faint.

    Args:
        background: (H, W, 3) float, 0..255.

    Returns:
        (H, W, 3) uint8.
    """
    image = background.copy()
    for digit in digits:
        below = image[digit.window]
        mean = below.mean()
        contrast = rng.uniform(*style.contrasts) * rng.choice([-1, 1])
        if not 0 <= mean + contrast <= 255:
            contrast = -contrast  # light ink on a light sky would not show
        colour = np.clip(mean + contrast + rng.normal(0, 20, size=3), 0, 255)
        opacity = digit.opacity[:, :, None] * rng.uniform(0.75, 1)
        image[digit.window] = below * (1 - opacity) + colour * opacity
    return image.round().astype(np.uint8)
