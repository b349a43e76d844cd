import collections
import functools
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pisa_d2  # noqa: F401  # isort: skip  (before Detectron2, which it patches)

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from PIL import Image

from pisa_d2.data import digits, drawing
from pisa_d2.data.digits import make_digits, register_digits, split_sources

datasets = pytest.importorskip("sklearn.datasets")

SMALL = {"num_train": 12, "num_val": 5, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_digits(tmp_path_factory.mktemp("data"), **SMALL)


@pytest.fixture
def small_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a registered dataset make few images."""
    monkeypatch.setattr(digits, "make_digits", functools.partial(make_digits, **SMALL))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def read_json(folder: Path, split: str) -> dict[str, Any]:
    return json.loads((folder / "annotations" / f"instances_{split}.json").read_text())


def test_the_seed_decides_every_byte(folder: Path, tmp_path: Path):
    again = contents(make_digits(tmp_path / "again", **SMALL))
    assert again == contents(folder)
    other = contents(make_digits(tmp_path / "other", **{**SMALL, "seed": 4}))
    assert other.keys() == again.keys()
    assert all(other[name] != again[name] for name in again)


def test_a_smaller_dataset_is_the_beginning_of_a_larger_one(folder: Path, tmp_path: Path):
    smaller = contents(make_digits(tmp_path, num_train=2, num_val=1, seed=3) / "train")
    larger = contents(folder / "train")
    assert smaller == {name: larger[name] for name in ("000001.jpg", "000002.jpg")}


def test_no_scan_is_in_both_splits_and_every_class_is():
    labels = datasets.load_digits().target
    for seed in range(3):
        sources = split_sources(labels, seed)
        assert sorted(np.concatenate(list(sources.values()))) == list(range(len(labels)))
        train, val = (np.bincount(labels[sources[split]]) for split in ("train", "val"))
        np.testing.assert_allclose(val / (train + val), 0.2, atol=0.01)


def test_annotations_are_of_the_splits_own_scans_and_their_classes(folder: Path):
    labels = datasets.load_digits().target
    sources = split_sources(labels, SMALL["seed"])
    for split in ("train", "val"):
        content = read_json(folder, split)
        names = {category["id"]: category["name"] for category in content["categories"]}
        for annotation in content["annotations"]:
            assert annotation["source"] in sources[split]
            assert names[annotation["category_id"]] == str(labels[annotation["source"]])


def test_boxes_have_area_inside_images_of_the_size_stated(folder: Path):
    for split in ("train", "val"):
        content = read_json(folder, split)
        assert len(content["images"]) == SMALL[f"num_{split}"]
        for image in content["images"]:
            with Image.open(folder / split / image["file_name"]) as opened:
                assert opened.size == (image["width"], image["height"]) == (256, 192)
        assert len({a["id"] for a in content["annotations"]}) == len(content["annotations"])
        for annotation in content["annotations"]:
            x, y, width, height = annotation["bbox"]
            assert x >= 0 and y >= 0 and width > 0 and height > 0
            assert x + width <= 256 and y + height <= 192
            assert annotation["area"] == width * height
            assert annotation["iscrowd"] == 0


def test_annotated_boxes_are_tight_around_what_is_painted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    grey = np.full((192, 256, 3), 128, dtype=np.float32)
    paint, painted = drawing.paint_digits, []

    def paint_and_keep(*args: Any) -> np.ndarray:
        painted.append(paint(*args))
        return painted[-1]

    monkeypatch.setattr(drawing, "crop_photo", lambda photo, rng: grey)
    monkeypatch.setattr(drawing, "paint_digits", paint_and_keep)
    content = read_json(make_digits(tmp_path, **SMALL), "train")
    boxes = collections.defaultdict(list)
    for annotation in content["annotations"]:
        boxes[annotation["image_id"]].append(annotation["bbox"])
    for image, pixels in zip(content["images"], painted, strict=False):  # val's follow
        change = np.abs(pixels - grey).max(axis=2)
        outside = change.copy()
        for x, y, width, height in boxes[image["id"]]:
            box = change[y : y + height, x : x + width]
            for edge in (box[0], box[-1], box[:, 0], box[:, -1]):
                # Where ink begins, at contrast 45 and strength 0.75, it changes 8 grey levels.
                assert edge.max() >= 8
            # Thinner ink, down to none, fades out beyond the box.
            outside[max(y - 6, 0) : y + height + 6, max(x - 6, 0) : x + width + 6] = 0
        assert outside.max() == 0


@pytest.mark.parametrize("name", ["digits", "digits_easy"])
def test_both_splits_are_registered(name: str, tmp_path: Path, small_datasets: None):
    register_digits(tmp_path)
    for split in ("train", "val"):
        assert f"{name}_{split}" in DatasetCatalog
        metadata = MetadataCatalog.get(f"{name}_{split}")
        assert metadata.thing_classes == list("0123456789")
        assert metadata.evaluator_type == "coco"
        assert Path(metadata.json_file) == tmp_path / name / f"annotations/instances_{split}.json"


def test_easy_digits_are_made_beside_the_others_and_are_other_images(
    folder: Path, tmp_path: Path, small_datasets: None
):
    register_digits(tmp_path)
    records = DatasetCatalog.get("digits_easy_val")
    assert len(records) == SMALL["num_val"]
    assert [path.name for path in tmp_path.iterdir()] == ["digits_easy"]
    assert make_digits(tmp_path, **SMALL, easy=True) == tmp_path / "digits_easy"
    ours, theirs = contents(tmp_path / "digits_easy"), contents(folder)
    assert ours.keys() == theirs.keys()
    assert all(ours[name] != theirs[name] for name in ours)


def test_the_first_load_makes_what_detectron2_then_reads(tmp_path: Path, small_datasets: None):
    root = tmp_path / "not" / "there yet"
    register_digits(root)
    assert not root.exists()
    records = DatasetCatalog.get("digits_train")
    assert len(records) == SMALL["num_train"]
    assert {a["category_id"] for r in records for a in r["annotations"]} <= set(range(10))
    assert all(Path(record["file_name"]).is_file() for record in records)
    assert len(DatasetCatalog.get("digits_val")) == SMALL["num_val"]
    COCOEvaluator("digits_val", output_dir=str(tmp_path / "out"), distributed=False)


def test_one_made_ahead_is_read_whatever_its_size_and_every_load_is_fresh(
    tmp_path: Path, small_datasets: None
):
    make_digits(tmp_path, num_train=2, num_val=1, seed=8)
    register_digits(tmp_path)
    DatasetCatalog.get("digits_train")[0]["annotations"].append("mark")
    records = DatasetCatalog.get("digits_train")
    assert len(records) == 2
    assert "mark" not in records[0]["annotations"]


def test_a_second_call_reuses_it_without_scikit_learn(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    modified = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert make_digits(folder.parent, **SMALL) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == modified


def test_other_arguments_than_it_was_made_with_are_refused(folder: Path):
    with pytest.raises(FileExistsError, match="Remove it") as caught:
        make_digits(folder.parent, **{**SMALL, "seed": 4})
    assert str(folder) in str(caught.value)


def test_a_folder_of_something_else_is_refused(tmp_path: Path):
    (tmp_path / "digits").mkdir()
    with pytest.raises(FileExistsError, match="something else"):
        make_digits(tmp_path, **SMALL)


@pytest.mark.parametrize(
    "wrong", [{"num_train": 0}, {"num_val": -1}, {"seed": -1}, {"max_digits": 0}]
)
def test_impossible_arguments_are_refused(tmp_path: Path, wrong: dict[str, int]):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make_digits(tmp_path, **{**SMALL, **wrong})
    assert list(tmp_path.iterdir()) == []


def test_a_failure_in_the_middle_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    paint, calls = drawing.paint_digits, []

    def fail_at_the_eighth(*args: Any) -> np.ndarray:
        calls.append(args)
        if len(calls) == 8:
            assert list(tmp_path.iterdir()) != []
            raise KeyboardInterrupt
        return paint(*args)

    with monkeypatch.context() as patch:
        patch.setattr(drawing, "paint_digits", fail_at_the_eighth)
        with pytest.raises(KeyboardInterrupt):
            make_digits(tmp_path, **SMALL)
    assert list(tmp_path.iterdir()) == []
    assert len(contents(make_digits(tmp_path, **SMALL))) == 12 + 5 + 2


def test_losing_a_race_is_no_error(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
    paint = drawing.paint_digits

    def let_another_process_finish_first(*args: Any) -> np.ndarray:
        monkeypatch.setattr(drawing, "paint_digits", paint)
        make_digits(tmp_path, **SMALL)
        return paint(*args)

    monkeypatch.setattr(drawing, "paint_digits", let_another_process_finish_first)
    made = make_digits(tmp_path, **SMALL)
    assert list(tmp_path.iterdir()) == [made]
    assert contents(made) == contents(folder)


def test_a_root_that_cannot_be_written_says_how_to_mend_it(tmp_path: Path):
    root = tmp_path / "a file"
    root.write_text("")
    with pytest.raises(OSError, match="DETECTRON2_DATASETS") as caught:
        make_digits(root, **SMALL)
    assert str(root) in str(caught.value)


def test_missing_scikit_learn_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        make_digits(tmp_path, **SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_command_makes_it_and_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    arguments = f"--root {tmp_path} --num-train 2 --num-val 1 --seed 5 --max-digits 1".split()
    monkeypatch.setattr(sys, "argv", ["digits", *arguments])
    runpy.run_module("pisa_d2.data.digits", run_name="__main__")
    assert capsys.readouterr().out.strip() == str(tmp_path / "digits")
    content = read_json(tmp_path / "digits", "train")
    assert len(content["images"]) == 2
    assert len(content["annotations"]) <= 2
