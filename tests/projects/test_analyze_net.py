import csv
import re
from importlib import import_module

import numpy as np
import pytest
import torch
from analysis_models import labelled_images, small_detector
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from helpers import (
    HEADS,
    load_script,
    random_batch,
    register_images,
    small_cfg,
    small_retinanet_cfg,
    stock,
)
from torchvision import ops

analyze = load_script("projects/SampleAnalysis/analyze_net.py")
visualize = load_script("projects/SampleAnalysis/visualize_sampling.py")
NAMES = ("collect", "dataset_detections", "loading", "records", "running_sums", "scenes")
collect, dataset_detections, loading, records, sums, scenes = (
    import_module(name) for name in NAMES
)

OF_DETECTOR = {
    *("negative_ious", "samples", "positives_per_object", "what_if"),
    *("prime_and_hard", "iou_hlr", "score_hlr", "where_samples_lie"),
    *("scores_by_rank", "scores_by_iou"),
}
OF_RUNS = {"after_training", "detections", "average_precision"}


@pytest.fixture
def config(tmp_path):
    """A small model's config, two checkpoints and a dataset; its second image has no object."""
    no_mathematics = [r"$\a{$", "{b}_%s", "_c$_{$"]
    register_images("three_images", tmp_path, random_batch([4, 0, 7]), no_mathematics)
    few = ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16]  # so that not all positives are taken
    cfg = small_cfg("DATASETS.TEST", ("three_images",), "OUTPUT_DIR", str(tmp_path), *few)
    for name, seed in {"first": 0, "second": 1}.items():
        torch.manual_seed(seed)
        torch.save({"model": build_model(cfg).state_dict()}, tmp_path / f"{name}.pth")
    path = tmp_path / "config.yaml"
    path.write_text(cfg.dump())
    return path


def run(monkeypatch, config, *words, with_detector=True):
    words = ["--config-file", config, "--bootstrap", 10, *words]
    keys = ["MODEL.WEIGHTS", config.parent / "first.pth"] if with_detector else []
    keys += ["INPUT.MIN_SIZE_TEST", 96]
    monkeypatch.setattr("sys.argv", ["analyze_net.py", *map(str, [*words, *keys])])
    analyze.main()
    return config.parent / "analysis"


def two_runs(config):
    first, second = (config.parent / f"{name}.pth" for name in ("first", "second"))
    return ["--run", "plain", first, first, "--run", "PISA", second, second]


@pytest.mark.slow
@pytest.mark.parametrize("with_runs", [False, True])
def test_a_report_of_a_detector_and_of_runs(with_runs, config, monkeypatch):
    folder = run(monkeypatch, config, *(two_runs(config) if with_runs else []))
    page = (folder / "report.html").read_text()
    assert not re.search(r"https?:", page)
    names = {path.stem for path in folder.glob("*.png")}
    # This detector, which is not trained, may find nothing to draw for two of the figures.
    expected = OF_DETECTOR | (OF_RUNS if with_runs else set())
    assert names - {"lower_loss", "ap_revisited"} == expected
    assert "lower_loss" in names or "A lower loss: no object" in page
    assert "ap_revisited" in names or "AP revisited: no image" in page
    sources = re.findall(r'(?:src|href)="([^"]*)', page)
    assert len(sources) == len(names)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert ("(--run)" in page) != with_runs
    assert {path.stem for path in folder.glob("*.svg")} == names
    tables = {path.stem for path in folder.glob("*.csv")}
    assert tables == names | {f"{name}_caption" for name in names}
    for path in folder.glob("*.csv"):
        with path.open() as file:
            rows = list(csv.reader(file))
        assert len({len(row) for row in rows}) == 1 and len(rows) > 1, path
    # Every caption says what it is of.
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert len(captions) == len(names)
    assert all("3 images of three_images with 11 objects" in caption for caption in captions)


def numbers_of(folder, name):
    with (folder / f"{name}_caption.csv").open() as file:
        return {row["number"]: row["value"] for row in csv.DictReader(file)}


