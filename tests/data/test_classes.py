import json
from pathlib import Path

import pisa_d2  # isort: skip  (before Detectron2, which it patches)

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from helpers import make_coco, make_voc
from ssd import add_ssd_config

from pisa_d2.data import register_from_config
from pisa_d2.data.catalog import register_dataset
from pisa_d2.data.classes import check_same_classes, take_num_classes
from pisa_d2.preflight import check_data

KEYS = {
    "GeneralizedRCNN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "PISARetinaNet": "MODEL.RETINANET.NUM_CLASSES",
    "PISASSD": "MODEL.SSD.NUM_CLASSES",
}


def make_cfg(entries: list[list[str]], *opts: object) -> CfgNode:
    """Make a config with the datasets "train" and "val"."""
    cfg = get_cfg()
    pisa_d2.add_pisa_config(cfg)
    add_ssd_config(cfg)
    cfg.merge_from_list(["DATASETS.REGISTER", entries, *opts])
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("train",), ("val",)
    register_from_config(cfg)
    return cfg


def two_sets(folder: Path) -> list[list[str]]:
    make_voc(folder / "a", num_images=2, classes=("cup", "ball", "dog"))
    make_voc(folder / "b", num_images=1, classes=("cup",))
    return [["train", str(folder / "a")], ["val", str(folder / "b")]]


@pytest.mark.parametrize("architecture", KEYS)
def test_the_default_number_of_classes_is_taken_from_the_data(tmp_path: Path, architecture: str):
    cfg = make_cfg(two_sets(tmp_path), "MODEL.META_ARCHITECTURE", architecture)
    before = cfg.clone()
    take_num_classes(cfg)
    before.merge_from_list([KEYS[architecture], 3])
    assert cfg == before
    check_data(cfg, train=True)


@pytest.mark.parametrize("architecture", KEYS)
def test_another_number_is_refused_with_the_names(tmp_path: Path, architecture: str):
    key = KEYS[architecture]
    cfg = make_cfg(two_sets(tmp_path), "MODEL.META_ARCHITECTURE", architecture, key, 2)
    take_num_classes(cfg)
    with pytest.raises(ValueError, match=rf"{key} = 2, but.*3 class\(es\): ball, cup, dog"):
        check_data(cfg, train=True)


def test_of_a_dataset_that_is_not_listed_the_default_must_agree_too():
    for name in ("train", "val"):
        register_dataset(name, lambda: [{"annotations": []}], thing_classes=["a", "b"])
    cfg = make_cfg([])
    take_num_classes(cfg)
    with pytest.raises(ValueError, match=r"NUM_CLASSES = 80, but.*2 class\(es\): a, b"):
        check_data(cfg, train=True)


def test_for_evaluation_alone_the_classes_may_be_those_of_the_test_set(tmp_path: Path):
    path = make_coco(tmp_path, num_images=1)
    cfg = make_cfg([["train", "gone.json", "gone"], ["val", str(path), str(tmp_path / "images")]])
    take_num_classes(cfg)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2
    check_data(cfg, train=False)


def test_a_file_that_cannot_be_read_is_left_to_its_loading():
    cfg = make_cfg([["train", "gone.json", "gone"], ["val", "gone.json", "gone"]])
    take_num_classes(cfg)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 80
    with pytest.raises(FileNotFoundError, match="'val'.*gone.json"):
        check_data(cfg, train=True)


def write_coco(folder: Path, classes: tuple[str, ...]) -> tuple[str, str]:
    folder.mkdir()
    return str(make_coco(folder, num_images=1, classes=classes)), str(folder / "images")


@pytest.mark.parametrize("classes", [("ball", "cup"), ("cup", "bowl")])
@pytest.mark.parametrize("read", [False, True], ids=["for training", "for evaluation alone"])
def test_classes_of_another_order_or_name_are_refused_with_both_lists(
    tmp_path: Path, classes: tuple[str, ...], read: bool
):
    train, val = write_coco(tmp_path / "a", ("cup", "ball")), write_coco(tmp_path / "b", classes)
    cfg = make_cfg([["train", *train], ["val", *val]])
    DatasetCatalog.get("val")
    if not read:
        DatasetCatalog.get("train")
    with pytest.raises(ValueError, match="different classes") as caught:
        check_same_classes(cfg, read)
    assert "'train' (DATASETS.TRAIN): 0 cup, 1 ball." in str(caught.value)
    assert f"'val' (DATASETS.TEST): 0 {classes[0]}, 1 {classes[1]}." in str(caught.value)


def test_the_same_classes_under_other_ids_agree(tmp_path: Path):
    train, val = (write_coco(tmp_path / name, ("cup", "ball")) for name in "ab")
    content = json.loads(Path(val[0]).read_text())
    for item in (*content["categories"], *content["annotations"]):
        key = "category_id" if "category_id" in item else "id"
        item[key] = 10 * item[key]
    Path(val[0]).write_text(json.dumps(content))
    cfg = make_cfg([])
    register_coco_instances("train", {}, *train)
    register_coco_instances("val", {}, *val)
    for name in ("train", "val"):
        DatasetCatalog.get(name)
    check_same_classes(cfg)
