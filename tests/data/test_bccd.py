import os
from pathlib import Path

import pisa_d2  # noqa: F401  # isort: skip  (before Detectron2, which it patches)

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image
from torch import tensor

from pisa_d2.data.bccd import CLASSES, SPLITS, load_bccd, register_bccd

REAL = Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser() / "BCCD"

BOXES = {
    "cells": [("RBC", 1, 1, 20, 20), ("WBC", 10, 5, 40, 30), ("Platelets", 30, 30, 36, 37)],
    "flawed": [("RBC", 7, 8, 7, 20), ("RBC", 4, 6, 30, 28), ("WBC", 9, 12, 30, 12)],
    "empty": [],
}


def object_xml(name: str, *box: int) -> str:
    sides = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    corners = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
    return f"<object><name>{name}</name><bndbox>{corners}</bndbox></object>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a BCCD of three 48x40 images: one good, one with two boxes without area, one empty."""
    folder = tmp_path / "BCCD"
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / part).mkdir(parents=True)
    for split in SPLITS:
        (folder / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(BOXES) + "\n")
    for image_id, boxes in BOXES.items():
        Image.new("RGB", (48, 40)).save(folder / "JPEGImages" / f"{image_id}.jpg")
        objects = "".join(object_xml(*box) for box in boxes)
        (folder / "Annotations" / f"{image_id}.xml").write_text(
            "<annotation><size><width>48</width><height>40</height><depth>3</depth></size>"
            f"{objects}</annotation>"
        )
    return folder


def test_every_split_is_registered(folder: Path):
    register_bccd(folder.parent)
    for split in SPLITS:
        assert f"bccd_{split}" in DatasetCatalog
        metadata = MetadataCatalog.get(f"bccd_{split}")
        assert metadata.thing_classes == list(CLASSES)
        assert metadata.evaluator_type == "coco"


def test_boxes_are_read_and_those_without_area_dropped(folder: Path):
    cells, flawed, empty = load_bccd(folder, "train")
    assert [a["category_id"] for a in cells["annotations"]] == [0, 1, 2]
    # Pascal VOC counts pixels from 1 and includes the last one.
    assert cells["annotations"][1]["bbox"] == [9, 4, 40, 30]
    assert [a["bbox"] for a in flawed["annotations"]] == [[3, 5, 30, 28]]
    assert empty["annotations"] == []
    for record in (cells, flawed, empty):
        assert (record["height"], record["width"]) == (40, 48)
        assert type(record["image_id"]) is str
        assert Path(record["file_name"]).is_file()


def test_the_warning_names_the_files_of_dropped_boxes(
    folder: Path, caplog: pytest.LogCaptureFixture
):
    load_bccd(folder, "val")
    (message,) = [r.getMessage() for r in caplog.records if r.name == "pisa_d2.data.bccd"]
    assert "2 box(es)" in message
    assert "flawed.xml" in message
    assert "cells.xml" not in message


def test_every_load_is_fresh(folder: Path):
    register_bccd(folder.parent)
    DatasetCatalog.get("bccd_test")[0]["annotations"].clear()
    assert len(DatasetCatalog.get("bccd_test")[0]["annotations"]) == 3
    (folder / "ImageSets/Main/test.txt").write_text("empty\ncells\n")
    assert [r["image_id"] for r in DatasetCatalog.get("bccd_test")] == ["empty", "cells"]


def test_a_missing_dataset_says_where_it_should_be(tmp_path: Path):
    with pytest.raises(FileNotFoundError) as caught:
        load_bccd(tmp_path / "BCCD", "train")
    for part in (str(tmp_path / "BCCD"), "DETECTRON2_DATASETS", "Annotations", "JPEGImages"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "<annotation><size><width>48</width>",
        "<annotation><object></object></annotation>",
        "<annotation><size><width>48</width><height>40</height></size>"
        "<object><name>cat</name></object></annotation>",
        "<annotation><size><width>48</width><height>40</height></size>"
        "<object><name>RBC</name><bndbox><xmin>1</xmin></bndbox></object></annotation>",
    ],
    ids=["empty", "torn", "no size", "unknown class", "half a box"],
)
def test_a_corrupt_annotation_is_named(folder: Path, content: str):
    path = folder / "Annotations" / "flawed.xml"
    path.write_text(content)
    with pytest.raises(ValueError, match="not a Pascal VOC annotation") as caught:
        load_bccd(folder, "train")
    assert str(path) in str(caught.value)


def test_true_boxes_score_100_in_coco_evaluation(folder: Path, tmp_path: Path):
    register_bccd(folder.parent)
    evaluator = COCOEvaluator("bccd_test", output_dir=str(tmp_path / "out"), distributed=False)
    evaluator.reset()
    for record in DatasetCatalog.get("bccd_test"):
        annotations = record["annotations"]
        assert all(a["bbox_mode"] == BoxMode.XYXY_ABS for a in annotations)
        instances = Instances((record["height"], record["width"]))
        instances.pred_boxes = Boxes(tensor([a["bbox"] for a in annotations]).reshape(-1, 4))
        instances.scores = tensor([1.0] * len(annotations))
        instances.pred_classes = tensor([a["category_id"] for a in annotations])
        evaluator.process([record], [{"instances": instances}])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"'{REAL}' is not there")
@pytest.mark.parametrize(
    ("split", "num_images", "flawed"),
    [
        ("train", 205, ["BloodImage_00343"]),
        ("val", 87, ["BloodImage_00338"]),
        ("trainval", 292, ["BloodImage_00338", "BloodImage_00343"]),
        ("test", 72, []),
    ],
)
def test_two_boxes_of_the_real_data_are_dropped(split: str, num_images: int, flawed: list[str]):
    records = load_bccd(REAL, split)
    assert len(records) == num_images
    short_of = []
    for record in records:
        text = (REAL / "Annotations" / f"{record['image_id']}.xml").read_text()
        short_of += [record["image_id"]] * (text.count("<object>") - len(record["annotations"]))
    assert sorted(short_of) == flawed
