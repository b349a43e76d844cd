import json
import logging
import math
import re

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode
from PIL import Image

from pisa_d2.data.catalog import register_dataset
from pisa_d2.data.checks import Classes, Needs, check_dataset, check_when_loaded
from pisa_d2.data.objects import Objects
from pisa_d2.data.record_checks import (
    check_classes,
    check_has_objects,
    describe_regions,
    with_known_crowds,
    with_whole_sizes,
)

NAME = "checked_for_tests"


def annotation(**others):
    return {"bbox": [10, 10, 30, 20], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, **others}


def records(*annotations):
    """Make one image, of which no file is looked for, for each list of annotations."""
    return [
        {"file_name": f"s3://bucket/{i}.jpg", "width": 100, "height": 80, "annotations": a}
        for i, a in enumerate(annotations)
    ]


def register(dicts):
    register_dataset(NAME, lambda: dicts, thing_classes=["a", "b", "c"])
    return dicts


def write_coco(folder, **changes):
    content = {
        "images": [{"id": 7, "file_name": "0.jpg", "width": 100, "height": 80}],
        "annotations": [
            {"id": 1, "image_id": 7, "bbox": [1, 2, 3, 4], "category_id": 5, "iscrowd": 0}
        ],
        "categories": [{"id": 5, "name": "thing"}],
        **changes,
    }
    Image.new("RGB", (100, 80)).save(folder / "0.jpg")
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    register_coco_instances(NAME, {}, str(path), str(folder))
    return path


@pytest.mark.parametrize("category", [3, -1, 1.0, None, "0", [0]])
def test_a_category_out_of_range_names_the_file_and_the_range(category):
    dicts = register(records([annotation()], [annotation(category_id=category)]))
    value = re.escape(repr(category))
    match = rf"1\.jpg' has category_id = {value}, but the dataset has 3.*from 0 to 2"
    with pytest.raises(ValueError, match=match):
        check_dataset(dicts, NAME)


def test_more_classes_in_the_data_than_in_the_config_are_an_error():
    dicts = register(records([annotation(category_id=2)]))
    match = r"category_id = 2, but MODEL\.ROI_HEADS\.NUM_CLASSES is 2"
    with pytest.raises(ValueError, match=match):
        check_dataset(dicts, NAME, Needs(classes=Classes("MODEL.ROI_HEADS.NUM_CLASSES", 2)))


@pytest.mark.parametrize("num", [2, 80])
def test_another_number_of_classes_than_that_of_the_data_is_refused(num):
    dicts = register(records([annotation()]))
    match = (
        rf"NUM_CLASSES = {num}, but dataset '{NAME}' has 3 class\(es\): a, b, c. Set the key to 3"
    )
    with pytest.raises(ValueError, match=match):
        check_dataset(dicts, NAME, Needs(classes=Classes("MODEL.ROI_HEADS.NUM_CLASSES", num)))


@pytest.mark.parametrize("crowd", [None, "0", 0.0, False, 1, True, "1"])
def test_iscrowd_is_read_in_any_usual_form(crowd):
    dicts = records([annotation(iscrowd=crowd), annotation()])
    (record,) = check_dataset(dicts, NAME)
    assert record["annotations"][0]["iscrowd"] == (crowd in (1, "1"))


@pytest.mark.parametrize("crowd", [2, "yes", [0], math.nan])
def test_another_iscrowd_is_an_error(crowd):
    dicts = records([annotation()], [annotation(iscrowd=crowd)])
    with pytest.raises(ValueError, match=rf"1\.jpg' has iscrowd = {re.escape(repr(crowd))}: "):
        check_dataset(dicts, NAME)


@pytest.mark.parametrize("size", [None, "100", 0, -100, 99.5, math.nan, math.inf, True, [100]])
def test_a_size_that_is_no_number_of_pixels_is_an_error(size):
    (record,) = records([annotation()])
    with pytest.raises(ValueError, match=rf"'{NAME}': 's3://bucket/0\.jpg' has height = .*pixels"):
        check_dataset([{**record, "height": size}], NAME)


def test_whole_sizes_of_other_types_become_integers():
    (record,) = records([annotation()])
    (checked,) = check_dataset([{**record, "width": 100.0, "height": np.int64(80)}], NAME)
    assert checked == record
    assert type(checked["width"]) is type(checked["height"]) is int


def test_images_with_only_crowds_are_named(caplog):
    crowd = annotation(iscrowd=1)
    dicts = records([crowd, crowd], [crowd, annotation()], [])
    assert check_dataset(dicts, NAME) == dicts
    (warning,) = caplog.messages
    assert (
        "1 image(s) have only crowd boxes, which are not objects to train on: 's3://bucket/0.jpg'"
        in (warning)
    )


