"""A study from the command line, what it keeps, and what it reports."""

import csv
import re
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from head_study.cache import Frozen, plan_cache
from head_study.detector import load_detector
from head_study.evaluation import Evaluator, Scores, truth_of
from head_study.report import About, differences, markdown, plot
from head_study.results import Results, Row
from head_study.runs import check_half, score_detector
from head_study.strategies import Comparison, Strategies, read_strategies
from head_study_models import PISA, detector_cfg, register_study_images, small_study
from helpers import (
    HEADS,
    ROOT,
    load_script,
    run_until,
    small_retinanet_cfg,
)
from scipy import stats

from pisa_d2.engine.metrics import COCO_METRICS

study_script = load_script("projects/HeadStudy/study.py")


class InThisProcess(ThreadPoolExecutor):
    """A pool of one thread instead of processes, which take seconds to start."""

    def __init__(self, processes, context, initializer, initargs):
        super().__init__(1, initializer=initializer, initargs=initargs)


@pytest.fixture
def cfg(tmp_path):
    return detector_cfg(tmp_path, register_study_images(tmp_path, [4, 0, 7, 3]))


@pytest.fixture
def run(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(study_script, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    of_detector = {key: node for key, node in cfg.items() if key != "HEAD_STUDY"}
    (tmp_path / "config.yaml").write_text(CfgNode(of_detector).dump())
    options = {"random": {}, "PISA": dict(PISA)}

    def run(*words, **changed):
        path = tmp_path / "strategies.yaml"
        path.write_text(yaml.safe_dump({"strategies": {**options, **changed}}, sort_keys=False))
        of_paths = ["--config-file", tmp_path / "config.yaml", "--strategies", path]
        output = ["--output", tmp_path / "out", "--steps", 2, "--seeds", 2]
        words = [*of_paths, *output, *words]
        monkeypatch.setattr("sys.argv", ["study.py", *map(str, words)])
        study_script.main()
        return list(csv.DictReader((tmp_path / "out/results.csv").open()))

    return run


def test_a_study_goes_on_where_it_was_interrupted(run, tmp_path, capsys, monkeypatch):
    rows = run()
    printed = capsys.readouterr().out
    assert [(row["strategy"], row["seed"]) for row in rows] == [
        ("the detector's own head", "0"),
        *(("random", "1"), ("random", "2"), ("PISA", "1"), ("PISA", "2")),
    ]
    assert "Caching all 3 training images and all 4 test images: about 0.0 GB" in printed
    assert "| PISA | random | 2 |" in printed
    assert "backbone and RPN were frozen" in printed
    assert (tmp_path / "out/strategies.md").read_text() in printed
    assert (tmp_path / "out/strategies.png").is_file()

    # One run is lost.
    path = tmp_path / "out/results.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith("PISA,1")))
    begun = []
    train = study_script.run
    monkeypatch.setattr(study_script, "run", lambda *key: begun.append(key) or train(*key))
    again = run()
    assert begun == [("PISA", 1)]
    timeless = [{k: v for k, v in row.items() if k != "seconds"} for row in (*rows, *again)]
    assert timeless[:5] == timeless[5:]


# A study in which each run leaves the id of its process and goes on for ten minutes.
LONG_STUDY = """
import os, pathlib, sys, time
from types import SimpleNamespace

class Study:
    def settings(self, strategy):
        return ""

    def checkpoint(self, strategy, seed):
        return None

def start_worker(*args):
    pass

def run(strategy, seed):
    pathlib.Path(f"{os.getpid()}.pid").touch()
    time.sleep(600)

if __name__ == "__main__":
    sys.path.append(sys.argv[1])
    import study

    study.start_worker, study.run = start_worker, run
    results = SimpleNamespace(done=lambda *key: False)
    try:
        args = SimpleNamespace(seeds=4, processes=2, use=[])
        study.train_all(Study(), SimpleNamespace(options=["random"]), results, args)
    except KeyboardInterrupt:
        sys.exit("Interrupted")
"""


@pytest.mark.slow
def test_sigterm_ends_the_processes_of_a_study_too(tmp_path):
    (tmp_path / "long_study.py").write_text(LONG_STUDY)
    words = ["long_study.py", ROOT / "projects/HeadStudy"]
    status, printed = run_until(
        lambda: len(list(tmp_path.glob("*.pid"))) == 2, signal.SIGTERM, words, cwd=tmp_path
    )
    assert "Interrupted" in printed and "Traceback" not in printed
    assert status == 1 and len(list(tmp_path.glob("*.pid"))) == 2


def test_rows_of_other_settings_are_refused(run):
    run()
    with pytest.raises(ValueError, match=r"row of 'PISA', seed 1, .* other settings"):
        run(PISA={**PISA, "MODEL.PISA.ISR_P.GAMMA": 1.0})
    with pytest.raises(ValueError, match="other settings, weights or data"):
        run("MODEL.ROI_HEADS.POSITIVE_FRACTION", 0.5)


def test_a_strategy_that_fails_is_named_and_the_others_go_on(run, capsys):
    hot = {"SOLVER.BASE_LR": 1e30, "SOLVER.CLIP_GRADIENTS.ENABLED": False}
    with pytest.raises(SystemExit, match=r"hot, seed 1, failed: The loss is not finite in step 1"):
        run(hot=hot)
    assert "| PISA | random | 2 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        {"MODEL.ROI_HEADS.NEGATIVE_SAMPLER.NAME": "NoSampler"},
        {"MODEL.PISA.ISR_P.ENABLED": True, "MODEL.PISA.ISR_P.BETA": 2.0},
        {"MODEL.ROI_HEADS.NAME": "ControlROIHeads", "HEAD_STUDY.CONTROL": "no control"},
        {"MODEL.NO_KEY": 1},
    ],
)
def test_a_strategy_that_cannot_be_built_is_named_before_anything_is_cached(options, run, tmp_path):
    with pytest.raises(ValueError, match="The strategy 'wrong' cannot be built: .*"):
        run(wrong=options)
    assert not (tmp_path / "out/cache").exists()


