import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pisa_d2  # noqa: F401  # isort: skip  (before Detectron2, which it patches)

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from helpers import make_coco, make_voc, small_cfg
from pycocotools import mask

from pisa_d2 import train_net
from pisa_d2.data import make_digits, register_datasets, register_digits
from pisa_d2.data.bccd import register_bccd
from pisa_d2.data.catalog import register_dataset
from pisa_d2.data.checks import usable_boxes
from pisa_d2.evaluation import CheckedCOCOEvaluator, coco_truth


def perfect(record: dict[str, Any]) -> Instances:
    """Detect exactly the objects of an image."""
    objects = [a for a in record["annotations"] if not a.get("iscrowd")]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in objects]
    found = Instances((record["height"], record["width"]))
    found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    found.scores = torch.ones(len(boxes))
    found.pred_classes = torch.tensor([a["category_id"] for a in objects], dtype=torch.int64)
    return found


def evaluate(
    name: str,
    folder: Path,
    detect: Callable[[dict], Instances] = perfect,
    evaluator_class: type[COCOEvaluator] = CheckedCOCOEvaluator,
) -> dict[str, dict[str, float]]:
    evaluator = evaluator_class(name, distributed=False, output_dir=str(folder / "inference"))
    evaluator.reset()
    for record in usable_boxes(DatasetCatalog.get(name)):
        evaluator.process([record], [{"instances": detect(record)}])
    return evaluator.evaluate()


def register_json(folder: Path, change: Callable[[dict], None], own: bool) -> str:
    """Write and register a COCO json of 4 images and 8 objects, for Detectron2's loader or ours."""
    path = make_coco(folder, num_images=4)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    images = str(folder / "images")
    if own:
        register_datasets([["mine", str(path), images]])
    else:
        register_coco_instances("mine", {}, str(path), images)
    return "mine"


def renumber(content: dict) -> None:
    for i, annotation in enumerate(content["annotations"]):
        annotation["id"] = i


def each(**changes: Any) -> Callable[[dict], None]:
    def change(content: dict) -> None:
        for annotation in content["annotations"]:
            annotation.update(changes)
            for key in [key for key, value in changes.items() if value is ...]:
                del annotation[key]

    return change


def first_box(box: list[float]) -> Callable[[dict], None]:
    return lambda content: content["annotations"][0].update(bbox=box)


def first_is_crowd(content: dict) -> None:
    content["annotations"][0]["iscrowd"] = 1


CHANGES = {
    "as it should be": lambda content: None,
    "ids from 0": renumber,
    "a crowd": first_is_crowd,
    "no area": each(area=...),
    "area 0": each(area=0),
    "area null": each(area=None),
    "no iscrowd": each(iscrowd=...),
    "iscrowd false": each(iscrowd=False),
    "negative size": first_box([30, 30, -5, -5]),
    "no size": first_box([30, 30, 0, 5]),
    "outside": first_box([300, 30, 10, 5]),
    "five numbers": first_box([4, 6, 16, 24, 0.5]),
    "polygon of two points": lambda content: content["annotations"][0].update(
        segmentation=[[4, 6, 20, 30]]
    ),
}


@pytest.mark.parametrize("own", [True, False], ids=["ours", "Detectron2's"])
@pytest.mark.parametrize("case", CHANGES)
def test_a_perfect_detector_scores_100_on_any_json(tmp_path: Path, case: str, own: bool):
    name = register_json(tmp_path, CHANGES[case], own)
    results = evaluate(name, tmp_path)["bbox"]
    assert [results[key] for key in ("AP", "AP50", "APs")] == pytest.approx([100, 100, 100])


@pytest.mark.parametrize(
    "change",
    [each(id=1), each(id=...), each(iscrowd=None), each(ignore=1)],
    ids=["same id", "no id", "iscrowd null", "ignore"],
)
def test_a_perfect_detector_scores_100_on_what_only_our_loader_reads(
    tmp_path: Path, change: Callable[[dict], None]
):
    name = register_json(tmp_path, change, own=True)
    assert evaluate(name, tmp_path)["bbox"]["AP"] == pytest.approx(100)


