import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pisa_d2  # noqa: F401  # isort: skip  (Detectron2 0.6 cannot be imported before it)

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "projects" / "ShowDetections" / "show_detections.py"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("show_detections", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


show = load_script()

# Category ids 7 and 3 of the dataset become classes 1 and 0.
CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]
ANNOTATIONS = [
    {"image_id": 11, "category_id": 7, "bbox": [10, 20, 30, 20], "iscrowd": 0},
    {"image_id": 11, "category_id": 3, "bbox": [50, 5, 10, 10], "iscrowd": 0},
    {"image_id": 12, "category_id": 3, "bbox": [0, 0, 40, 30], "iscrowd": 1},
]
RESULTS = [
    {"image_id": 11, "category_id": 3, "bbox": [11, 21, 30, 20], "score": 0.95},
    {"image_id": 12, "category_id": 3, "bbox": [5, 5, 10, 10], "score": 0.7},
    {"image_id": 11, "category_id": 7, "bbox": [12, 20, 30, 20], "score": 0.9},
    {"image_id": 11, "category_id": 3, "bbox": [50, 5, 10, 10], "score": 0.49},
    {"image_id": 12, "category_id": 3, "bbox": [6, 6, 10, 10], "score": 0.8},
]
METRICS = {"AP": 12.34, "AP50": 50.0, "AP75": 1.0, "APs": float("nan"), "APm": 2.0, "APl": 3.0}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output folder of a run on two images of 64x48, "pets", registered."""
    images = []
    for image_id in (11, 12):
        Image.new("RGB", (64, 48)).save(tmp_path / f"{image_id}.jpg")
        images.append({"id": image_id, "file_name": f"{image_id}.jpg", "width": 64, "height": 48})
    annotations = [{"id": i, "area": 1, **item} for i, item in enumerate(ANNOTATIONS, start=1)]
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (tmp_path / "pets.json").write_text(json.dumps(content))
    register_coco_instances("pets", {}, str(tmp_path / "pets.json"), str(tmp_path))

    run = tmp_path / "run"
    (run / "inference").mkdir(parents=True)
    write_config(run, ["pets"])
    write_results(run, RESULTS)
    lines = [{"total_loss": 1.0}, {"bbox/AP": 1.0}, {"total_loss": 0.5}]
    lines += [{f"bbox/{key}": value for key, value in METRICS.items()}, {"total_loss": 0.2}]
    (run / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def write_config(run: Path, test_sets: list[str], model: dict | None = None) -> None:
    config = {"DATASETS": {"TEST": test_sets}, "KEY_OF_ANOTHER_PROJECT": 1, "MODEL": model or {}}
    (run / "config.yaml").write_text(json.dumps(config))


def write_results(run: Path, results: list[dict]) -> None:
    (run / "inference" / "coco_instances_results.json").write_text(json.dumps(results))


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *map(str, arguments)])
    show.main()


def test_boxes_classes_and_scores_are_those_of_the_run(run: Path):
    pets, crowd = show.load_pictures(run, num_images=6, min_score=0.5)
    assert [Path(picture.path).name for picture in (pets, crowd)] == ["11.jpg", "12.jpg"]
    assert [(b.label, b.class_id, b.xywh) for b in pets.truth] == [
        ("dog", 1, [10, 20, 30, 20]),
        ("cat", 0, [50, 5, 10, 10]),
    ]
    assert [(b.label, b.class_id, b.xywh) for b in pets.detections] == [
        ("cat 0.95", 0, [11, 21, 30, 20]),
        ("dog 0.90", 1, [12, 20, 30, 20]),
    ]
    assert [b.label for b in crowd.detections] == ["cat 0.80", "cat 0.70"]


def test_right_wrong_and_missed_are_told_apart(run: Path):
    pets, crowd = show.load_pictures(run, num_images=6, min_score=0.5)
    assert [b.matched for b in pets.truth] == [True, False]  # no detection of the cat scores 0.5
    assert [b.matched for b in pets.detections] == [False, True]  # the first is of another class
    assert [b.matched for b in crowd.truth + crowd.detections] == [True, True, True]
    pets, _ = show.load_pictures(run, num_images=6, min_score=0.4)
    assert [b.matched for b in pets.truth] == [True, True]
    assert [b.matched for b in pets.detections] == [False, True, True]


def test_detections_in_a_crowd_are_ignored_and_with_regions_on_those_in_ignored_objects_too(
    run: Path,
):
    pets, crowd = show.load_pictures(run, num_images=6, min_score=0.5)
    assert [b.ignored for b in pets.detections + crowd.detections] == [False, False, True, True]
    records = DatasetCatalog.get("pets")
    for record in records:
        for item in record["annotations"]:
            item["ignore"] = 1
    DatasetCatalog.pop("pets")
    DatasetCatalog.register("pets", lambda: records)
    for on in (False, True):
        write_config(run, ["pets"], {"IGNORED_REGIONS": {"ENABLED": on}})
        pets, _ = show.load_pictures(run, num_images=6, min_score=0.5)
        assert [b.crowd for b in pets.truth] == [on, on]
        assert [b.ignored for b in pets.detections] == [False, on]


def test_crowds_and_what_they_take_are_hatched_and_counted(run: Path, tmp_path: Path):
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(show.Figure, "savefig", lambda figure, path: drawn.append(figure))
        for picture in show.load_pictures(run, num_images=6, min_score=0.5):
            show.draw([picture], tmp_path / "a.png", panel_width=4)
    hatches = [[bool(p.get_hatch()) for a in f.axes for p in a.patches] for f in drawn]
    assert hatches == [[False] * 4, [True] * 3]
    titles = [axes.get_title() for figure in drawn for axes in figure.axes]
    assert ["ignored (hatched)" in title for title in titles] == [False, False, True, True]
    assert titles[2:] == [
        "ground truth: 1, missed (dashed): 0, ignored (hatched): 1",
        "detections: 2, wrong (dashed): 0, ignored (hatched): 2",
    ]


def test_an_object_is_found_once_and_by_the_best_overlap():
    def box(x: float) -> show.Box:
        return show.Box([x, 0, 10, 10], 0, "")

    truth = [box(0), box(4), box(100)]
    detections = [box(3), box(3), box(3), box(105.1)]  # IoU with the first two: 0.54 and 0.82
    show.match(truth, detections)
    assert [b.matched for b in truth] == [True, True, False]
    assert [b.matched for b in detections] == [True, True, False, False]
    truth, detections = [box(0), box(4)], [box(3)]
    show.match(truth, detections)
    assert [b.matched for b in truth] == [False, True]


def test_ids_without_a_mapping_and_corner_boxes_are_understood(run: Path):
    item = {"bbox": [1.0, 2.0, 31.0, 22.0], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1}
    record = {"file_name": str(run.parent / "11.jpg"), "image_id": "a", "annotations": [item]}
    DatasetCatalog.register("cells", lambda: [record])
    MetadataCatalog.get("cells").thing_classes = ["red", "white"]
    write_config(run, ["cells"])
    write_results(run, [{"image_id": "a", "category_id": 1, "bbox": [1, 2, 30, 20], "score": 0.5}])
    (picture,) = show.load_pictures(run, num_images=6, min_score=0.5)
    assert picture.truth == [show.Box([1, 2, 30, 20], 1, "white", matched=True)]
    assert picture.detections == [show.Box([1, 2, 30, 20], 1, "white 0.50", matched=True)]


@pytest.mark.parametrize(
    ("count", "chosen"), [(1, [3]), (2, [1, 4]), (3, [1, 3, 5]), (9, range(6))]
)
def test_images_are_taken_evenly(run: Path, count: int, chosen: list[int]):
    DatasetCatalog.register("six", lambda: [{"file_name": str(i), "image_id": i} for i in range(6)])
    MetadataCatalog.get("six").thing_classes = ["red"]
    write_config(run, ["six"])
    write_results(run, [])
    pictures = show.load_pictures(run, count, min_score=0.5)
    assert [picture.path for picture in pictures] == [str(i) for i in chosen]


def test_of_several_test_sets_the_last_is_shown(run: Path):
    # Each evaluation overwrites the results of the previous one.
    write_config(run, ["unknown", "pets"])
    assert len(show.load_pictures(run, num_images=6, min_score=0.5)) == 2
    line = {"unknown/bbox/AP": 1.0, **{f"pets/bbox/{k}": v for k, v in METRICS.items()}}
    (run / "metrics.json").write_text(json.dumps(line) + "\n")
    assert show.last_metrics(run)["AP50"] == 50.0


@pytest.mark.parametrize("results", [RESULTS, []], ids=["detections", "no detections"])
def test_pictures_and_ap_are_written_and_the_folder_named_last(
    run: Path,
    results: list[dict],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    write_results(run, results)
    (run / "detections").mkdir()
    (run / "detections" / "old.png").touch()
    call(monkeypatch, run)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(run)
    assert lines[-3].split() == ["AP", "AP50", "AP75", "APs", "APm", "APl"]
    assert lines[-2].split() == ["12.3", "50.0", "1.0", "nan", "2.0", "3.0"]
    assert sorted(p.name for p in (run / "detections").iterdir()) == ["11.png", "12.png"]
    with Image.open(run / "detections" / "11.png") as picture:
        assert picture.size[0] == 1600
    with Image.open(run / "detections.png") as sheet:
        assert sheet.size[0] == 2000


def test_images_of_equal_name_and_classes_of_any_name_are_drawn(
    run: Path, monkeypatch: pytest.MonkeyPatch
):
    records = []
    for folder in ("a", "b"):
        (run.parent / folder).mkdir()
        Image.new("RGB", (64, 48)).save(run.parent / folder / "1.jpg")
        item = {"bbox": [1, 2, 30, 20], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
        path = str(run.parent / folder / "1.jpg")
        records.append({"file_name": path, "image_id": folder, "annotations": [item]})
    DatasetCatalog.register("odd", lambda: records)
    MetadataCatalog.get("odd").thing_classes = [r"$\nothing{ a_b$ {0} %s"]
    write_config(run, ["odd"])
    result = {"category_id": 0, "bbox": [1, 2, 30, 20], "score": 0.5}
    write_results(run, [{"image_id": folder, **result} for folder in ("a", "b")])
    call(monkeypatch, run)
    pictures = sorted((run / "detections").iterdir())
    assert [path.name for path in pictures] == ["a_1.jpg.png", "b_1.jpg.png"]


def test_a_run_evaluated_as_pascal_voc_is_shown(run: Path, monkeypatch, capsys):
    from detectron2.structures import Boxes, Instances

    from pisa_d2.detections import DetectionsWriter

    box = {"bbox": [1.0, 2.0, 31.0, 22.0], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1}
    record = {"file_name": str(run.parent / "11.jpg"), "image_id": "000011", "annotations": [box]}
    DatasetCatalog.register("voc", lambda: [record])
    MetadataCatalog.get("voc").set(thing_classes=["cat", "dog"], evaluator_type="pascal_voc")
    write_config(run, ["voc"])
    found = Instances((48, 64), scores=torch.tensor([0.9]), pred_classes=torch.tensor([1]))
    found.pred_boxes = Boxes(torch.tensor([[1.0, 2.0, 31.0, 22.0]]))
    writer = DetectionsWriter(str(run / "inference"))
    writer.process([record], [{"instances": found}])
    assert writer.evaluate() is None
    metrics = {"bbox/AP": 40.0, "bbox/AP50": 80.0, "bbox/AP75": None}
    (run / "metrics.json").write_text(json.dumps(metrics) + "\n")
    (picture,) = show.load_pictures(run, num_images=6, min_score=0.5)
    assert picture.detections == [show.Box([1, 2, 30, 20], 1, "dog 0.90", matched=True)]
    call(monkeypatch, run)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].split() == ["AP", "AP50", "AP75"]
    assert lines[-2].split() == ["40.0", "80.0", "nan"]


def test_the_dataset_of_a_later_evaluation_is_shown_and_another_ones_detections_refused(run: Path):
    write_config(run, ["other"])
    (run / "inference" / "config.yaml").write_text(json.dumps({"DATASETS": {"TEST": ["pets"]}}))
    assert len(show.load_pictures(run, num_images=6, min_score=0.5)) == 2
    write_results(run, [{"image_id": 99, "category_id": 3, "bbox": [1, 2, 3, 4], "score": 0.9}])
    with pytest.raises(ValueError, match="image 99, which 'pets' does not have"):
        show.load_pictures(run, num_images=6, min_score=0.5)


def test_without_ap_the_pictures_are_still_drawn(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (run / "metrics.json").unlink()
    call(monkeypatch, run, "--num-images", 1)
    assert "AP50" not in (out := capsys.readouterr().out)
    assert out.splitlines()[-1] == str(run)
    assert (run / "detections.png").is_file()


@pytest.mark.parametrize(
    ("missing", "parts"),
    [
        (".", ["There is no folder"]),
        ("config.yaml", ["config.yaml", "train_net.py"]),
        ("inference/coco_instances_results.json", ["results.json", "--eval-only", "Train"]),
    ],
)
def test_errors_say_what_is_missing(
    run: Path, missing: str, parts: list[str], monkeypatch: pytest.MonkeyPatch
):
    (run / missing).rename(run.parent / "elsewhere")
    with pytest.raises(SystemExit) as caught:
        call(monkeypatch, run)
    for part in (str(run), *parts):
        assert part in caught.value.code


@pytest.mark.parametrize(("test_sets", "part"), [([], "is empty"), (["fish"], "'fish'")])
def test_a_run_without_a_known_test_set_is_refused(
    run: Path, test_sets: list[str], part: str, monkeypatch: pytest.MonkeyPatch
):
    write_config(run, test_sets)
    with pytest.raises(SystemExit, match=part):
        call(monkeypatch, run)


def test_no_images_are_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        call(monkeypatch, run, "--num-images", 0)
    assert "--num-images must be at least 1" in capsys.readouterr().err