def test_a_study_needs_weights_an_rpn_and_one_test_set(cfg, run):
    with pytest.raises(ValueError, match="MODEL.WEIGHTS is empty: .*trained detector"):
        run("MODEL.WEIGHTS", "")
    with pytest.raises(ValueError, match="DATASETS.TEST = .* must name one"):
        run("DATASETS.TEST", "('head_study_images', 'head_study_images')")
    with pytest.raises(ValueError, match="'PISARetinaNet' .* cannot be studied"):
        load_detector(small_retinanet_cfg("MODEL.WEIGHTS", "some.pth"))


def test_scores_are_those_of_detectron2s_evaluator(cfg, tmp_path):
    (name,) = cfg.DATASETS.TEST
    evaluator = COCOEvaluator(name, ("bbox",), False, str(tmp_path / "theirs"))
    evaluator.reset()
    records = DatasetCatalog.get(name)
    own = []
    generator = np.random.default_rng(0)
    for record in records:
        boxes = np.array([a["bbox"] for a in record["annotations"]]).reshape(-1, 4)
        boxes = np.concatenate([boxes + generator.normal(0, 2, boxes.shape), [[3, 3, 30, 30]]])
        found = Instances((96, 128))
        found.pred_boxes = Boxes(boxes)
        found.scores = torch.from_numpy(generator.random(len(boxes)))
        classes = [a["category_id"] for a in record["annotations"]]
        found.pred_classes = torch.tensor([*classes, 1])
        evaluator.process([record], [{"instances": found}])
        own += evaluator._predictions[-1]["instances"]
    theirs = evaluator.evaluate()["bbox"]
    ids = [record["image_id"] for record in records]
    # The views come in another order than the images; the second resample is of one image alone.
    weights = np.array([[1, 1, 1, 1], [0, 4, 0, 0]])
    scores = Evaluator(truth_of(name), ids[::-1], weights).score(own)
    of_one = evaluator.evaluate(img_ids=[ids[2]])["bbox"]["AP"]
    for metric in COCO_METRICS:
        assert scores.metrics[metric] == pytest.approx(theirs[metric], nan_ok=True)
    assert scores.resampled == pytest.approx([theirs["AP"], of_one])
    assert 10 < theirs["AP"] < 90


