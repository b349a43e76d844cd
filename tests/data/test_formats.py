import json

import pytest

from pisa_d2.data.formats import describe_unreadable, lists_annotations

TEXTS = {
    "empty": ("", "is empty"),
    "blank": (" \n", "is empty"),
    "incomplete": ('{"images": [{"id": 1}, {"i', "incomplete JSON"),
    "cut after a bracket": ('{"images": [{"id": 1}', "incomplete JSON"),
    "a missing comma": (
        '{"images": []\n "categories": []}',
        "not valid JSON: .* line 2, column 2",
    ),
    "single quotes": ("{'images': []}", "Python's notation"),
    "JSON Lines": ('{"image": 1}\n{"image": 2}\n', "JSON Lines"),
    "YOLO": ("0 0.5 0.5 0.1 0.2\n1 0.1 0.2 0.3 0.4\n", "YOLO's text"),
    "YOLO's yaml": ("# of mine\ntrain: ../train\nnc: 2\n", "YOLO's description"),
    "VOC": (
        '<?xml version="1.0"?>\n<annotation><folder>x</folder></annotation>',
        "Pascal VOC's XML",
    ),
    "CVAT": ("<annotations><version>1.1</version></annotations>", "CVAT's XML"),
    "another XML": ("<dataset></dataset>", "is XML"),
    "a web page": ("<!DOCTYPE html><html></html>", "a web page"),
    "CSV": ("filename,width,height,class,xmin,ymin,xmax,ymax\na.jpg,1,2,c,3,4,5,6\n", "CSV table"),
    "Git LFS": ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "byte order mark": (b"\xef\xbb\xbf{}", "byte order mark"),
    "UTF-16": ("{}".encode("utf-16"), "UTF-16"),
    "Latin-1": ('{"images": "ä"}'.encode("latin-1"), "not UTF-8"),
    "gzip": (b"\x1f\x8b\x08\x00", "gzip"),
    "zip": (b"PK\x03\x04", "zip"),
    "an image": (b"\xff\xd8\xff\xe0", "JPEG"),
}
JSONS = {
    "VIA": ({"a.jpg1": {"filename": "a.jpg", "regions": []}}, "VIA"),
    "VIA project": ({"_via_settings": {}, "_via_img_metadata": {}}, "VIA project"),
    "labelme": ({"version": "5", "shapes": [], "imagePath": "a.jpg"}, "labelme"),
    "VoTT": ({"assets": {}, "tags": []}, "VoTT"),
    "Datumaro": ({"info": {}, "categories": {}, "items": []}, "Datumaro"),
    "captions": ({"annotations": [{"id": 1, "caption": "a cat"}], "images": []}, "captions"),
    "panoptic": ({"annotations": [{"segments_info": []}], "images": []}, "panoptic"),
    "results": ([{"image_id": 1, "category_id": 1, "bbox": [], "score": 1}], "COCO's results"),
    "annotations alone": ([{"image_id": 1, "category_id": 1, "bbox": []}], "without their images"),
    "Detectron2's dicts": ([{"file_name": "a", "annotations": []}], "Detectron2's dataset dicts"),
    "CreateML": ([{"image": "a.jpg", "annotations": []}], "CreateML"),
    "Label Studio": ([{"data": {}, "annotations": []}], "Label Studio"),
    "BDD100K": ([{"name": "a.jpg", "labels": []}], "BDD100K"),
    "an empty list": ([], "an empty list"),
    "an empty object": ({}, "an empty object"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_file_that_is_no_json_is_named_by_its_format(tmp_path, case):
    content, expected = TEXTS[case]
    path = tmp_path / "annotations"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=expected):
        raise ValueError(describe_unreadable(str(path)))


@pytest.mark.parametrize("case", JSONS)
def test_a_json_of_another_tool_is_named(tmp_path, case):
    content, expected = JSONS[case]
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(content))
    assert expected in describe_unreadable(str(path))


@pytest.mark.parametrize("content", [{"images": [], "annotations": [], "categories": []}, [1], 2])
def test_what_is_not_known_is_not_named(tmp_path, content):
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(content))
    assert describe_unreadable(str(path)) is None


@pytest.mark.parametrize("content", [{"annotations": []}, {"images": []}])
def test_an_empty_list_of_annotations_is_not_a_missing_one(tmp_path, content):
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(content))
    assert lists_annotations(str(path)) == ("annotations" in content)