@pytest.mark.parametrize("classes", [("cup",), ("cup", "ball")])
def test_a_perfect_detector_scores_100_on_a_voc_folder(tmp_path: Path, classes: tuple[str, ...]):
    make_voc(tmp_path / "voc", num_images=4, classes=classes)
    register_datasets([["mine", str(tmp_path / "voc")]])
    assert evaluate("mine", tmp_path)["bbox"]["AP"] == pytest.approx(100)


def test_a_perfect_detector_scores_100_on_bccd(tmp_path: Path):
    folder = tmp_path / "BCCD"
    make_voc(folder, num_images=4, classes=("RBC", "WBC", "Platelets"))
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    (folder / "ImageSets" / "Main" / "test.txt").write_text("0\n1\n2\n3\n")
    register_bccd(tmp_path)
    assert evaluate("bccd_test", tmp_path)["bbox"]["AP"] == pytest.approx(100)


@pytest.mark.parametrize("crowd", [False, True])
def test_a_perfect_detector_scores_100_on_digits(tmp_path: Path, crowd: bool):
    pytest.importorskip("sklearn")
    folder = make_digits(tmp_path, num_train=1, num_val=6)
    register_digits(tmp_path)
    path = folder / "annotations" / "instances_val.json"
    if crowd:
        content = json.loads(path.read_text())
        first_is_crowd(content)
        path.write_text(json.dumps(content))
    assert evaluate("digits_val", tmp_path)["bbox"]["AP"] == pytest.approx(100)


def noisy(record: dict[str, Any]) -> Instances:
    """Detect shifted boxes and masks with various scores, some twice or with a wrong class."""
    rng = np.random.default_rng(record["image_id"])
    objects = [a for a in record["annotations"] for _ in range(rng.integers(1, 3))]
    boxes = np.array([a["bbox"] for a in objects], dtype=np.float32)
    boxes[:, 2:] += boxes[:, :2]
    boxes += rng.normal(0, 2, boxes.shape).astype(np.float32)
    found = Instances((record["height"], record["width"]))
    found.pred_boxes = Boxes(torch.from_numpy(boxes))
    found.scores = torch.from_numpy(rng.random(len(boxes)).astype(np.float32))
    classes = [a["category_id"] if rng.random() < 0.8 else 0 for a in objects]
    found.pred_classes = torch.tensor(classes)
    masks = torch.zeros(len(boxes), record["height"], record["width"], dtype=torch.bool)
    for image, (x1, y1, x2, y2) in zip(masks, boxes.round().astype(int), strict=True):
        image[max(y1, 0) : y2, max(x1, 0) : x2] = True
    found.pred_masks = masks
    return found