@pytest.mark.slow
def test_equal_runs_do_not_differ(config, monkeypatch):
    first = config.parent / "first.pth"
    runs = ["--run", "plain", first, first, "--run", "again", first, first]
    folder = run(monkeypatch, config, *runs, with_detector=False)
    names = {"scores_by_rank", "scores_by_iou", "after_training", "detections"}
    assert {path.stem for path in folder.glob("*.png")} == {*names, "average_precision"}
    for name in ("scores_by_rank", "scores_by_iou", "after_training", "average_precision"):
        changes = {k: v for k, v in numbers_of(folder, name).items() if "again - plain" in k}
        assert len(changes) >= 6
        assert {float(value) for value in changes.values()} == {0.0}


@pytest.mark.slow
def test_a_dataset_without_objects_is_reported_on(config, tmp_path, monkeypatch):
    register_images("nothing", tmp_path, random_batch([0, 0]))
    folder = run(monkeypatch, config, *two_runs(config), "--dataset", "nothing")
    page = (folder / "report.html").read_text()
    assert page.count("there is no positive") == 3


@pytest.mark.parametrize(
    "words, message",
    [
        (["--num-images", 0], "--num-images must be at least 1"),
        (["--run", "a", "x", "--run", "a", "y"], "the names of runs must differ"),
        (["--run", "a", "x"], "--run must be given twice or more"),
        (["--run", "a", "--run", "b"], "one checkpoint or more"),
        (["--run", "a", "x", "--run", "b", "x", "y"], "equally many checkpoints, not [1, 2]"),
    ],
)
def test_wrong_arguments_are_named(words, message, config, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, config, *words)
    assert message in capsys.readouterr().err


def test_a_detector_or_runs_must_be_named(config, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, config, with_detector=False)
    assert "name a detector with MODEL.WEIGHTS" in capsys.readouterr().err


def test_config_keys_after_the_last_run_are_not_checkpoints():
    words = ["ISR", "a/ISR.pth", "b.pth", "MODEL.WEIGHTS", "c.pth", "SEED", "1"]
    assert analyze.take_config_keys(words) == ["MODEL.WEIGHTS", "c.pth", "SEED", "1"]
    assert words == ["ISR", "a/ISR.pth", "b.pth"]


@pytest.mark.parametrize(
    "cfg, message",
    [
        (small_retinanet_cfg(), "'PISARetinaNet'.* no two-stage detector"),
        (small_cfg("MODEL.META_ARCHITECTURE", "ProposalNetwork"), "'ProposalNetwork'"),
        (
            small_cfg("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"),
            "proposals of its own",
        ),
        (small_cfg(*stock("PISAROIHeads")), "'StandardROIHeads' are no heads with PISAMixin"),
    ],
)
def test_other_models_than_two_stage_detectors_with_the_mixin_are_refused(cfg, message):
    with pytest.raises(ValueError, match=message):
        loading.load_detector(cfg, "")


def test_a_subset_is_taken_evenly(config):
    assert [r["image_id"] for r in records.load_records("three_images", 1)] == [1]
    assert [r["image_id"] for r in records.load_records("three_images", None)] == [0, 1, 2]
    assert records.num_objects(records.load_records("three_images", None)) == 11


@pytest.mark.parametrize("heads", HEADS)
def test_samples_are_those_of_training(heads):
    cfg, model = small_detector(*HEADS[heads])
    inputs = labelled_images([4, 0, 7])
    samplers = loading.samplers_of(cfg, ("random", "hard", "prime"))
    found = collect.Observer(model, samplers, 0.05, 0.5).run(inputs)
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


@pytest.mark.parametrize("heads", HEADS)
def test_detections_are_those_of_the_detector(heads):
    _, model = small_detector(*HEADS[heads])
    inputs = labelled_images([4, 0, 7])
    found = collect.Observer(model, {}, 0.05, 0.5).run(inputs).detections
    with torch.no_grad():
        expected = dataset_detections.Detections()
        for image in inputs:
            expected.add(model([image])[0]["instances"], image["image_id"])
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert (a["image_id"], a["category_id"]) == (b["image_id"], b["category_id"])
        np.testing.assert_allclose([*a["bbox"], a["score"]], [*b["bbox"], b["score"]], rtol=1e-4)


