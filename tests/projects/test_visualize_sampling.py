import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from helpers import HEADS, ROOT, load_script, random_batch, register_images, small_cfg
from matplotlib.figure import Figure

visualize = load_script("projects/SampleAnalysis/visualize_sampling.py")


@pytest.fixture
def config(tmp_path):
    """A small model's config and weights, and a dataset of two images, one without objects."""
    register_images("two_images", tmp_path, random_batch([4, 0]))
    cfg = small_cfg("DATASETS.TEST", ("two_images",), "OUTPUT_DIR", str(tmp_path))
    path = tmp_path / "config.yaml"
    path.write_text(cfg.dump())
    return path


def run(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["visualize_sampling.py", *map(str, words)])
    visualize.main()


def test_a_picture_of_each_image_and_a_row_for_each_strategy(config, monkeypatch, capsys):
    words = ["--strategies", "random", "prime", "RandomSampler+HardSampler", "--images", 0]
    run(monkeypatch, "--config-file", config, *words, "image1.png")
    for name in ("image0.png", "image1.png"):
        assert (config.parent / "sampling" / name).read_bytes().startswith(b"\x89PNG")
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:5]]
    assert [row[0].strip() for row in rows] == ["random", "prime", "RandomSampler+HardSampler"]
    assert all(0 <= float(row[2].strip(" %")) <= 100 for row in rows)


def test_an_image_is_found_by_index_name_and_folder():
    paths = ["d/a/1.png", "d/b/1.png", "d/b/2.png", "d/b/12.png"]
    find = visualize.find_image
    assert [find(name, paths) for name in ("2.png", "b/1.png", "d/a/1.png", "0")] == [2, 1, 0, 0]
    with pytest.raises(ValueError, match=r"several .*'1.png'.*'d/a/1.png' and 'd/b/1.png'.*as 0"):
        find("1.png", paths)


@pytest.mark.parametrize("heads", HEADS)
def test_samples_are_those_of_each_strategy(heads):
    torch.manual_seed(0)
    opts = [*HEADS[heads], "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16]
    cfg = small_cfg(*opts)
    model = visualize.build_model(cfg).train()
    of_strategies = visualize.heads_of_strategies(cfg, model, visualize.STRATEGIES)
    inputs = random_batch([4])[0]
    with visualize.EventStorage():
        chosen = visualize.sample(model, of_strategies, inputs)
    assert list(chosen) == list(visualize.STRATEGIES)
    for samples in chosen.values():
        assert len(samples.positives) + len(samples.negatives) == 16
        assert (samples.positive_ious >= 0.5).all() and (samples.negative_ious < 0.5).all()
    counts = np.unique(chosen["IoU-balanced"].objects, return_counts=True)[1]
    assert len(counts) == 4


def test_heads_of_detectron2_are_taken_for_those_of_this_package():
    config = str(ROOT / "configs/BCCD/faster_rcnn_R_18_FPN.yaml")
    assert visualize.setup(config, []).MODEL.ROI_HEADS.NAME == "PISAROIHeads"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--images", "2"], "there is no index 2"),
        (["--images", "cell.png"], "no image of the file name 'cell.png'"),
        (["--strategies", "best"], "'best' must be one of"),
    ],
)
def test_wrong_arguments_are_named(words, message, config, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--config-file", config, *words)
    assert message in capsys.readouterr().err


def test_regions_are_hatched_and_what_is_ignored_is_counted(tmp_path, monkeypatch, capsys):
    batch = random_batch([3])
    register_images("crowded", tmp_path, batch)
    [record] = DatasetCatalog.get("crowded")
    height, width = record["height"], record["width"]
    region = {"bbox": [0, 0, width // 2, height], "bbox_mode": 0, "category_id": 0, "iscrowd": 1}
    record["annotations"].append(region)
    DatasetCatalog.pop("crowded")
    DatasetCatalog.register("crowded", lambda: [record])
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure))
    rows = []
    for on in (True, False):
        opts = ["MODEL.IGNORED_REGIONS.ENABLED", on, "OUTPUT_DIR", str(tmp_path)]
        cfg = small_cfg("DATASETS.TEST", ("crowded",), *opts)
        (tmp_path / "config.yaml").write_text(cfg.dump())
        run(monkeypatch, "--config-file", tmp_path / "config.yaml", "--strategies", "random")
        rows.append(capsys.readouterr().out.splitlines()[:3])

    hatched = [[bool(p.get_hatch()) for a in f.axes[:2] for p in a.patches] for f in drawn]
    assert sum(hatched[0]) == 2 and not any(hatched[1])
    (header, _, row), (plain, _, _) = rows
    assert header.endswith("| ignored in regions, per image |") and "ignored" not in plain
    num = int(row.split("|")[-2])
    titles = [figure.axes[1].get_title() for figure in drawn]
    assert titles[0].endswith(f"regions to ignore: 1, {num} proposals") and num > 0
    assert "regions" not in titles[1]