def with_masks(content: dict) -> None:
    """Add large and small masks, with other areas than the boxes, and a crowd as RLE."""
    content["annotations"][1]["bbox"] = [10, 2, 50, 44]
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h]]
        annotation["area"] = w * h / 2
    crowd = content["annotations"][2]
    pixels = np.zeros((48, 64), dtype=np.uint8, order="F")
    pixels[10:40, 5:60] = 1
    rle = mask.encode(pixels)
    crowd["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
    crowd.update(iscrowd=1, bbox=[5, 10, 55, 30], area=1650)


@pytest.mark.parametrize("own", [True, False], ids=["ours", "Detectron2's"])
def test_a_well_formed_json_gives_detectron2s_results(tmp_path: Path, own: bool):
    name = register_json(tmp_path, with_masks, own)
    results = evaluate(name, tmp_path, noisy)
    expected = evaluate(name, tmp_path, noisy, COCOEvaluator)
    np.testing.assert_equal(results, expected)  # NaN, for lack of large objects, equals itself
    assert 0 < results["bbox"]["AP"] < 100 and 0 < results["segm"]["AP"] < 100


def test_corrected_labels_count_though_an_earlier_evaluation_left_a_file(tmp_path: Path):
    box = {"bbox": [4, 4, 20, 20], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    record = {"file_name": "a.jpg", "image_id": 1, "height": 48, "width": 64, "annotations": [box]}
    register_dataset("cells", lambda: copy.deepcopy([record]), thing_classes=["a", "b"])
    COCOEvaluator("cells", output_dir=str(tmp_path / "inference"))  # also names it in the metadata
    box["bbox"] = [30, 10, 60, 40]
    assert evaluate("cells", tmp_path)["bbox"]["AP"] == pytest.approx(100)


def test_a_dataset_without_a_json_is_left_as_it_was(tmp_path: Path):
    points = [10.5, 12.5, 2, 14.5, 15.5, 2]
    box = {"bbox": [4, 4, 20, 20], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    box["keypoints"] = list(points)
    record = {"file_name": "a.jpg", "image_id": 1, "height": 48, "width": 64, "annotations": [box]}
    register_dataset("cells", lambda: [record], thing_classes=["a"])
    for _ in range(2):
        CheckedCOCOEvaluator("cells", distributed=False, output_dir=str(tmp_path))
    assert box["keypoints"] == points
    assert MetadataCatalog.get("cells").get("json_file") is None
    assert not list(tmp_path.iterdir())
    assert not [name for name in (*DatasetCatalog, *MetadataCatalog.data) if "pisa_d2" in name]


def test_the_log_says_how_many_annotations_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    name = register_json(tmp_path, first_box([5, 5, 0, 0]), own=True)
    assert len(coco_truth(name)["annotations"]) == 7
    assert "'mine': evaluation leaves out 1 of 8 annotation(s)" in caplog.text


def test_missing_areas_are_those_of_the_masks(tmp_path: Path):
    def change(content: dict) -> None:
        with_masks(content)
        each(area=...)(content)

    register_json(tmp_path, change, own=True)
    areas = [a["area"] for a in coco_truth("mine")["annotations"]]
    assert areas[:3] == [16 * 24 / 2, 50 * 44 / 2, 1650]


def test_labels_that_only_the_file_has_are_the_truth(tmp_path: Path):
    def without_labels() -> list[dict]:
        return [{k: v for k, v in r.items() if k != "annotations"} for r in labelled()]

    name = register_json(tmp_path, first_box([5, 5, -2, 9]), own=True)
    labelled = DatasetCatalog.pop(name)
    DatasetCatalog.register(name, without_labels)
    labelled()
    assert len(coco_truth(name)["annotations"]) == 7


def test_labels_that_the_loader_changes_are_the_truth(tmp_path: Path):
    def shifted() -> list[dict]:
        records = original()
        for record in records:
            for annotation in record["annotations"]:
                x, y, w, h = annotation["bbox"]
                annotation["bbox"] = [x + 5, y, w, h]
        return records

    name = register_json(tmp_path, lambda content: None, own=True)
    original = DatasetCatalog.pop(name)
    DatasetCatalog.register(name, shifted)
    assert evaluate(name, tmp_path)["bbox"]["AP"] == pytest.approx(100)


def test_a_json_without_labels_is_not_evaluated(tmp_path: Path):
    name = register_json(tmp_path, lambda content: content.pop("annotations"), own=False)
    assert evaluate(name, tmp_path) == {}


@pytest.mark.parametrize("flag", ["ignore", "iscrowd"])
def test_with_regions_on_ignored_objects_are_crowds_and_crowds_stay_what_they_are(
    tmp_path: Path, flag: str
) -> None:
    """Half of the objects are marked, and no detection finds them."""

    def mark(content: dict) -> None:
        for annotation in content["annotations"][::2]:
            annotation[flag] = 1

    def find_others(record: dict[str, Any]) -> Instances:
        found = perfect(record)
        marked = [bool(a.get("ignore")) for a in record["annotations"] if not a.get("iscrowd")]
        return found[~torch.tensor(marked, dtype=torch.bool)]

    name = register_json(tmp_path, mark, own=True)
    results = []
    for ignored_regions in (False, True):
        evaluator = functools.partial(CheckedCOCOEvaluator, ignored_regions=ignored_regions)
        results.append(evaluate(name, tmp_path, find_others, evaluator)["bbox"]["AP"])
    off, on = results
    assert on == pytest.approx(100)
    assert off == pytest.approx(50) if flag == "ignore" else off == on


def test_the_evaluator_of_train_net_goes_by_the_config(tmp_path: Path) -> None:
    def mark(content: dict) -> None:
        content["annotations"][0]["ignore"] = 1

    name = register_json(tmp_path, mark, own=True)
    for on in (False, True):
        cfg = small_cfg("MODEL.IGNORED_REGIONS.ENABLED", on)
        evaluators = train_net.Trainer.build_evaluator(cfg, name, str(tmp_path))
        truth = evaluators._evaluators[0]._coco_api.dataset["annotations"]
        assert [a["iscrowd"] for a in truth] == [int(on), *[0] * 7]
