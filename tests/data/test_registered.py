import json
import os
import subprocess
import sys
from pathlib import Path

import pisa_d2  # isort: skip  (before Detectron2, which it patches)

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from helpers import make_coco, make_voc

from pisa_d2.data import (
    register_builtin_datasets,
    register_datasets,
    register_from_config,
)
from pisa_d2.data.checks import Needs, check_when_loaded
from pisa_d2.data.registered import RegisteredDataset, check_registered


def make_cfg(*entries: list[str]) -> CfgNode:
    cfg = get_cfg()
    pisa_d2.add_pisa_config(cfg)
    cfg.merge_from_list(["DATASETS.REGISTER", str(list(entries))])
    return cfg


@pytest.mark.slow
def test_importing_the_package_registers_no_name():
    code = (
        "import pisa_d2, pisa_d2.train_net; from detectron2.data import DatasetCatalog as d;"
        "d.register('digits_train', list); d.register('bccd_test', list);"
        "from pisa_d2.data import register_builtin_datasets; register_builtin_datasets();"
        "assert d.get('digits_train') == [] and 'digits_val' in d"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_built_in_names_that_are_taken_stay(tmp_path: Path):
    for name in ("digits_train", "bccd_val"):
        DatasetCatalog.pop(name, None)
        DatasetCatalog.register(name, lambda: ["mine"])
    register_builtin_datasets(tmp_path)
    assert DatasetCatalog.get("digits_train") == DatasetCatalog.get("bccd_val") == ["mine"]
    assert {"digits_val", "bccd_train", "bccd_trainval", "bccd_test"} <= set(DatasetCatalog)


def test_a_coco_file_in_the_config_is_loaded_with_its_metadata(tmp_path: Path):
    path = make_coco(tmp_path, num_images=2, classes=("cup", "ball"))
    register_from_config(make_cfg(["mine", str(path), str(tmp_path / "images")]))
    metadata = MetadataCatalog.get("mine")
    assert metadata.evaluator_type == "coco" and metadata.json_file == str(path)
    records = DatasetCatalog.get("mine")
    assert [len(record["annotations"]) for record in records] == [2, 2]
    assert all(Path(record["file_name"]).is_file() for record in records)
    assert metadata.thing_classes == ["cup", "ball"]
    assert metadata.thing_dataset_id_to_contiguous_id == {1: 0, 2: 1}


def test_a_voc_folder_and_a_list_share_the_classes_of_all(tmp_path: Path):
    first, second = tmp_path / "a", tmp_path / "b"
    make_voc(first, num_images=2, classes=("cup", "ball"))
    make_voc(second, num_images=1, classes=("dog",))
    register_from_config(make_cfg(["train", str(first)], ["val", str(second)]))
    assert len(DatasetCatalog.get("train")) == 2 and len(DatasetCatalog.get("val")) == 1
    for name in ("train", "val"):
        assert MetadataCatalog.get(name).thing_classes == ["ball", "cup", "dog"]
        assert MetadataCatalog.get(name).evaluator_type == "coco"
    (annotation,) = DatasetCatalog.get("val")[0]["annotations"]
    assert annotation["category_id"] == 2


def test_paths_become_absolute_in_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my data").mkdir()
    make_coco(tmp_path / "my data", num_images=1)
    make_voc(tmp_path / "voc", num_images=1)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    cfg = make_cfg(["coco", "my data/a.json", "~/my data/images"], ["voc", "./voc"])
    register_from_config(cfg)
    assert [
        ["coco", f"{tmp_path}/my data/a.json", f"{tmp_path}/my data/images"],
        ["voc", f"{tmp_path}/voc"],
    ] == cfg.DATASETS.REGISTER
    os.chdir("/")
    assert len(DatasetCatalog.get("coco")) == len(DatasetCatalog.get("voc")) == 1


def test_a_frozen_config_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    make_voc(tmp_path / "voc", num_images=1)
    cfg = make_cfg(["voc", "voc"])
    cfg.freeze()
    register_from_config(cfg)
    assert cfg.DATASETS.REGISTER == [["voc", "voc"]]
    assert len(DatasetCatalog.get("voc")) == 1


def test_the_config_is_registered_again_without_complaint_also_when_checked(tmp_path: Path):
    make_voc(tmp_path / "a", num_images=1, classes=("cup",))
    make_voc(tmp_path / "b", num_images=2, classes=("ball",))
    register_datasets([["mine", str(tmp_path / "a")]])
    check_when_loaded(["mine"], "DATASETS.TRAIN", Needs())
    DatasetCatalog.get("mine")
    register_datasets([["mine", str(tmp_path / "b")]])
    assert len(DatasetCatalog.get("mine")) == 2
    assert MetadataCatalog.get("mine").thing_classes == ["ball"]


def test_every_load_is_fresh_and_reading_the_classes_costs_none(tmp_path: Path):
    path = make_coco(tmp_path, num_images=1)
    register_datasets([["mine", str(path), str(tmp_path)]])
    dataset = DatasetCatalog.data["mine"]
    assert isinstance(dataset, RegisteredDataset)
    assert dataset.classes() == ["cup", "ball"]
    content = path.read_text()
    path.write_text("no longer read")
    records = DatasetCatalog.get("mine")
    path.write_text(content)
    records[0]["annotations"].clear()
    assert len(DatasetCatalog.get("mine")[0]["annotations"]) == 2


def test_a_name_that_is_taken_is_refused(tmp_path: Path):
    DatasetCatalog.register("taken", list)
    with pytest.raises(ValueError, match=r"DATASETS\.REGISTER lists 'taken'.*registered already"):
        register_datasets([["taken", str(tmp_path)]])
    with pytest.raises(ValueError, match="'mine' twice"):
        register_datasets([["mine", str(tmp_path)], ["mine", str(tmp_path)]])


@pytest.mark.parametrize(
    "entry",
    ["mine", ["mine"], ["mine", ""], ["mine", 1, "images"], ["mine", "a.json", "b", "c"]],
    ids=str,
)
def test_an_entry_of_another_form_is_refused_with_the_forms(entry: object):
    with pytest.raises(ValueError, match=r"DATASETS\.REGISTER.*\[name, annotation file, image"):
        register_datasets([entry])


def test_a_json_without_its_images_is_refused():
    with pytest.raises(ValueError, match="'a.json'.* has no image folder"):
        register_datasets([["mine", "a.json"]])


def test_an_unregistered_name_is_answered_with_the_nearest_and_how_to_register():
    register_datasets([["mine_train", "a.json", "images"]])
    check_registered("DATASETS.TRAIN", ["mine_train"])
    with pytest.raises(ValueError) as caught:
        check_registered("DATASETS.TRAIN", ["mine_trian"])
    message = str(caught.value)
    assert message.startswith("DATASETS.TRAIN = 'mine_trian' is not a registered dataset. Did you")
    assert "mine_train" in message and "DATASETS.REGISTER" in message
    assert "cityscapes" not in message and len(message) < 500


def test_remote_paths_stay_as_they_are():
    entries = register_datasets([["mine", "s3://bucket/a.json", "s3://bucket/images"]])
    assert entries == [["mine", "s3://bucket/a.json", "s3://bucket/images"]]


def test_entries_are_plain_so_that_a_saved_config_has_them(tmp_path: Path):
    make_voc(tmp_path / "voc", num_images=1)
    cfg = make_cfg(["voc", str(tmp_path / "voc")])
    register_from_config(cfg)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = make_cfg()
    again.merge_from_file(str(tmp_path / "config.yaml"))
    assert [["voc", str(tmp_path / "voc")]] == again.DATASETS.REGISTER
    assert json.dumps(again.DATASETS.REGISTER)
