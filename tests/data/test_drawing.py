import numpy as np
import pytest
from PIL import Image

from pisa_d2.data import drawing

datasets = pytest.importorskip("sklearn.datasets")


# Scan, left and upper edge, height and width of the digits of an image.
SCENE = [
    (484, 144, 81, (109, 79)),
    (553, 159, 37, (57, 39)),
    (73, 197, 95, (20, 15)),
    (135, 6, 10, (79, 53)),
    (29, 94, 55, (55, 33)),
    (314, 6, 88, (24, 17)),
]


def place(num_images: int, style: drawing.Style, seed: int = 0) -> list[list[drawing.Digit]]:
    """Place the digits of images."""
    scans, labels = datasets.load_digits(return_X_y=True)
    sources = np.arange(len(labels))
    rng = np.random.default_rng(seed)
    scans = scans.reshape(-1, 8, 8)
    return [drawing.place_digits(scans, sources, rng, style) for _ in range(num_images)]


@pytest.fixture(scope="module")
def scenes() -> list[list[drawing.Digit]]:
    return place(60, drawing.Style())


def iou(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (a, b)]
    return width * height / (sum(areas) - width * height)


def visible_pixels(scene: list[drawing.Digit]) -> list[set[tuple[int, int]]]:
    """Find the (x, y) of each digit's ink that no later digit's ink covers, one by one."""
    visible: list[set[tuple[int, int]]] = []
    for digit in scene:
        rows, columns = (digit.opacity >= drawing.INK).nonzero()
        ink = {*zip((digit.x + columns).tolist(), (digit.y + rows).tolist(), strict=True)}
        visible = [pixels - ink for pixels in visible] + [ink]
    return visible


def test_the_digits_of_the_results_are_drawn_as_ever():
    """The tables of docs/results.md are about these images."""
    (scene,) = place(1, drawing.Style())
    assert [(digit.source, digit.x, digit.y, digit.opacity.shape) for digit in scene] == SCENE


def test_boxes_are_those_of_the_visible_ink(scenes: list[list[drawing.Digit]]):
    for scene in scenes[:20]:
        owner = drawing.topmost(scene)
        for index, pixels in enumerate(visible_pixels(scene)):
            xs, ys = zip(*pixels, strict=True)
            expected = (min(xs), min(ys), max(xs) + 1, max(ys) + 1)
            assert drawing.ink_box(owner == index) == expected


def test_digits_overlap_but_stay_visible(scenes: list[list[drawing.Digit]]):
    overlaps = []
    for scene in scenes:
        boxes = []
        for digit, pixels in zip(scene, visible_pixels(scene), strict=True):
            assert len(pixels) >= drawing.Style.min_visible * (digit.opacity >= drawing.INK).sum()
            xs, ys = zip(*pixels, strict=True)
            boxes.append((min(xs), min(ys), max(xs) + 1, max(ys) + 1))
        overlaps += [iou(a, b) for i, a in enumerate(boxes) for b in boxes[:i]]
    assert max(overlaps) <= drawing.Style.max_iou
    assert sum(overlap > 0.1 for overlap in overlaps) >= 20


def test_sizes_are_small_medium_and_large_and_some_images_empty(
    scenes: list[list[drawing.Digit]],
):
    areas = np.array([digit.opacity.size for scene in scenes for digit in scene])
    assert (areas < 32**2).sum() >= 50
    assert ((areas >= 32**2) & (areas < 96**2)).sum() >= 50
    assert (areas >= 96**2).sum() >= 5
    counts = [len(scene) for scene in scenes]
    assert min(counts) == 0
    assert max(counts) == 9


@pytest.mark.parametrize(("most", "least"), [(1, 1), (2, 1), (9, 3)])
def test_images_have_as_many_digits_as_asked_for(most: int, least: int):
    counts = {len(scene) for scene in place(60, drawing.Style(max_digits=most), seed=1)}
    assert max(counts) == most
    assert {*range(least, most + 1)} <= counts <= {*range(most + 1)}


def test_easy_digits_are_few_large_and_apart():
    scenes = place(60, drawing.EASY)
    assert max(len(scene) for scene in scenes) == 5
    heights, overlaps = [], []
    for scene in scenes:
        boxes = [drawing.ink_box(drawing.topmost(scene) == index) for index in range(len(scene))]
        heights += [y1 - y0 for _, y0, _, y1 in boxes]
        overlaps += [iou(a, b) for i, a in enumerate(boxes) for b in boxes[:i]]
    assert min(heights) >= 32
    assert max(overlaps) <= 0.15


