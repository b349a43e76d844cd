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
# Scan, left and upper edge, height and width of the digits of an image.
SCENE = [
    (484, 144, 81, (109, 79)),
    (553, 159, 37, (57, 39)),
    (73, 197, 95, (20, 15)),
    (135, 6, 10, (79, 53)),
    (29, 94, 55, (55, 33)),
    (314, 6, 88, (24, 17)),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_digits(tmp_path_factory.mktemp("data"), **SMALL)


def place(num_images: int, style: drawing.Style, seed: int = 0) -> list[list[drawing.Digit]]:
    """Place the digits of images."""
    scans, labels = datasets.load_digits(return_X_y=True)
    sources = np.arange(len(labels))
    rng = np.random.default_rng(seed)
    scans = scans.reshape(-1, 8, 8)
    return [drawing.place_digits(scans, sources, rng, style) for _ in range(num_images)]


@pytest.fixture(scope="module")
def scenes() -> list[list[drawing.Digit]]:
    return place(60, drawing.Style())


@pytest.fixture
def catalogs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what a test registers, and make small datasets."""
    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", dict(catalog.data))
    monkeypatch.setattr(digits, "make_digits", functools.partial(make_digits, **SMALL))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def read_json(folder: Path, split: str) -> dict[str, Any]:
    return json.loads((folder / "annotations" / f"instances_{split}.json").read_text())


def iou(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (a, b)]
    return width * height / (sum(areas) - width * height)


def visible_pixels(scene: list[drawing.Digit]) -> list[set[tuple[int, int]]]:
    """Find the (x, y) of each digit's ink that no later digit's ink covers, one by one."""
    visible: list[set[tuple[int, int]]] = []
    for digit in scene:
        height, width = digit.opacity.shape
        ink = {
            (digit.x + x, digit.y + y)
            for y in range(height)
            for x in range(width)
            if digit.opacity[y, x] >= drawing.INK
        }
        visible = [pixels - ink for pixels in visible] + [ink]
    return visible


def test_the_seed_decides_every_byte(folder: Path, tmp_path: Path):
    again = contents(make_digits(tmp_path / "again", **SMALL))
    assert again == contents(folder)
    other = contents(make_digits(tmp_path / "other", **{**SMALL, "seed": 4}))
    assert other.keys() == again.keys()
    assert all(other[name] != again[name] for name in again)


def test_the_digits_of_the_results_are_drawn_as_ever():
    """The tables of docs/results.md are about these images."""
    (scene,) = place(1, drawing.Style())
    assert [(digit.source, digit.x, digit.y, digit.opacity.shape) for digit in scene] == SCENE


def test_a_smaller_data_set_is_the_beginning_of_a_larger_one(folder: Path, tmp_path: Path):
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


def test_boxes_are_those_of_the_visible_ink(scenes: list[list[drawing.Digit]]):
    for scene in scenes[:20]:
        owner = drawing.topmost(scene)
        for index, pixels in enumerate(visible_pixels(scene)):
            xs, ys = zip(*pixels, strict=True)
            expected = (min(xs), min(ys), max(xs) + 1, max(ys) + 1)
            assert drawing.ink_box(owner == index) == expected


def test_digits_overlap_but_stay_visible(scenes: list[list[drawing.Digit]]):
    overlaps = []
    for scene in scenes:
        boxes = []
        for digit, pixels in zip(scene, visible_pixels(scene), strict=True):
            assert len(pixels) >= drawing.Style.min_visible * (digit.opacity >= drawing.INK).sum()
            xs, ys = zip(*pixels, strict=True)
            boxes.append((min(xs), min(ys), max(xs) + 1, max(ys) + 1))
        overlaps += [iou(a, b) for i, a in enumerate(boxes) for b in boxes[:i]]
    assert max(overlaps) <= drawing.Style.max_iou
    assert sum(overlap > 0.1 for overlap in overlaps) >= 20


def test_sizes_are_small_medium_and_large_and_some_images_empty(
    scenes: list[list[drawing.Digit]],
):
    areas = np.array([digit.opacity.size for scene in scenes for digit in scene])
    assert (areas < 32**2).sum() >= 50
    assert ((areas >= 32**2) & (areas < 96**2)).sum() >= 50
    assert (areas >= 96**2).sum() >= 5
    counts = [len(scene) for scene in scenes]
    assert min(counts) == 0
    assert max(counts) == 9


@pytest.mark.parametrize(("most", "least"), [(1, 1), (2, 1), (9, 3)])
def test_images_have_as_many_digits_as_asked_for(most: int, least: int):
    counts = {len(scene) for scene in place(60, drawing.Style(max_digits=most), seed=1)}
    assert max(counts) == most
    assert {*range(least, most + 1)} <= counts <= {*range(most + 1)}


def test_easy_digits_are_few_large_and_apart():
    scenes = place(60, drawing.EASY)
    assert max(len(scene) for scene in scenes) == 5
    heights, overlaps = [], []
    for scene in scenes:
        boxes = [drawing.ink_box(drawing.topmost(scene) == index) for index in range(len(scene))]
        heights += [y1 - y0 for _, y0, _, y1 in boxes]
        overlaps += [iou(a, b) for i, a in enumerate(boxes) for b in boxes[:i]]
    assert min(heights) >= 32
    assert max(overlaps) <= 0.15


@pytest.mark.parametrize("name", ["digits", "digits_easy"])
def test_both_splits_are_registered(name: str, tmp_path: Path, catalogs: None):
    register_digits(tmp_path)
    for split in ("train", "val"):
        assert f"{name}_{split}" in DatasetCatalog
        metadata = MetadataCatalog.get(f"{name}_{split}")
        assert metadata.thing_classes == list("0123456789")
        assert metadata.evaluator_type == "coco"
        assert Path(metadata.json_file) == tmp_path / name / f"annotations/instances_{split}.json"


def test_easy_digits_are_made_beside_the_others_and_are_other_images(
    folder: Path, tmp_path: Path, catalogs: None
):
    register_digits(tmp_path)
    records = DatasetCatalog.get("digits_easy_val")
    assert len(records) == SMALL["num_val"]
    assert [path.name for path in tmp_path.iterdir()] == ["digits_easy"]
    assert make_digits(tmp_path, **SMALL, easy=True) == tmp_path / "digits_easy"
    ours, theirs = contents(tmp_path / "digits_easy"), contents(folder)
    assert ours.keys() == theirs.keys()
    assert all(ours[name] != theirs[name] for name in ours)


def test_the_first_load_makes_what_detectron2_then_reads(tmp_path: Path, catalogs: None):
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
    tmp_path: Path, catalogs: None
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