def test_a_head_that_finds_nothing_scores_0(cfg):
    truth = truth_of(cfg.DATASETS.TEST[0])
    scores = Evaluator(truth, [0, 1, 2, 3], np.ones((5, 4), dtype=int)).score([])
    assert set(scores.metrics.values()) == {0.0}
    assert scores.resampled.tolist() == [0.0] * 5


def test_sets_that_are_not_annotated_exhaustively_are_refused():
    MetadataCatalog.get("some_lvis").evaluator_type = "lvis"
    with pytest.raises(ValueError, match="'some_lvis' is not annotated exhaustively"):
        truth_of("some_lvis")


def test_what_fits_is_a_random_part_that_is_stated(cfg):
    model = load_detector(cfg)
    frozen = Frozen(model, cfg)
    each = sum(
        m.numel() for m in frozen.view(DatasetCatalog.get(*cfg.DATASETS.TEST)[0], False)[0].values()
    )
    plan = plan_cache(frozen, cfg, max_gigabytes=4 * 4.5 * each / 1e9, half=False)
    assert (len(plan.train), len(plan.test), plan.of) == (2, 2, (3, 4))
    assert "2 of 3, chosen at random, training images" in plan.text()
    same = plan_cache(frozen, cfg, max_gigabytes=4 * 4.5 * each / 1e9, half=False)
    assert same == plan
    all_fit = plan_cache(frozen, cfg, max_gigabytes=4 * 7.5 * each / 1e9, half=False)
    assert (len(all_fit.train), len(all_fit.test)) == (3, 4)
    half = plan_cache(frozen, cfg, max_gigabytes=4 * 4.5 * each / 1e9, half=True)
    assert (len(half.train), len(half.test)) == (3, 4)
    assert half.gigabytes == pytest.approx(7 * 2 * each / 1e9)
    with pytest.raises(ValueError, match=r"--max-gb .* room for 1 training images and 1 test"):
        plan_cache(frozen, cfg, max_gigabytes=4 * 2.5 * each / 1e9, half=False)


def test_half_precision_is_refused_where_it_changes_ap(cfg, tmp_path, monkeypatch, capsys):
    study = small_study(cfg, tmp_path, half=True)
    assert "Half precision keeps the detector's AP" in capsys.readouterr().out
    scores = iter([40.0, 40.1])
    monkeypatch.setattr(Evaluator, "__call__", lambda *_: Scores({"AP": next(scores)}, np.zeros(1)))
    frozen = Frozen(load_detector(cfg), cfg)
    with pytest.raises(ValueError, match="AP of the detector from 40.00 to 40.10"):
        check_half(study, frozen, plan_cache(frozen, cfg, 1, half=True))


def test_the_detectors_own_head_has_a_row(cfg, tmp_path):
    row, resampled = score_detector(small_study(cfg, tmp_path))
    assert row.strategy == "the detector's own head" and row.seed == 0
    assert resampled.shape == (300,)


def test_a_file_of_strategies_compares_all_with_the_first_unless_it_says_otherwise(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("strategies: {a: , b: {MODEL.X: 1}, c: {MODEL.X: 2}}")
    assert read_strategies(path) == Strategies(
        {"a": {}, "b": {"MODEL.X": 1}, "c": {"MODEL.X": 2}},
        [Comparison("b", "a"), Comparison("c", "a")],
        [],
    )
    path.write_text(path.read_text() + "\ncomparisons: [[c, b]]\nalso: [[c, a]]")
    strategies = read_strategies(path)
    assert strategies.comparisons == [("c", "b")]
    assert strategies.also == [("c", "a")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "has no mapping 'strategies'"),
        ("strategies: {a: }", "needs two strategies"),
        ("strategies: {a: , b: }\nseeds: 3", r"unknown \['seeds'\]"),
        ("strategies: {a: , b: }\ncomparisons: [[a, c]]", r"\['a', 'c'\] must be two"),
        ("strategies: {a: , b: }\nalso: [[a, a]]", "must be two different"),
    ],
)
def test_a_file_of_strategies_that_is_wrong_is_refused(text, message, tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_strategies(path)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "projects/HeadStudy").glob("**/*.yaml")), ids=lambda path: path.stem
)
def test_every_strategy_that_is_shipped_can_be_built(path, cfg, tmp_path):
    strategies = read_strategies(path)
    assert small_study(cfg, tmp_path, strategies.options).options == strategies.options


