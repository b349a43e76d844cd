import copy
import json
import re

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image

from pisa_d2.data.checks import Needs, check_when_loaded

NAME = "coco_for_tests"
SIZE = {"width": 100, "height": 80}
SQUARE = [[10, 10, 30, 10, 30, 30, 10, 30]]


@pytest.fixture
def content(tmp_path):
    """Make a file of two images with two objects each, to spoil."""
    images = [{"id": i, "file_name": f"{i}.jpg", **SIZE} for i in (1, 2)]
    for image in images:
        Image.new("RGB", (100, 80)).save(tmp_path / image["file_name"])
    annotations = [
        {"id": i, "image_id": 1 + i // 2, "category_id": 1 + i % 2, "bbox": [5, 5, 20, 30]}
        for i in range(4)
    ]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture
def load(tmp_path):
    def load(content, file="instances.json", masks=None):
        path = tmp_path / file
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        register_coco_instances(NAME, {}, str(path), str(tmp_path))
        check_when_loaded([NAME], "DATASETS.TRAIN", Needs(train=True, objects=True, masks=masks))
        return DatasetCatalog.get(NAME)

    return load


def change(kind, index, **values):
    def spoil(content):
        content[kind][index].update(values)

    return spoil


def remove(kind, index, key):
    def spoil(content):
        del content[kind][index][key]

    return spoil


def everywhere(kind, key, convert):
    def spoil(content):
        for entry in content[kind]:
            entry[key] = convert(entry[key])

    return spoil


def without(key):
    return lambda content: content.pop(key)


FAULTS = {
    "no categories": (
        without("categories"),
        "list of 'categories' at the top level, but this file has",
    ),
    "no images": (without("images"), "list of 'images' at the top"),
    "annotations as an object": (
        lambda c: c.update(annotations={"1": {}}),
        "list of 'annotations' at the top",
    ),
    "an empty list of categories": (lambda c: c.update(categories=[]), "lists no categories"),
    "an image that is a text": (lambda c: c["images"].append("3.jpg"), "images[2] = '3.jpg' must"),
    "two images of one id": (
        change("images", 1, id=1),
        "2 images have the id 1, such as images[0] (id 1, file_name '1.jpg') and images[1] (id 1,",
    ),
    "two annotations of one id": (change("annotations", 3, id=0), "2 annotations have the id 0"),
    "two categories of one id": (change("categories", 1, id=1), "2 categories have the id 1"),
    "two categories of one name": (
        change("categories", 1, name="cat"),
        "categories[0] (id 1, name 'cat') and categories[1] (id 2, name 'cat') have the same name",
    ),
    "a category without a name": (remove("categories", 1, "name"), "categories[1] (id 2) has no"),
    "a category of no name": (change("categories", 1, name=None), "has no name"),
    "an image without an id": (remove("images", 1, "id"), "(file_name '2.jpg') has no id"),
    "an annotation without an id": (remove("annotations", 1, "id"), "annotations[1] (image_id 1)"),
    "an id that is a list": (change("images", 1, id=[2]), "the id must be a number or a string"),
    "ids of two types": (change("images", 1, id="2"), "ids of images are numbers, others strings"),
    "an image without a file": (remove("images", 1, "file_name"), "images[1] (id 2) has no file"),
    "a file that is a number": (change("images", 1, file_name=2), "one that is not a string"),
    "an image without a width": (remove("images", 1, "width"), "2.jpg' has width = None"),
    "a height that is a text": (change("images", 1, height="80"), "2.jpg' has height = '80'"),
    "a category that is not listed": (
        change("annotations", 3, category_id=9),
        "annotations[3] (id 3, image_id 2) has category_id = 9, which 'categories' does not list; "
        "it has 1, 2",
    ),
    "a category id of another type": (
        change("annotations", 3, category_id="2"),
        "category_id = '2', which 'categories' does not list (there is 2: a number and a string "
        "differ)",
    ),
    "no category id": (remove("annotations", 3, "category_id"), "category_id = None"),
    "a category id that is a list": (
        change("annotations", 3, category_id=[1]),
        "number or a string",
    ),
    "image ids of another type": (
        everywhere("images", "id", str),
        "No annotation belongs to an image of the file: annotations[0] (id 0, image_id 1) has "
        "image_id = 1 (there is '1': a number and a string differ)",
    ),
    "an annotation to ignore": (
        change("annotations", 3, ignore=1),
        "(id 3, image_id 2) has ig",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_names_dataset_file_and_entry(content, load, tmp_path, case):
    spoil, expected = FAULTS[case]
    spoil(content)
    match = rf"^Dataset '{NAME}'.*{re.escape(expected)}"
    with pytest.raises(ValueError, match=match) as caught:
        load(content)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ({"a.jpg1": {"filename": "a.jpg", "regions": []}}, "VIA's format"),
        ([{"image_id": 1, "category_id": 1, "score": 1}], "COCO's results"),
        (b'{"images": [', "incomplete JSON"),
        (b"0 0.5 0.5 0.1 0.1\n", "YOLO's text"),
        (b"[1, 2]", "AssertionError"),
    ],
)
def test_a_file_in_another_format_is_named(load, content, tmp_path, file, expected):
    match = rf"'{NAME}'.*'{tmp_path}/instances\.json'.*{expected}"
    with pytest.raises(ValueError, match=match):
        load(file)


ODD = {
    "texts as ids of images": (
        lambda c: [
            f(c)
            for f in (everywhere("images", "id", str), everywhere("annotations", "image_id", str))
        ]
    ),
    "floats as ids of images": everywhere("images", "id", float),
    "gaps between categories": lambda c: [
        change("categories", 1, id=70)(c),
        everywhere("annotations", "category_id", lambda i: {1: 1, 2: 70}[i])(c),
    ],
    "texts as ids of categories": lambda c: [
        everywhere("categories", "id", str)(c),
        everywhere("annotations", "category_id", str)(c),
    ],
    "sizes that are floats": everywhere("images", "width", float),
    "a false ignore": change("annotations", 0, ignore=0),
    "an unused category": lambda c: c["categories"].append({"id": 3, "name": "cow"}),
    "a category named by a number": change("categories", 1, name=7),
    "no masks": lambda c: [a.update(segmentation=[]) for a in c["annotations"]],
    "a mask of two points": change("annotations", 0, segmentation=[[1, 2, 3, 4]]),
    "a mask that is not nested": change("annotations", 0, segmentation=SQUARE[0]),
    "a mask that is a text": change("annotations", 0, segmentation="none"),
    "a mask of no size": change("annotations", 0, segmentation={"counts": [1, 2]}),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_but_readable_files_lose_nothing(content, load, caplog, case):
    ODD[case](content)
    dicts = load(copy.deepcopy(content))
    assert [len(record["annotations"]) for record in dicts] == [2, 2]
    assert not [r for r in caplog.records if r.name.startswith("pisa_d2")]
    assert all(isinstance(name, str) for name in MetadataCatalog.get(NAME).thing_classes)


def test_annotations_of_images_that_are_not_listed_are_counted(content, load, caplog):
    content["annotations"][3]["image_id"] = 9
    dicts = load(content)
    assert [len(record["annotations"]) for record in dicts] == [2, 1]
    expected = "1 of 4 annotations belong to no image of the file and are ignored: annotations[3]"
    assert f"'{NAME}': {expected} (id 3, image_id 9)." in caplog.text


@pytest.mark.parametrize("box", [[], None, 5, [5, 5, 20, 30, 1]])
def test_an_object_without_a_box_is_dropped_and_named(content, load, caplog, box):
    content["annotations"][3]["bbox"] = box
    assert [len(record["annotations"]) for record in load(content)] == [2, 1]
    assert "dropped 1 of 4 box(es)" in caplog.text and "2.jpg" in caplog.text


def test_a_mask_model_drops_objects_with_too_few_points_and_names_them(content, load, caplog):
    for annotation in content["annotations"]:
        annotation["segmentation"] = SQUARE
    content["annotations"][3]["segmentation"] = [[1, 2, 3, 4]]
    assert [len(record["annotations"]) for record in load(content, masks="polygon")] == [2, 1]
    assert (
        "dropped 1 object(s) without a usable mask: annotations[3] (id 3, image_id 2) has no"
        in (caplog.text)
    )


def test_annotation_ids_may_repeat_in_minival_as_in_detectron2(content, load):
    content["annotations"][3]["id"] = 0
    assert len(load(content, file="instances_minival2014.json")) == 2


def test_pycocotools_is_left_as_it_was(content, load):
    from pycocotools.coco import COCO

    create_index = COCO.createIndex
    content["images"][1]["id"] = 1
    with pytest.raises(ValueError, match="2 images have the id 1"):
        load(content)
    assert COCO.createIndex is create_index
