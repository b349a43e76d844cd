import numpy as np
import pytest
from detectron2.structures import BoxMode

from pisa_d2.data.box_checks import check_boxes
from pisa_d2.data.objects import Objects

XYWH, XYXY = BoxMode.XYWH_ABS, BoxMode.XYXY_ABS


@pytest.fixture
def boxes():
    """Make 200 boxes inside images of 100 x 80, as left, top, width and height."""
    rng = np.random.default_rng(0)
    start = rng.uniform(0, 60, (200, 2)).round(1)
    size = (rng.uniform(0.05, 1, (200, 2)) * (np.array([100, 80]) - start)).round(1)
    return np.hstack([start, size])


def warnings_of(boxes, mode=XYWH):
    annotations = [{"bbox": box, "bbox_mode": mode, "category_id": 0} for box in boxes.tolist()]
    dicts = [
        {"file_name": f"{i}.jpg", "width": 100, "height": 80, "annotations": [annotation]}
        for i, annotation in enumerate(annotations)
    ]
    warnings = []
    checked = check_boxes(Objects(dicts), warnings.append)
    assert checked.dicts == dicts  # only a warning, no change
    return warnings


def corners(boxes):
    return np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])


def test_good_boxes_are_not_mentioned(boxes):
    assert warnings_of(boxes) == warnings_of(corners(boxes), XYXY) == []


def test_boxes_over_the_whole_image_are_not_mentioned():
    whole = np.tile([0.0, 0, 100, 80], (20, 1))
    assert warnings_of(whole) == warnings_of(whole, XYXY) == []


def test_a_few_boxes_over_the_edge_are_not_mentioned(boxes):
    boxes[:9, 2] = 150
    assert warnings_of(boxes) == []
    boxes[:10, 2] = 150
    (warning,) = warnings_of(boxes)
    assert warning.startswith("10 of 200 boxes extend beyond the right or lower edge")
    assert "a different size" in warning


@pytest.mark.parametrize(
    ("convert", "expected"),
    [
        (corners, "Read as corners [x1, y1, x2, y2], 200 of them fit"),
        (
            lambda b: np.hstack([b[:, :2] + b[:, 2:] / 2, b[:, 2:]]),
            "Read as centres [x, y, width, height], 200 of them fit",
        ),
        (lambda b: 4 * b, "Do they belong to images of a different size?"),
    ],
)
def test_boxes_of_another_meaning_are_shown_with_evidence(boxes, convert, expected):
    converted = convert(boxes)
    converted = converted[(converted[:, 0] < 100) & (converted[:, 1] < 80)]
    expected = expected.replace("200", str(len(converted)))
    (warning,) = warnings_of(converted)
    outside = (converted[:, :2] + converted[:, 2:] > np.array([101, 81])).any(axis=1)
    first = int(np.argmax(outside))
    assert warning.startswith(f"{outside.sum()} of {len(converted)} boxes extend beyond the right")
    assert f"of '{first}.jpg', which is 100 x 80" in warning
    assert expected in warning


def test_fractions_of_the_image_are_shown(boxes):
    (warning,) = warnings_of(boxes / np.array([100, 80, 100, 80]))
    assert warning.startswith("200 of 200 boxes lie between 0 and 1, such as [0.")
    assert "of '0.jpg', which is 100 x 80" in warning and "multiply them by width" in warning


def test_a_tiny_image_may_have_boxes_of_a_pixel():
    record = {"file_name": "a.png", "width": 2, "height": 2}
    annotation = {"bbox": [0, 0, 1, 1], "bbox_mode": XYWH}
    warnings = []
    check_boxes(Objects([{**record, "annotations": [annotation]}]), warnings.append)
    assert warnings == []
