import copy
import functools
import logging
import math

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode
from PIL import Image

from pisa_d2.data.bccd import load_bccd
from pisa_d2.data.box_checks import check_boxes
from pisa_d2.data.catalog import register_dataset
from pisa_d2.data.checks import Classes, Needs, check_dataset, check_when_loaded
from pisa_d2.data.objects import Objects

NAME = "checked_for_tests"
THREE = Classes("MODEL.ROI_HEADS.NUM_CLASSES", 3)
TRAIN = Needs(train=True, objects=True, classes=THREE)


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        Image.new("RGB", (100, 80)).save(tmp_path / f"{i}.jpg")
    return tmp_path


def annotation(box=(10, 10, 30, 20), **others):
    return {"bbox": list(box), "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, **others}


def records(folder, *annotations):
    """Make one image for each list of annotations."""
    return [
        {"file_name": str(folder / f"{i}.jpg"), "width": 100, "height": 80, "annotations": a}
        for i, a in enumerate(annotations)
    ]


def register(dicts, classes=("a", "b", "c")):
    register_dataset(NAME, lambda: dicts, thing_classes=list(classes))
    return dicts


BAD_BOXES = {
    "no width": ([10, 10, 10, 20], "has no area"),
    "no height": ([10, 10, 20, 10], "has no area"),
    "negative width": ([30, 10, 20, 20], "has a negative size"),
    "negative height": ([10, 30, 20, 20], "has a negative size"),
    "right of the image": ([100, 10, 130, 20], "lies outside the image"),
    "below the image": ([10, 81, 30, 99], "lies outside the image"),
    "left of the image": ([-20, 10, 0, 20], "lies outside the image"),
    "above the image": ([10, -20, 20, -5], "lies outside the image"),
    "NaN": ([10, math.nan, 20, 30], "is not finite"),
    "infinite": ([10, 10, math.inf, 30], "is not finite"),
    "three numbers": ([10, 10, 20], "is not four numbers"),
    "five numbers": ([10, 10, 20, 20, 5], "is not four numbers"),
    "text": (["10", 10, 20, 20], "is not four numbers"),
    "nothing": (None, "is not four numbers"),
    "empty": ([], "is not four numbers"),
}


@pytest.mark.parametrize("case", BAD_BOXES)
def test_a_box_of_no_use_is_left_out_with_its_file_and_value_in_a_warning(folder, caplog, case):
    box, fault = BAD_BOXES[case]
    bad = {**annotation(), "bbox": box}
    dicts = records(folder, [annotation(), bad], [annotation()])
    before = copy.deepcopy(dicts)
    checked = check_dataset(dicts, NAME)
    assert [len(record["annotations"]) for record in checked] == [1, 1]
    assert repr(dicts) == repr(before)
    (warning,) = caplog.messages
    assert f"'{NAME}': dropped 1 of 3 box(es) as unusable: {box} of" in warning
    assert f"'{folder / '0.jpg'}' {fault}" in warning


def test_an_annotation_without_a_box_is_named_by_its_file(folder, caplog):
    bad = annotation()
    del bad["bbox"]
    assert check_dataset(records(folder, [bad, annotation()]), NAME)[0]["annotations"] == [
        annotation()
    ]
    assert f"an annotation of '{folder / '0.jpg'}' has no bbox" in caplog.text


def test_a_crowd_of_no_use_is_dropped_too(folder):
    dicts = records(folder, [annotation((5, 5, 5, 5), iscrowd=1), annotation()])
    assert check_dataset(dicts, NAME)[0]["annotations"] == [annotation()]


def test_of_many_bad_boxes_five_are_named_and_all_counted(folder, caplog):
    check_dataset(records(folder, [annotation((5, 5, 5, 5)) for _ in range(12)]), NAME)
    assert "dropped 12 of 12 box(es)" in caplog.text and "and 7 more" in caplog.text
    assert caplog.text.count("has no area") == 5


def is_kept(box, mode, size=(100, 80)):
    record = {"annotations": [{"bbox": box, "bbox_mode": mode}]}
    if size is not None:
        record.update(zip(("width", "height"), size, strict=True))
    return bool(check_boxes(Objects([record]), lambda text: None).annotations)


@pytest.mark.parametrize(
    "box", [[0, 0, 100, 80], [-3, -3, 5, 5], [95, 70, 110, 90], np.array([1.0, 2.0, 3.0, 4.0])]
)
def test_a_box_that_reaches_into_the_image_is_kept(box):
    assert is_kept(box, BoxMode.XYXY_ABS)


def test_boxes_are_read_in_their_own_mode():
    assert is_kept([30, 30, 10, 10], BoxMode.XYWH_ABS)
    assert not is_kept([30, 30, -10, 10], BoxMode.XYWH_ABS)
    assert not is_kept([30, 30, 10, 10], BoxMode.XYXY_ABS)
    assert is_kept([30, 30, 10, 10, 45], BoxMode.XYWHA_ABS)
    assert is_kept([130, 30, 140, 50], BoxMode.XYXY_ABS, size=None)
    assert not is_kept([130, 30, 140, 50], BoxMode.XYXY_ABS)


def test_a_good_dataset_comes_back_as_it_is_without_a_word(folder, caplog):
    dicts = register(records(folder, [annotation(), annotation(category_id=np.int64(2))], []))
    assert check_dataset(dicts, NAME, TRAIN) == dicts
    assert not caplog.messages


def test_missing_images_are_named(folder):
    (folder / "1.jpg").unlink()
    dicts = records(folder, [annotation()], [annotation()])
    match = rf"'{NAME}': 1 of its 2 images are missing: '{folder}/1.jpg'.*DETECTRON2_DATASETS"
    with pytest.raises(FileNotFoundError, match=match):
        check_dataset(dicts, NAME)


def test_images_elsewhere_are_not_looked_for():
    check_dataset([{"file_name": "s3://bucket/1.jpg"}, {"image": "in memory"}], NAME)


def test_a_dataset_without_images_is_refused():
    with pytest.raises(ValueError, match=f"'{NAME}' has no images"):
        check_dataset([], NAME, Needs(test=True))


def test_data_without_boxes_such_as_of_semantic_segmentation_is_left_alone(folder):
    dicts = [{"file_name": str(folder / "0.jpg"), "sem_seg_file_name": "0.png"}]
    assert check_dataset(dicts, NAME, TRAIN) == dicts


def test_what_detectron2_loads_is_checked_however_often_that_is_asked_for(folder, caplog):
    caplog.set_level(logging.WARNING)
    register(records(folder, [annotation(), annotation((1, 1, 1, 1))], [annotation((2, 2, 2, 2))]))
    for _ in range(2):
        check_when_loaded([NAME], "DATASETS.TRAIN", TRAIN)
    assert not caplog.messages  # nothing is loaded yet
    for _ in range(2):  # the second time, no warning is repeated
        dicts = get_detection_dataset_dicts([NAME])
    assert [len(record["annotations"]) for record in dicts] == [1]
    assert len([m for m in caplog.messages if "dropped 2 of 3 box(es)" in m]) == 1


def test_an_unknown_dataset_names_the_key_and_how_to_register():
    with pytest.raises(ValueError, match=r"DATASETS\.TRAIN = 'nowhere'.*DATASETS\.REGISTER"):
        check_when_loaded(["nowhere"], "DATASETS.TRAIN", Needs(train=True))


def test_annotations_that_are_not_there_name_the_file_and_the_variable(tmp_path):
    path = tmp_path / "nowhere" / "instances.json"
    register_coco_instances(NAME, {}, str(path), str(tmp_path))
    check_when_loaded([NAME], "DATASETS.TRAIN", Needs(train=True))
    with pytest.raises(FileNotFoundError, match=rf"'{path}'.*DETECTRON2_DATASETS"):
        DatasetCatalog.get(NAME)


def test_a_loaders_own_words_are_left_as_they_are(tmp_path):
    register_dataset(NAME, functools.partial(load_bccd, tmp_path, "train"))
    check_when_loaded([NAME], "DATASETS.TRAIN", Needs(train=True))
    with pytest.raises(FileNotFoundError, match="^'.*train.txt' is missing. Put BCCD"):
        DatasetCatalog.get(NAME)
