import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from pycocotools import mask as mask_util

from pisa_d2.data.checks import Needs, check_dataset

NAME = "masked_for_tests"
SQUARE = [[10, 10, 30, 10, 30, 30, 10, 30]]
ARRAY = np.pad(np.ones((20, 20), dtype=np.uint8), ((10, 50), (10, 70)))
CODE = mask_util.encode(np.asfortranarray(ARRAY))


def dataset(*masks, **others):
    """Make an image for each list of masks; None is an object without a mask."""
    dicts = []
    for i, of_image in enumerate(masks):
        annotations = []
        for mask in of_image:
            box = {"bbox": [10, 10, 20, 20], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
            annotations.append(box | others | ({} if mask is None else {"segmentation": mask}))
        name = f"s3://bucket/{i}.jpg"
        dicts.append({"file_name": name, "width": 100, "height": 80, "annotations": annotations})
    return dicts


def needs(**values):
    return Needs(train=True, objects=True, **values)


POLYGON, BITMASK = needs(masks="polygon"), needs(masks="bitmask")


@pytest.mark.parametrize(
    ("masks", "count"),
    [
        ([[None, None], []], "none of 2"),
        ([[SQUARE, None], [SQUARE]], "2 of 3"),
        ([[[]]], "none"),
    ],
)
def test_a_mask_model_needs_a_mask_of_each_object(masks, count):
    for mask_format in (POLYGON, BITMASK):
        match = rf"'{NAME}': {count}.*objects have a mask.*bucket/0\.jpg'.*MODEL\.MASK_ON False"
        with pytest.raises(ValueError, match=match):
            check_dataset(dataset(*masks), NAME, mask_format)
    assert check_dataset(dataset(*masks), NAME, needs()) == dataset(*masks)


def test_crowds_may_be_without_a_mask_or_of_another_kind():
    crowds = dataset([None, CODE], iscrowd=1)
    dicts = [*dataset([SQUARE]), *crowds]
    assert check_dataset(dicts, NAME, POLYGON) == dicts


@pytest.mark.parametrize("mask", [CODE, ARRAY])
def test_masks_that_are_no_polygons_need_another_format(mask):
    dicts = dataset([SQUARE], [mask, SQUARE])
    match = r"1 of 3 masks are not polygons, such as in 's3://bucket/1\.jpg'.*MASK_FORMAT bitmask"
    with pytest.raises(ValueError, match=match):
        check_dataset(dicts, NAME, POLYGON)
    for readable in (BITMASK, needs()):
        assert [len(r["annotations"]) for r in check_dataset(dicts, NAME, readable)] == [1, 2]


def test_a_mask_of_another_size_than_its_image_is_refused():
    code = {**CODE, "size": [100, 80]}
    match = r"'s3://bucket/0\.jpg' has size \[100, 80\].*= \[80, 100\]"
    with pytest.raises(ValueError, match=match):
        check_dataset(dataset([code]), NAME, BITMASK)


@pytest.mark.parametrize(
    ("mask", "fault"),
    [
        ([[1, 2, 3, 4]], "three points"),
        ([[1, 2, 3, 4, 5, 6, 7]], "three points"),
        (SQUARE[0], "list of polygons"),
        ([["1", "2", "3", "4", "5", "6"]], "list of polygons"),
        ([[1, 2, 3, 4, 5, float("nan")]], "not finite"),
        ({"counts": [1]}, "no counts and size"),
    ],
)
def test_an_unusable_mask_is_dropped_and_named(caplog, mask, fault):
    dicts = dataset([SQUARE, mask], [SQUARE])
    checked = check_dataset(dicts, NAME, BITMASK)
    assert checked == dataset([SQUARE], [SQUARE])
    (warning,) = caplog.messages
    assert f"'{NAME}': dropped 1 object(s) without a usable mask" in warning
    assert "s3://bucket/0.jpg" in warning and fault in warning


def test_evaluation_of_masks_reads_both_formats_but_needs_them():
    MetadataCatalog.get(NAME).evaluator_type = "coco"
    test = Needs(test=True, masks="polygon")
    dicts = dataset([SQUARE], [CODE])
    assert check_dataset(dicts, NAME, test) == dicts
    with pytest.raises(ValueError, match="1 of 2 objects have a mask"):
        check_dataset(dataset([SQUARE], [None]), NAME, test)


def test_an_evaluator_of_boxes_needs_no_masks():
    dicts = dataset([None])
    assert check_dataset(dicts, NAME, Needs(test=True, masks="polygon", keypoints=17)) == dicts


@pytest.mark.parametrize("keypoints", [None, [], [1, 2, 2], [1, 2] * 3])
def test_each_object_needs_its_keypoints(keypoints):
    good = [5, 5, 2] * 3
    dicts = [*dataset([SQUARE], keypoints=good), *dataset([SQUARE], keypoints=keypoints)]
    if keypoints == [1, 2] * 3:
        keypoints = 6
    check_dataset(dicts[:1], NAME, needs(keypoints=3))
    num = keypoints if isinstance(keypoints, int) else len(keypoints or [])
    match = rf"'s3://bucket/0\.jpg' has {num} keypoint numbers instead of 9.*NUM_KEYPOINTS = 3"
    with pytest.raises(ValueError, match=match):
        check_dataset(dicts, NAME, needs(keypoints=3))