@pytest.mark.parametrize(
    "annotations", [[], [annotation(iscrowd=1)], [annotation(bbox=[5, 5, 5, 9])]], ids=str
)
def test_a_dataset_without_objects_is_refused_for_training(annotations):
    dicts = records(annotations, [])
    with pytest.raises(ValueError, match=rf"'{NAME}' has 2 image\(s\) but no object to train on"):
        check_dataset(dicts, NAME, Needs(train=True, objects=True))
    assert len(check_dataset(dicts, NAME, Needs(train=True))) == 2
    dicts = records(annotations, [annotation()])
    assert len(check_dataset(dicts, NAME, Needs(train=True, objects=True))) == 2


@pytest.mark.parametrize("listed", [True, False])
def test_an_evaluation_without_objects_is_refused_unless_the_file_lists_no_annotations(
    tmp_path, listed
):
    path = write_coco(tmp_path, annotations=[])
    if not listed:
        content = json.loads(path.read_text())
        del content["annotations"]
        path.write_text(json.dumps(content))
    check_when_loaded([NAME], "DATASETS.TEST", Needs(test=True))
    if listed:
        with pytest.raises(ValueError, match=f"'{NAME}' has 1 image.*no object to evaluate with"):
            DatasetCatalog.get(NAME)
    else:
        assert len(DatasetCatalog.get(NAME)) == 1


@pytest.mark.parametrize(
    ("on", "said"),
    [
        (True, "2 annotation(s) are regions to ignore"),
        (False, "1 crowd box(es) are left out, so negatives are taken from there"),
    ],
)
def test_the_check_counts_crowds_and_says_what_happens_to_them(caplog, on, said):
    objects = [annotation(), annotation(iscrowd=1), annotation(ignore=1)]
    caplog.set_level(logging.INFO, "pisa_d2")
    for annotations in (objects, objects[:1]):
        needs = Needs(train=True, ignores_regions=on)
        check_dataset(records(annotations), "mine", needs)
    assert caplog.messages == [
        m for m in caplog.messages if m.startswith(f"Dataset 'mine': {said}")
    ]
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        ({}, r"does not name its keypoints.*keypoint_names=.*keypoint_flip_map="),
        ({"keypoint_names": ["a", "b", "c"]}, "does not name its keypoints"),
        (
            {"keypoint_names": ["a"], "keypoint_flip_map": []},
            "names 1 keypoints, a.* is 3",
        ),
    ],
)
def test_keypoints_without_names_are_refused_before_anything_is_loaded(metadata, match):
    register_dataset(NAME, lambda: pytest.fail("loaded"), **metadata)
    with pytest.raises(ValueError, match=match):
        check_when_loaded([NAME], "DATASETS.TRAIN", Needs(train=True, keypoints=3))
    check_when_loaded([NAME], "DATASETS.TRAIN", Needs(train=True))


def test_datasets_that_are_right_are_returned_as_they_are():
    dicts = records([annotation(), annotation(iscrowd=1)], [])
    objects = Objects(dicts)
    assert with_known_crowds(objects, NAME) is objects
    for record, checked in zip(dicts, with_whole_sizes(dicts, NAME), strict=True):
        assert checked is record
    assert with_whole_sizes([{"file_name": "of unknown size.jpg"}], NAME)[0].keys() == {"file_name"}


@pytest.mark.parametrize("ignores_regions", [True, False])
def test_without_crowds_there_is_nothing_to_say(ignores_regions):
    assert describe_regions(Objects(records([annotation()], [])), ignores_regions) == ""


def test_classes_that_nobody_counts_may_have_any_id_from_0():
    register_dataset(NAME, lambda: pytest.fail("loaded"))  # without thing_classes
    check_classes(Objects(records([annotation(category_id=10**6)])), NAME, Needs())
    with pytest.raises(ValueError, match=r"0\.jpg' has category_id = -1\. Fix the annotation"):
        check_classes(Objects(records([annotation(category_id=-1)])), NAME, Needs())


@pytest.mark.parametrize("evaluator_type", ["coco", "pascal_voc", "lvis", None])
def test_only_evaluations_by_boxes_refuse_a_dataset_without_objects(evaluator_type):
    register_dataset(NAME, list, evaluator_type=evaluator_type)
    args = Objects(records([], [])), NAME, Needs(test=True), pytest.fail
    if evaluator_type in ("coco", "pascal_voc"):
        with pytest.raises(ValueError, match=r"2 image\(s\) but no object to evaluate with\."):
            check_has_objects(*args)
    else:
        check_has_objects(*args)