ABOUT = About("a.yaml", "some_test", 50, 20, 300, "new weights", "torch 0")


def made_results(path, effects, num_seeds=8):
    """Rows of strategies that differ by these effects, and by noise."""
    results = Results(path)
    generator = np.random.default_rng(0)
    of_seeds, of_images = generator.normal(0, 2, num_seeds), generator.normal(0, 1, 300)
    for strategy, effect in effects.items():
        for seed in range(num_seeds):
            ap = 50 + effect + of_seeds[seed] + generator.normal(0, 0.5)
            metrics = {**dict.fromkeys(COCO_METRICS, 10.0), "AP": ap}
            row = Row.of(strategy, seed, Scores(metrics, np.zeros(0)), 3.0, "abc")
            results.add(row, ap + (1 + effect) * of_images)
    results.write(effects)
    return Results(path)


def test_the_report_prints_what_scipy_makes_of_the_rows(tmp_path):
    effects = {"random": 0.0, "better": 2.0, "same": 0.0, "worse": -3.0, "control": 2.0}
    results = made_results(tmp_path / "r.csv", effects)
    pairs = [("better", "random"), ("same", "random"), ("worse", "random")]
    strategies = Strategies(
        dict.fromkeys(effects, {}),
        [Comparison(*pair) for pair in pairs],
        [Comparison("better", "control")],
    )
    text = markdown(results, strategies, ABOUT)
    runs = {name: [results.rows[name, seed].AP for seed in range(8)] for name in strategies.options}
    lines = re.findall(r"^\| (\w+) \| (random|control) \| (.*) \|$", text, re.MULTILINE)
    assert len(lines) == 4
    for name, baseline, rest in lines:
        test = stats.ttest_rel(runs[name], runs[baseline])
        low, high = test.confidence_interval(0.95)
        cells = [cell.strip(" *") for cell in rest.split("|")]
        assert cells[0] == "8"
        assert cells[1] == f"{(low + high) / 2:+.2f} ± {(high - low) / 2:.2f}"
        shown = "< 0.0001" if test.pvalue < 1e-4 else f"{test.pvalue:.2g}"
        assert cells[3] == shown
    assert [line[2].split("|")[2].strip() for line in lines][3] == "not tested"
    sentence = text.strip().splitlines()[-1]
    assert re.search(r"better against random \(\+[12]\.\d\d ± \d.\d\d\) pays", sentence)
    assert re.search(r"worse against random \(-\d\.\d\d ± \d.\d\d\) costs", sentence)
    assert re.search(r"same against random \(.*\) shows no difference", sentence)
    assert "20 images of some_test" in sentence and "control" not in sentence
    plot(results, strategies, ABOUT, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 5000


def test_a_comparison_without_runs_is_named_and_counts_in_the_family(tmp_path):
    results = made_results(tmp_path / "r.csv", {"random": 0.0, "a": 0.8})
    options = dict.fromkeys(["random", "a", "lost"], {})
    pairs = [Comparison("a", "random"), Comparison("lost", "random")]
    strategies = Strategies(options, pairs, [Comparison("lost", "a")])
    (difference,) = differences(results, strategies)
    assert difference.holm == pytest.approx(2 * difference.p)
    text = markdown(results, strategies, ABOUT)
    assert "Not compared, for want of runs: lost against random; lost against a." in text
    assert "correction for 2 comparisons" in text

    alone = Strategies(options, pairs[:1], [])
    assert "correction" not in markdown(results, alone, ABOUT)


def test_strategies_of_different_schedules_are_not_paired(tmp_path):
    effects = {"random": 0.0, "better": 2.0, "longer": 1.0}
    results = made_results(tmp_path / "r.csv", effects)
    pairs = [Comparison("better", "random"), Comparison("longer", "random")]
    options = {"random": {}, "better": {"MODEL.X": 1}, "longer": {"SOLVER.MAX_ITER": 600}}
    runs = {name: [results.rows[name, seed].AP for seed in range(8)] for name in effects}
    paired, unpaired = differences(results, Strategies(options, pairs, []))
    test = stats.ttest_ind(runs["longer"], runs["random"], equal_var=False)
    low, high = test.confidence_interval(0.95)
    assert unpaired.interval == pytest.approx(((low + high) / 2, (high - low) / 2))
    assert unpaired.p == pytest.approx(test.pvalue)
    assert (unpaired.sign, unpaired.pooled, unpaired.values) == (None, None, [])
    # Two strategies are left, so the pooled spread comes from their own differences.
    assert paired.pooled == pytest.approx(paired.interval)
    text = markdown(results, Strategies(options, pairs, []), ABOUT)
    assert "| longer | random | unpaired | +" in text
    only = markdown(results, Strategies(options, pairs[1:], []), ABOUT)
    assert "(95% intervals over unpaired runs);" in only
    plot(results, Strategies(options, pairs, []), ABOUT, tmp_path / "p.png")


def test_only_what_holm_leaves_is_called_a_difference(tmp_path):
    """A p-value of 0.03 is enough alone, and is not in a family of three."""
    results = made_results(tmp_path / "r.csv", {"random": 0.0, "a": 0.8, "b": 0.0, "c": 0.0})
    options = dict.fromkeys(["random", "a", "b", "c"], {})
    alone = [Comparison("a", "random")]
    family = [*alone, Comparison("b", "random"), Comparison("c", "random")]
    (first,) = differences(results, Strategies(options, alone, []))
    assert first.differs and first.p == first.holm
    in_family = differences(results, Strategies(options, family, []))
    assert in_family[0].p == first.p
    assert in_family[0].holm == pytest.approx(3 * first.p)
    assert in_family[0].differs == (3 * first.p < 0.05)


def test_the_interval_over_images_counts_what_they_do_to_the_difference_alone(tmp_path):
    results = made_results(tmp_path / "r.csv", {"random": 0.0, "a": 2.0})
    strategies = Strategies({"random": {}, "a": {}}, [Comparison("a", "random")], [])
    (difference,) = differences(results, strategies)
    of_images = np.random.default_rng(0)
    of_images.normal(0, 2, 8)
    error = 2.0 * of_images.normal(0, 1, 300).std(ddof=1)
    assert difference.images == pytest.approx(1.96 * error, rel=1e-3)
    assert difference.both == pytest.approx(np.hypot(difference.images, difference.interval.half))


def test_kept_heads_are_checkpoints_of_the_detector(run, cfg, tmp_path, monkeypatch):
    run("--keep", tmp_path / "heads")
    path = tmp_path / "heads/PISA/seed2.pth"
    kept, own = (torch.load(p)["model"] for p in (path, tmp_path / "detector.pth"))
    assert kept.keys() == own.keys()
    changed = {name for name in own if not torch.equal(own[name], kept[name])}
    assert changed == {name for name in own if name.startswith("roi_heads.")}
    # The detector with these weights finds what the run was scored by.
    detector = load_detector(cfg_with(cfg, "MODEL.WEIGHTS", str(path)))
    study = small_study(cfg, tmp_path / "out", steps=2)
    scores = study.evaluator()(detector.roi_heads, study.views("test"))
    row = next(
        r for r in Results(tmp_path / "out/results.csv").rows.values() if r[:2] == ("PISA", 2)
    )
    assert round(scores.metrics["AP"], 3) == row.AP
    # A run whose checkpoint is missing is made again.
    path.unlink()
    begun, train = [], study_script.run
    monkeypatch.setattr(study_script, "run", lambda *key: begun.append(key) or train(*key))
    run("--keep", tmp_path / "heads")
    assert begun == [("PISA", 2)] and path.is_file()


def test_heads_of_a_cascade_are_not_kept(cfg, tmp_path):
    cfg = detector_cfg(tmp_path, "head_study_images", *HEADS["PISACascadeROIHeads"])
    with pytest.raises(ValueError, match="--keep cannot write checkpoints of a cascade"):
        small_study(cfg, tmp_path, keep=tmp_path / "heads")


def cfg_with(cfg, *opts):
    cfg = cfg.clone()
    cfg.merge_from_list(list(opts))
    return cfg
