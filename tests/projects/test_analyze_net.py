import csv
import re
from importlib import import_module

import numpy as np
import pytest
import torch
from analysis_models import labelled_images, small_detector
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from helpers import HEADS, ROOT, load_script, random_batch, register_images, small_cfg

analyze = load_script("projects/SampleAnalysis/analyze_net.py")
visualize = load_script("projects/SampleAnalysis/visualize_sampling.py")
collect, sums = (import_module(name) for name in ("collect", "running_sums"))

NUM_FIGURES = {1: 6, 2: 8}


@pytest.fixture
def config(tmp_path):
    """A small model's config, two checkpoints and a data set; its second image has no object."""
    no_mathematics = [r"$\a{$", "{b}_%s", "_c$_{$"]
    register_images("three_images", tmp_path, random_batch([4, 0, 7]), no_mathematics)
    cfg = small_cfg("DATASETS.TEST", ("three_images",), "OUTPUT_DIR", str(tmp_path))
    for name, seed in {"first": 0, "second": 1}.items():
        torch.manual_seed(seed)
        torch.save({"model": build_model(cfg).state_dict()}, tmp_path / f"{name}.pth")
    path = tmp_path / "config.yaml"
    path.write_text(cfg.dump())
    yield path
    DatasetCatalog.remove("three_images")
    MetadataCatalog.remove("three_images")


def run(monkeypatch, config, *words):
    words = ["--config-file", config, "--bootstrap", 10, *words]
    weights = ["MODEL.WEIGHTS", config.parent / "first.pth", "INPUT.MIN_SIZE_TEST", 96]
    monkeypatch.setattr("sys.argv", ["analyze_net.py", *map(str, [*words, *weights])])
    analyze.main()
    return config.parent / "analysis"


@pytest.mark.parametrize("num_checkpoints", NUM_FIGURES)
def test_a_report_of_one_and_of_two_checkpoints(num_checkpoints, config, monkeypatch):
    words = ["--compare-with", config.parent / "second.pth"] if num_checkpoints == 2 else []
    folder = run(monkeypatch, config, *words)
    page = (folder / "report.html").read_text()
    assert not re.search(r"https?:", page)
    sources = re.findall(r'(?:src|href)="([^"]*)', page)
    assert len(sources) == NUM_FIGURES[num_checkpoints]
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert ("--compare-with" in page) == (num_checkpoints == 1)
    for ending in ("png", "svg", "csv"):
        assert len(list(folder.glob(f"*.{ending}"))) == NUM_FIGURES[num_checkpoints]
    for path in folder.glob("*.csv"):
        with path.open() as file:
            rows = list(csv.reader(file))
        assert len({len(row) for row in rows}) == 1, path


def test_a_data_set_without_objects_is_reported_on(config, tmp_path, monkeypatch):
    register_images("nothing", tmp_path, random_batch([0, 0]))
    try:
        words = ["--compare-with", config.parent / "second.pth", "--dataset", "nothing"]
        folder = run(monkeypatch, config, *words)
    finally:
        DatasetCatalog.remove("nothing")
        MetadataCatalog.remove("nothing")
    page = (folder / "report.html").read_text()
    assert "no image has an object" in page and "there is no positive" in page


@pytest.mark.parametrize(
    "words, message",
    [
        (["--num-images", 0], "--num-images must be at least 1"),
        (["--names", "a", "a"], "--names must be two different ones"),
    ],
)
def test_wrong_arguments_are_named(words, message, config, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, config, *words)
    assert message in capsys.readouterr().err


def test_one_stage_detectors_are_refused():
    cfg = analyze.make_cfg(str(ROOT / "configs/BCCD/retinanet_R_18_FPN.yaml"), [])
    with pytest.raises(ValueError, match="RetinaNet"):
        analyze.load(cfg, "")


def test_a_subset_is_taken_evenly(config):
    assert [r["image_id"] for r in analyze.load_records("three_images", 1)] == [1]
    assert [r["image_id"] for r in analyze.load_records("three_images", None)] == [0, 1, 2]