def test_detectors_with_equal_parts_share_them_and_find_what_they_find_alone():
    models = []
    for seed in (0, 1, 2):
        _, model = small_detector()
        torch.manual_seed(seed)
        torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.1 * seed)
        models.append(model)
    with torch.no_grad():
        models[2].backbone.fpn_output2.weight.add_(0.1)
    inputs = labelled_images([4, 0, 7])
    alone = [collect.Observer(model, {}, 0.05, 0.5).run(inputs) for model in models]
    collect.share_frozen_parts(models)
    assert models[1].backbone is models[0].backbone is not models[2].backbone
    observers = [collect.Observer(model, {}, 0.05, 0.5) for model in models]
    together = collect.observe_all(observers, inputs)
    assert len(list(alone[1].detections)) > 0
    for a, b in zip(alone, together, strict=True):
        assert list(a.detections) == list(b.detections)
        assert a.scores.positives.sums.tolist() == b.scores.positives.sums.tolist()
    assert list(alone[0].detections) != list(alone[1].detections)


def scene_of(num_objects, ranked_above=0.05):
    cfg, model = small_detector()
    samplers = loading.samplers_of(cfg, ("random", "IoU-balanced"))
    observer = collect.Observer(model, samplers, ranked_above, 0.5, scene_of=0)
    return observer.run(labelled_images([num_objects]))


def test_ranks_are_those_of_the_two_steps():
    scene = scene_of(9).scene
    assert len(scene.positives) >= 3 and len(scene.negatives) >= 20
    assert len(np.unique(scene.negatives.groups)) >= 3
    for ranks, values in (
        (scene.positives, scene.positives.ious),
        (scene.negatives, scene.negatives.scores),
    ):
        num = len(ranks)
        for i in range(num):
            better = [
                j
                for j in range(num)
                if ranks.groups[j] == ranks.groups[i] and (-values[j], j) < (-values[i], i)
            ]
            assert ranks.local_ranks[i] == len(better)
        for i in range(num):
            before = [
                j
                for j in range(num)
                if ranks.partitions[j] == ranks.partitions[i]
                and (ranks.local_ranks[j], -values[j], j) < (ranks.local_ranks[i], -values[i], i)
            ]
            assert ranks.ranks[i] == len(before)


def test_groups_of_negatives_are_the_boxes_that_nms_keeps():
    negatives = scene_of(9).scene.negatives
    kept = ops.nms(torch.tensor(negatives.boxes), torch.tensor(negatives.scores), 0.5)
    firsts = np.flatnonzero(negatives.local_ranks == 0)
    assert sorted(kept.tolist()) == firsts.tolist()


def test_the_hardest_negative_has_the_highest_loss_of_all():
    cfg, model = small_detector()
    with torch.no_grad():  # scores differ
        model.roi_heads.box_predictor.cls_score.weight.normal_(std=0.3)
    samplers = loading.samplers_of(cfg, ("random",))
    observer = collect.Observer(model, samplers, 0.05, 0.5, scene_of=0)
    scene = observer.run(labelled_images([4])).scene
    hardest = scene.hardest_negative
    assert len(hardest) == 1 and hardest.losses[0] >= scene.negatives.losses.max() > 0


def test_unevenness_counts_the_objects_that_random_positives_miss():
    def samples(objects):
        return scenes.Samples(*[np.array(objects)] * 2, *[np.zeros(0)] * 4, 0)

    assert scenes.unevenness(samples([0, 0, 0, 2]), samples([0, 1, 2, 0]), 4) == (1, 2)
    assert scenes.unevenness(samples([0, 1]), samples([0, 1]), 2) == (0, 0)


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
