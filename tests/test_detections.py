import json

import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm

from pisa_d2.detections import DetectionsWriter

IMAGES = {"000011": 2, "000012": 0, "000013": 1}  # the number of detections


def found(num: int) -> Instances:
    instances = Instances((48, 64))
    instances.pred_boxes = Boxes(torch.tensor([[1.0, 2.0, 31.0, 22.0]] * num).reshape(-1, 4))
    instances.scores = torch.linspace(0.9, 0.5, num)
    instances.pred_classes = torch.arange(num)
    return instances


def write(folder) -> DetectionsWriter:
    writer = DetectionsWriter(str(folder))
    for image, num in IMAGES.items():
        writer.process([{"image_id": image}], [{"instances": found(num)}])
    return writer


def read(folder) -> list[dict]:
    return json.loads((folder / "coco_instances_results.json").read_text())


def test_detections_are_saved_in_cocos_format_without_a_result(tmp_path):
    folder = tmp_path / "not" / "there yet"
    assert write(folder).evaluate() is None
    detections = read(folder)
    assert [(d["image_id"], d["category_id"]) for d in detections] == [
        ("000011", 0),
        ("000011", 1),
        ("000013", 0),
    ]
    assert [d["score"] for d in detections] == pytest.approx([0.9, 0.5, 0.9])
    assert all(d["bbox"] == [1, 2, 30, 20] for d in detections)  # width and height


def test_a_reset_forgets_the_detections_of_the_last_evaluation(tmp_path):
    writer = write(tmp_path)
    writer.reset()
    writer.evaluate()
    assert read(tmp_path) == []


def test_the_main_process_saves_the_detections_of_all(tmp_path, monkeypatch):
    monkeypatch.setattr(comm, "gather", lambda own, dst: [own, [{"image_id": "of another"}]])
    write(tmp_path / "main").evaluate()
    assert [d["image_id"] for d in read(tmp_path / "main")][-2:] == ["000013", "of another"]
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    write(tmp_path / "other").evaluate()
    assert not (tmp_path / "other").exists()