@pytest.mark.parametrize("heads", HEADS)
def test_samples_are_those_of_training(heads):
    cfg, model = small_detector(*HEADS[heads])
    inputs = labelled_images([4, 0, 7])
    found = collect.Observer(model, analyze.samplers_of(cfg), 0.05, 0.5).run(inputs)
    assert found.scores.num_images == 3 and not model.proposal_generator.training
    # Of hard samples, which are not drawn, those that choose_samples chooses.
    hard = {"hard": visualize.STRATEGIES["hard"]}
    of_strategies = visualize.heads_of_strategies(cfg, model, hard)
    model.proposal_generator.training = True
    with EventStorage():
        ious = [visualize.sample(model, of_strategies, x)["hard"].negative_ious for x in inputs]
    ious = np.concatenate(ious)
    samples = found.samples["hard"]
    assert samples.num_overlapping == sum(iou > 0.05 for iou in ious.tolist())
    assert samples.num_negatives == samples.negatives.counts.sum() == len(ious)
    expected = np.zeros(100)
    for iou in ious:
        expected[max(i for i in range(100) if np.linspace(0, 1, 101)[i] <= iou)] += 1
    np.testing.assert_array_equal(samples.negative_ious, expected)
    counts = {name: s.positives.counts.sum() for name, s in found.samples.items()}
    assert len(set(counts.values())) == 1 and counts["hard"] > 0


def test_ranks_are_those_of_the_two_steps():
    cfg, model = small_detector()
    samplers = analyze.samplers_of(cfg)
    ranks = (
        collect.Observer(model, samplers, 0.05, 0.5, ranks_of=1).run(labelled_images([2, 5])).ranks
    )
    num = len(ranks.ious)
    assert num >= 5
    for i in range(num):
        better = [
            j
            for j in range(num)
            if ranks.objects[j] == ranks.objects[i] and (-ranks.ious[j], j) < (-ranks.ious[i], i)
        ]
        assert ranks.local_ranks[i] == len(better)
    for i in range(num):
        before = [
            j
            for j in range(num)
            if ranks.classes[j] == ranks.classes[i]
            and (ranks.local_ranks[j], -ranks.ious[j], j)
            < (ranks.local_ranks[i], -ranks.ious[i], i)
        ]
        assert ranks.hlr[i] == len(before)


def test_scores_are_collected_by_rank_and_by_iou():
    _, model = small_detector()
    found = collect.Observer(model, {}, 0.05, 0.5, with_scored_boxes=True).run(
        labelled_images([4, 7])
    )
    scores, kept = found.scores, found.scored_boxes
    probs, ious, first_ranks = [], [], []
    for image in kept:
        p = (-image.losses).exp()  # of cross-entropy
        torch.testing.assert_close(p, (image.own_logits - image.rest_logits).sigmoid())
        probs += p.tolist()
        ious += image.ious.tolist()
        for class_ in set(image.gt_classes.tolist()):
            rows = [i for i in range(len(p)) if image.gt_classes[i] == class_]
            first_ranks.append(float(p[max(rows, key=lambda i: float(image.ious[i]))]))
    assert scores.positives.counts.sum() == scores.by_iou.counts.sum() == len(probs) > 0
    np.testing.assert_allclose(scores.by_iou.sums.sum(), sum(probs), rtol=1e-5)
    np.testing.assert_allclose(scores.positives.means[0], np.mean(first_ranks), rtol=1e-5)
    np.testing.assert_allclose(scores.correlation.value, np.corrcoef(ious, probs)[0, 1], atol=1e-5)
    assert (np.diff(scores.positives.counts) <= 0).all()


def test_pairs_that_may_be_raised_above_the_threshold_are_kept():
    _, model = small_detector()
    model.roi_heads.box_predictor.test_score_thresh = 2  # above any score
    found = collect.Observer(model, {}, 0.05, 0.5, with_scored_boxes=True).run(labelled_images([9]))
    (image,) = found.scored_boxes
    assert image.owners.tolist() == list(range(len(image.ious))) != []
    assert torch.equal(image.classes, image.gt_classes)


def test_sums_are_those_of_all_values_at_once():
    rng = np.random.default_rng(0)
    density = sums.Density(np.linspace(0, 1, 5), np.array([0.1, 1, 10]))
    means, correlation = sums.Means(), sums.Correlation()
    assert np.isnan(correlation.value)
    x, y, keys = rng.random(90), rng.random(90) * 12, rng.integers(0, 9, 90)
    for part in np.split(np.arange(90), [10, 10, 50]):  # one of them empty
        density.add(x[part], y[part])
        means.add(keys[part], y[part])
        correlation.add(x[part], y[part])
    expected = np.histogram2d(x, y.clip(0.1, 10), (density.x_edges, density.y_edges))[0]
    np.testing.assert_array_equal(density.counts, expected)
    for key in range(9):
        np.testing.assert_allclose(means.means[key], y[keys == key].mean())
    np.testing.assert_allclose(correlation.value, np.corrcoef(x, y)[0, 1])


def test_a_value_on_an_edge_is_in_the_upper_cell():
    cells = sums.cells_of(np.array([-1, 0, 0.25, 0.3, 1, 2]), np.linspace(0, 1, 5))
    np.testing.assert_array_equal(cells, [0, 0, 1, 1, 3, 3])
