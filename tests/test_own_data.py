"""The literal commands of README and docs/own_data.md, on small data in each layout."""

import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pisa_d2  # noqa: F401  # isort: skip  (before Detectron2, which it patches)

import pytest
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from helpers import ROOT, make_coco, make_voc

QUICK = (
    "SOLVER.MAX_ITER 1 SOLVER.IMS_PER_BATCH 1 INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64 "
    "MODEL.FPN.OUT_CHANNELS 32 MODEL.ROI_BOX_HEAD.FC_DIM 32 MODEL.RPN.POST_NMS_TOPK_TEST 20 "
    "MODEL.RPN.POST_NMS_TOPK_TRAIN 50 MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0 MODEL.DEVICE cpu"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a working directory with the files of this repository that the commands name."""
    for name in ("configs", "projects", "train_net.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def coco(root: Path) -> None:
    """Make both splits of a COCO dataset with common images."""
    for split in ("train", "val"):
        make_coco(root, num_images=2, first_id=0).rename(root / f"{split}.json")


def roboflow(root: Path) -> None:
    """Make a Roboflow export: json next to images, ids from 0, and a super-category of id 0."""
    for split in ("train", "valid"):
        folder = root / split
        folder.mkdir(parents=True)
        content = json.loads(make_coco(folder, num_images=2, first_id=0).read_text())
        for category in content["categories"]:
            category["supercategory"] = "things"
        content["categories"].insert(0, {"id": 0, "name": "things", "supercategory": "none"})
        (folder / "_annotations.coco.json").write_text(json.dumps(content))
        (folder / "a.json").unlink()
        for image in (folder / "images").iterdir():
            image.rename(folder / image.name)


def voc(root: Path) -> None:
    make_voc(root, num_images=2)
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("0\n")
    (lists / "val.txt").write_text("1\n")


def commands(text: str) -> list[list[str]]:
    """Split each command in a markdown text into words."""
    blocks = re.findall(r"```\n(.*?)```", text, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ")
    return [shlex.split(c) for c in re.findall(r"python (?:[^\"\n]|\"[^\"]*\")*", lines)]


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert words[0] == "python"
    script = words[1]
    extra = shlex.split(QUICK) if script == "train_net.py" else []
    monkeypatch.setattr(sys, "argv", [*words[1:], *extra])
    monkeypatch.syspath_prepend(str(Path(script).resolve().parent))
    runpy.run_path(str(Path(script).resolve()), run_name="__main__")


def section(file: str, title: str) -> str:
    return (ROOT / file).read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]


CASES = {
    "COCO": (coco, section("README.md", "Train on your own data"), ["cup", "ball"]),
    "Roboflow": (
        roboflow,
        section("docs/own_data.md", "COCO's format")
        + section("docs/own_data.md", "Look at the result"),
        ["things", "cup", "ball"],
    ),
    "VOC": (
        voc,
        section("docs/own_data.md", "Pascal VOC's format")
        + section("docs/own_data.md", "Look at the result"),
        ["ball", "cup"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_three_commands_train_draw_and_evaluate(
    folder: Path, case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    make: Callable[[Path], None]
    make, text, classes = CASES[case]
    (folder / "mine").mkdir()
    make(folder / "mine")
    train, draw, evaluate = commands(text)

    run(train, monkeypatch)
    output = folder / "output" / "mine"
    saved = yaml.safe_load((output / "config.yaml").read_text())
    assert saved["MODEL"]["ROI_HEADS"]["NUM_CLASSES"] == len(classes)
    for _, *paths in saved["DATASETS"]["REGISTER"]:
        assert all(path.startswith(str(folder / "mine")) for path in paths)
    assert MetadataCatalog.get("mine_val").thing_classes == classes
    last = json.loads((output / "metrics.json").read_text().splitlines()[-1])
    assert "bbox/AP" in last

    run(draw, monkeypatch)
    assert str(output.relative_to(folder)) in capsys.readouterr().out
    drawn = len(list((output / "detections").glob("*.png")))
    assert drawn == len(DatasetCatalog.get("mine_val"))

    results = output / "inference" / "coco_instances_results.json"
    before = results.read_text()
    results.unlink()
    monkeypatch.chdir(folder)
    run(evaluate, monkeypatch)
    assert json.loads(results.read_text()) == json.loads(before)
    shutil.rmtree(output)