@pytest.fixture(scope="module")
def scan() -> np.ndarray:
    return datasets.load_digits().images[0]


@pytest.mark.parametrize("size", [20, 60, 128])
def test_a_digit_has_its_nominal_height_and_is_cropped_to_its_ink(scan: np.ndarray, size: int):
    opacity = drawing.draw_digit(scan, size, angle=0)
    assert opacity.min() >= 0 and opacity.max() == 1
    ink = opacity >= drawing.INK
    assert all(edge.any() for edge in (ink[0], ink[-1], ink[:, 0], ink[:, -1]))
    # The strokes of this digit fill the 8 rows of its scan, and blur beyond them.
    assert abs(len(opacity) - size) <= 0.1 * size


def test_a_digit_is_rotated_counter_clockwise(scan: np.ndarray):
    stroke = np.zeros((8, 8))
    stroke[:, 4] = 16
    rows, columns = (drawing.draw_digit(stroke, 64, angle=15) >= drawing.INK).nonzero()
    upper, lower = columns[rows < 10].mean(), columns[rows > rows.max() - 10].mean()
    assert upper < lower
    quarter = drawing.draw_digit(scan, 64, angle=90)
    np.testing.assert_array_equal(quarter, np.rot90(drawing.draw_digit(scan, 64, angle=0)))


def test_the_box_of_ink_is_the_smallest_one():
    ink = np.zeros((9, 12), dtype=bool)
    ink[3, 5] = ink[6, 2] = True
    assert drawing.ink_box(ink) == (2, 3, 6, 7)


def test_later_digits_cover_earlier_ones_where_they_have_ink():
    solid, faint = np.ones((10, 20)), np.full((10, 20), drawing.INK / 2)
    digits = [drawing.Digit(0, solid, 5, 7), drawing.Digit(1, solid, 15, 7)]
    digits.append(drawing.Digit(2, faint, 5, 7))
    expected = np.full((192, 256), -1)
    expected[7:17, 5:25] = 0
    expected[7:17, 15:35] = 1
    np.testing.assert_array_equal(drawing.topmost(digits), expected)


@pytest.mark.parametrize("seed", range(8))
def test_a_crop_is_a_part_of_the_photograph_perhaps_mirrored_in_another_light(seed: int):
    columns, rows = np.meshgrid(np.arange(400), np.arange(300))
    ramps = np.stack([columns / 2, rows / 2, np.full_like(rows, 200)], axis=2).astype(np.uint8)
    crop = drawing.crop_photo(Image.fromarray(ramps), np.random.default_rng(seed))
    assert crop.shape == (192, 256, 3) and crop.min() >= 0 and crop.max() <= 255
    light = crop[0, 0, 2] / 200
    assert 0.7 <= light <= 1.2
    # Widths in the photograph from 120 to 240, on the ramp of half a grey level per pixel.
    across, down = (np.ptp(crop[..., i] / light) * 2 for i in range(2))
    assert 110 <= across <= 240 and down == pytest.approx(across * 3 / 4, abs=5)


def test_crops_are_mirrored_in_half_of_the_cases():
    ramp = np.tile(np.arange(256, dtype=np.uint8)[:, None], (256, 1, 3))
    rng, photo = np.random.default_rng(0), Image.fromarray(ramp)
    crops = [drawing.crop_photo(photo, rng) for _ in range(60)]
    mirrored = sum(crop[0, 0, 0] > crop[0, -1, 0] for crop in crops)
    assert 15 <= mirrored <= 45


@pytest.mark.parametrize("grey", [10, 128, 245])
def test_ink_differs_from_its_background_by_the_contrast_of_the_style(grey: int):
    background = np.full((192, 256, 3), grey, dtype=np.float32)
    opacity = np.zeros((20, 30))
    opacity[5:15, 5:25] = 1
    style = drawing.Style(contrasts=(100, 110))
    rng = np.random.default_rng(0)
    signs = set()
    for _ in range(40):
        digits = [drawing.Digit(0, opacity, 40, 50)]
        image = drawing.paint_digits(background, digits, rng, style)
        assert image.dtype == np.uint8 and (background == grey).all()
        change = image.astype(float) - grey
        ink = change[55:65, 45:65].copy()
        assert np.ptp(ink, axis=(0, 1)).max() == 0  # one colour
        change[55:65, 45:65] = 0
        assert not change.any()
        # At least 75 % of a contrast of 100, of which each channel differs by 20 or so.
        assert 40 <= abs(ink.mean()) <= 150
        signs.add(np.sign(ink.mean()))
    assert signs == ({1, -1} if grey == 128 else {1} if grey == 10 else {-1})
