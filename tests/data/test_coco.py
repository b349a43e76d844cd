import json
from pathlib import Path
from typing import Any

import pisa_d2  # noqa: F401  # isort: skip  (before Detectron2, which it patches)

import pytest
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import load_coco_json
from helpers import COCO, has_coco

from pisa_d2.data.checks import Needs, check_dataset
from pisa_d2.data.coco import load_coco, read_coco

BOX = [10, 10, 30, 20]
POLYGON = [10, 10, 40, 10, 40, 30]
KEYPOINTS = [12, 13, 2, 14, 15, 1]


def annotation(**changes: Any) -> dict[str, Any]:
    defaults = {"id": 1, "image_id": 3, "category_id": 7, "bbox": BOX, "area": 600, "iscrowd": 0}
    return {k: v for k, v in {**defaults, **changes}.items() if v is not ...}


def write(folder: Path, *annotations: dict[str, Any], **changes: Any) -> Path:
    content = {
        "images": [
            {"id": 3, "file_name": "sub/b.jpg", "width": 64, "height": 48},
            {"id": 1, "file_name": "a.jpg", "width": 64, "height": 48},
        ],
        "annotations": list(annotations),
        "categories": [
            {"id": 9, "name": "cup", "supercategory": "things"},
            {"id": 7, "name": "ball", "supercategory": "things"},
        ],
        **changes,
    }
    path = folder / "a.json"
    path.write_text(json.dumps(content))
    return path


def objects(folder: Path, *annotations: dict[str, Any]) -> list[dict[str, Any]]:
    return load_coco(write(folder, *annotations), folder)[1]["annotations"]


def test_a_well_formed_file_reads_as_with_detectron2(tmp_path: Path):
    rle = {"size": [48, 64], "counts": [10, 20, 48 * 64 - 30]}
    path = write(
        tmp_path,
        annotation(segmentation=[POLYGON]),
        annotation(id=2, iscrowd=1, category_id=9, segmentation=rle),
        annotation(id=3, image_id=1, keypoints=list(KEYPOINTS)),
    )
    data = read_coco(path, "images")
    assert data.records == load_coco_json(str(path), "images", "well_formed")
    metadata = MetadataCatalog.get("well_formed")
    assert data.classes == metadata.thing_classes == ["ball", "cup"]
    assert data.class_ids == metadata.thing_dataset_id_to_contiguous_id


@pytest.mark.skipif(not has_coco(), reason="COCO is not there")
def test_cocos_own_file_reads_as_with_detectron2():
    path = COCO / "annotations" / "instances_train2017.json"
    expected = load_coco_json(str(path), str(COCO / "train2017"), "coco_2017_train")
    assert load_coco(path, COCO / "train2017") == expected


@pytest.mark.parametrize("ids", [[0, 1], [1, 1], [..., ...], ["x", "y"]])
def test_annotation_ids_do_not_matter(tmp_path: Path, ids: list[Any]):
    assert len(objects(tmp_path, *(annotation(id=id_) for id_ in ids))) == 2


@pytest.mark.parametrize(
    ("value", "expected"), [(None, 0), (False, 0), (0, 0), (True, 1), (1, 1)], ids=str
)
def test_iscrowd_may_be_null_or_a_boolean(tmp_path: Path, value: Any, expected: int):
    (item,) = objects(tmp_path, annotation(iscrowd=value))
    assert item["iscrowd"] == expected and type(item["iscrowd"]) is int


def test_area_and_iscrowd_may_be_missing(tmp_path: Path):
    (item,) = objects(tmp_path, annotation(area=..., iscrowd=...))
    assert item["bbox"] == BOX and "iscrowd" not in item


def test_ignored_objects_are_kept_and_marked(tmp_path: Path):
    first, second = objects(tmp_path, annotation(ignore=1), annotation(ignore=0))
    assert first["ignore"] == 1 and "ignore" not in second
    assert first["category_id"] == 0


def test_an_object_of_unusable_polygons_keeps_its_box(tmp_path: Path):
    first, second = objects(
        tmp_path,
        annotation(segmentation=[[10, 10, 40, 30]]),
        annotation(segmentation=[[1, 2], POLYGON]),
    )
    assert first["bbox"] == BOX and "segmentation" not in first
    assert "at least three points" in first["mask_fault"] and "mask_fault" not in second
    assert second["segmentation"] == [POLYGON]


def test_a_model_with_masks_drops_an_object_of_unusable_polygons(tmp_path: Path, caplog):
    path = write(tmp_path, annotation(segmentation=[[1, 2]]), annotation(segmentation=[POLYGON]))
    records = [{**r, "file_name": f"s3://{r['file_name']}"} for r in load_coco(path, "images")]
    checked = check_dataset(records, "masked", Needs(train=True, masks="polygon"))
    assert [len(record["annotations"]) for record in checked] == [0, 1]
    assert "dropped 1 object(s) without a usable mask" in caplog.text


def test_annotations_of_images_that_are_not_listed_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    assert len(objects(tmp_path, annotation(), annotation(image_id=4))) == 1
    assert "1 of 2 annotations belong to no image of the file and are ignored" in caplog.text


def test_a_byte_order_mark_does_not_matter(tmp_path: Path):
    path = write(tmp_path, annotation())
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(load_coco(path, tmp_path)) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None}, "a list of 'images' at the top"),
        ({"categories": {}}, "a list of 'categories' at the top"),
        ({"categories": [{"id": 7, "name": "a"}, {"id": 7, "name": "b"}]}, "categories have the"),
        ({"categories": [{"id": 1, "name": "a"}]}, "image_id 3.* has category_id = 7"),
        ({"images": [{"id": 3, "file_name": "a", "width": 1, "height": 1}] * 2}, "images have the"),
    ],
)
def test_a_wrong_file_is_refused_with_the_reason(tmp_path: Path, changes: Any, message: str):
    with pytest.raises(ValueError, match=message):
        load_coco(write(tmp_path, annotation(), **changes), tmp_path)


def test_a_super_category_without_boxes_is_named_and_stays_a_class(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    categories = [
        {"id": 0, "name": "things", "supercategory": "none"},
        {"id": 7, "name": "ball", "supercategory": "things"},
        {"id": 9, "name": "cup", "supercategory": "things"},  # no box, but not a super-category
    ]
    path = write(tmp_path, annotation(), categories=categories)
    for _ in range(2):
        assert read_coco(path, tmp_path).classes == ["things", "ball", "cup"]
    assert len(caplog.messages) == 1
    assert "'things' (id 0) is the supercategory of others and has no box" in caplog.text
    caplog.clear()
    read_coco(write(tmp_path, annotation(), annotation(category_id=0), categories=categories), "")
    assert not caplog.messages
