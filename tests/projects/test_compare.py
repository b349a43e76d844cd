import csv
import json
import math
import signal
import sys

import pytest
import yaml
from detectron2.config import get_cfg
from helpers import ROOT, load_script, run_until
from scipy.stats import ttest_rel

import pisa_d2

compare = load_script("projects/StrategyComparison/compare.py")
comparison = sys.modules["comparison"]

GRID = """
seeds: [4, 7]
datasets:
  A: {MODEL.X: 1, MODEL.Y: 5}
  B:
baseline: plain
strategies:
  plain: {config: "configs/{dataset}/a.yaml"}
  "twice, x 2": {config: "configs/{dataset}/a.yaml", options: {MODEL.X: 2}, seeds: [4, 7, 9]}
  other:
    {config: b.yaml, script: o.py, datasets: [B], seeds: [7], against: [plain, "twice, x 2"]}
"""


@pytest.fixture
def grid(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(GRID)
    return path


@pytest.fixture
def runs(grid, tmp_path):
    return list(compare.runs_of(yaml.safe_load(grid.read_text()), tmp_path / "out"))


def find(runs, dataset, strategy, seed):
    return next(r for r in runs if (r.dataset, r.strategy, r.seed) == (dataset, strategy, seed))


def finish(run, ap, of_step=0.5, lines=None):
    """Leave what a run leaves that is done."""
    run.folder.mkdir(parents=True, exist_ok=True)
    names = [f"bbox/{metric}" for metric in compare.COCO_METRICS]
    lines = lines or [
        {"iteration": 19, "time": 9.0},
        {"iteration": 20, **dict.fromkeys(names, 1.0)},
        {"iteration": 39, "time": of_step},
        {"iteration": 59, "time": of_step},
        {"iteration": 60, **{name: ap + i for i, name in enumerate(names)}},
    ]
    (run.folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (run.folder / "model_final.pth").touch()


def finished(run, **kwargs):
    """Finish a run, and read its result."""
    finish(run, **kwargs)
    return compare.read_result(run)


def test_a_grid_is_run_seed_by_seed_in_folders_of_their_own(runs):
    assert [(run.seed, run.dataset, run.strategy) for run in runs] == [
        (4, "A", "plain"),
        (4, "A", "twice, x 2"),
        (4, "B", "plain"),
        (4, "B", "twice, x 2"),
        (7, "A", "plain"),
        (7, "A", "twice, x 2"),
        (7, "B", "plain"),
        (7, "B", "twice, x 2"),
        (7, "B", "other"),
        (9, "A", "twice, x 2"),
        (9, "B", "twice, x 2"),
    ]
    assert len({run.folder for run in runs}) == len(runs)


def test_a_strategy_has_seeds_of_its_own_for_each_dataset(tmp_path):
    grid = yaml.safe_load(GRID)
    grid["seeds"] = {"A": [1], "B": [2]}
    grid["strategies"]["twice, x 2"]["seeds"] = {"A": [2, 3], "B": []}
    assert [(run.seed, run.dataset, run.strategy) for run in compare.runs_of(grid, tmp_path)] == [
        (1, "A", "plain"),
        (2, "A", "twice, x 2"),
        (2, "B", "plain"),
        (3, "A", "twice, x 2"),
        (7, "B", "other"),
    ]


def test_a_command_has_the_options_of_the_dataset_and_then_of_the_strategy(runs):
    run = find(runs, "A", "twice, x 2", 7)
    command = run.command()
    assert command[:3] == [sys.executable, str(ROOT / "train_net.py"), "--resume"]
    words = dict(zip(command[3::2], command[4::2], strict=True))
    assert words == {
        "--config-file": str(ROOT / "configs/A/a.yaml"),
        "SEED": "7",
        "OUTPUT_DIR": str(run.folder),
        "MODEL.X": "2",
        "MODEL.Y": "5",
    }
    assert str(ROOT / "o.py") in find(runs, "B", "other", 7).command()


def test_a_run_is_done_once_it_was_evaluated_at_its_end(runs):
    assert compare.read_result(runs[0]) is None
    finish(runs[0], ap=40.0)
    result = compare.read_result(runs[0])
    assert result[:9] == ("A", "plain", 4, 40.0, 41.0, 42.0, 43.0, 44.0, 45.0)
    assert result.seconds == 30.0  # 60 steps of the median time
    (runs[0].folder / "model_final.pth").unlink()
    assert compare.read_result(runs[0]) is None


def test_results_are_read_back_and_refused_under_other_settings(runs, grid, tmp_path):
    finish(runs[0], ap=40.0)
    path = tmp_path / "kept" / "results.csv"
    compare.write_results(path, [compare.read_result(runs[0])])
    assert compare.read_results(path, runs) == {runs[0]: compare.read_result(runs[0])}
    assert compare.read_results(path, runs[1:]) == {}

    changed = yaml.safe_load(GRID.replace("MODEL.Y: 5", "MODEL.Y: 6"))
    with pytest.raises(ValueError, match="plain on A, seed 4 .* other settings"):
        compare.read_results(path, compare.runs_of(changed, tmp_path))


def run_main(monkeypatch, grid, *words):
    monkeypatch.setattr("sys.argv", ["compare.py", str(grid), *map(str, words)])
    compare.main()


def test_one_command_goes_on_with_a_grid_and_writes_table_and_picture(
    runs, grid, tmp_path, monkeypatch, capsys
):
    trained = []

    def train(run, threads, processes):
        trained.append(run)
        return finished(run, ap=40.0 + run.seed * (run.strategy != "plain"))

    monkeypatch.setattr(compare, "train", train)
    finish(runs[3], ap=50.0)
    path = tmp_path / "results.csv"
    compare.write_results(path, [comparison.Result("A", "plain", 4, *[30.0] * 7, runs[0].settings)])
    run_main(monkeypatch, grid, "--output", tmp_path / "out", "--results", path, "--jobs", "3")
    assert {*trained, runs[0], runs[3]} == set(runs)
    assert len(trained) == len(runs) - 2
    rows = list(csv.DictReader(path.open()))
    assert [(r["dataset"], r["strategy"], int(r["seed"])) for r in rows] == [
        (run.dataset, run.strategy, run.seed) for run in runs
    ]
    assert rows[0]["AP"] == "30.0"
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert path.with_suffix(".md").read_text() in capsys.readouterr().out
    trained.clear()
    run_main(monkeypatch, grid, "--output", tmp_path / "out", "--results", path)
    assert trained == []


def test_a_part_of_a_grid_is_trained_and_the_rest_of_the_file_kept(
    runs, grid, tmp_path, monkeypatch
):
    monkeypatch.setattr(compare, "train", lambda run, threads, processes: finished(run, ap=40.0))
    finish(runs[0], ap=50.0)
    words = ("--datasets", "B", "--strategies", "twice, x 2", "other")
    run_main(monkeypatch, grid, "--output", tmp_path / "out", *words)
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert [(row["dataset"], row["strategy"], row["seed"]) for row in rows] == [
        ("A", "plain", "4"),
        ("B", "twice, x 2", "4"),
        ("B", "twice, x 2", "7"),
        ("B", "other", "7"),
        ("B", "twice, x 2", "9"),
    ]


def test_a_strategy_that_the_grid_has_not_is_refused(grid, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_main(monkeypatch, grid, "--strategies", "plain", "plane")
    message = "'plane' is not in the grid: its strategies are ['plain', 'twice, x 2', 'other']"
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_failed_run_names_its_log_and_the_others_go_on(runs, grid, tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match=r"plain on A, seed 4, failed.*seed4.train\.log"):
        compare.train(runs[0], 1, compare.Processes())
    assert "configs/A/a.yaml" in (runs[0].folder / "train.log").read_text()

    def train(run, threads, processes):
        if run == runs[0]:
            raise RuntimeError("the first failed")
        return finished(run, ap=40.0)

    monkeypatch.setattr(compare, "train", train)
    with pytest.raises(SystemExit, match="the first failed"):
        run_main(monkeypatch, grid, "--output", tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert len(rows) == len(runs) - 1


# A training that says that it has begun, and ends on SIGTERM.
TRAINING = """
import pathlib, signal, sys, time

def save(signum, frame):
    print("saved")
    sys.exit(75)

signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, signal.SIG_IGN)  # it comes through compare.py alone
folder = pathlib.Path(sys.argv[sys.argv.index("OUTPUT_DIR") + 1])
(folder / "began").touch()
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=lambda signum: signum.name)
def test_a_signal_ends_the_trainings_too_and_starts_no_other(tmp_path, signum):
    script, path, out = (tmp_path / name for name in ("training.py", "grid.yaml", "out"))
    script.write_text(TRAINING)
    grid = yaml.safe_load(GRID)
    for strategy in grid["strategies"].values():
        strategy["script"] = str(script)
    path.write_text(yaml.safe_dump(grid, sort_keys=False))
    words = [ROOT / "projects/StrategyComparison/compare.py", path, "--output", out, "--jobs", "2"]
    status, printed = run_until(
        lambda: len(list(out.rglob("began"))) == 2, signum, words, cwd=tmp_path
    )
    assert status == 1
    assert "Interrupted" in printed and "failed" not in printed and "Traceback" not in printed
    logs = [log.read_text() for log in out.rglob("train.log")]
    assert logs == ["saved\n"] * 2


def test_what_is_done_is_reported_without_training(runs, grid, tmp_path, monkeypatch, capsys):
    words = ("--output", tmp_path / "out", "--no-training")
    with pytest.raises(SystemExit, match="no result"):
        run_main(monkeypatch, grid, *words)
    finish(runs[0], ap=40.0)
    run_main(monkeypatch, grid, *words)
    assert "| plain | 1 | 40.0 | 41.0 |" in capsys.readouterr().out
    (row,) = csv.DictReader((tmp_path / "out" / "results.csv").open())
    assert (row["strategy"], float(row["AP"])) == ("plain", 40.0)


def test_a_run_of_a_few_steps_is_reported_without_time_or_says_that_it_found_nothing(
    runs, grid, tmp_path, monkeypatch, capsys
):
    names = [f"bbox/{metric}" for metric in compare.COCO_METRICS]
    few = {**dict.fromkeys(names, 1.5), "bbox/APs": None}
    for run in (runs[0], runs[1]):
        finish(run, ap=0, lines=[{"iteration": 2, "lr": 0.1}, {"iteration": 3, **few}])
    nothing = dict.fromkeys(names)
    finish(runs[2], ap=0, lines=[{"iteration": 2, "lr": 0.1}, {"iteration": 3, **nothing}])
    with pytest.raises(SystemExit, match=r"plain on B, seed 4, has no AP.*longer than 3 steps"):
        run_main(monkeypatch, grid, "--output", tmp_path / "out", "--no-training")
    printed = capsys.readouterr().out
    assert "| plain | 1 | 1.5 | 1.5 | 1.5 | none | 1.5 | 1.5 |" in printed
    assert "| twice, x 2 | plain | 1 | +0.0 | +0.0 | +0.0 | none | +0.0 | +0.0 | not timed |" in (
        printed
    )

    def train(run, threads, processes):
        if run == runs[2]:
            compare.read_result(run)
        return finished(run, ap=0, lines=[{"iteration": 3, **few}])

    monkeypatch.setattr(compare, "train", train)
    words = ("--output", tmp_path / "out", "--datasets", "B", "--strategies", "plain")
    with pytest.raises(SystemExit, match=r"plain on B, seed 4, has no AP"):
        run_main(monkeypatch, grid, *words)
    rows = compare.read_results(tmp_path / "out" / "results.csv", runs)
    assert all(math.isnan(row.seconds) and math.isnan(row.APs) for row in rows.values())


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("strategies:", "strategy:", "unknown key 'strategy'. Do you mean 'strategies'?"),
        ("baseline: plain", "tables: {}", "the grid needs the key 'baseline'"),
        ("baseline: plain", "baseline: plane", "unknown strategy 'plane'. Do you mean 'plain'?"),
        ("options:", "option:", "strategy 'twice, x 2': unknown key 'option'. Do you mean 'opt"),
        ("datasets: [B]", "datasets: [C]", "unknown dataset 'C'. There are A, B."),
        ("against: [plain,", "against: [none,", "unknown strategy 'none'. There are plain, tw"),
        ("seeds: [7]", "seeds: 7", "seeds of strategy 'other': 7 is not a list of integers"),
        ("seeds: [4, 7]", "seeds: {A: [4]}", "seeds of the grid: dataset 'B' has none"),
        ("{config: b.yaml, script", "{script", "strategy 'other' needs the key 'config'"),
        (GRID, "", "a grid is a mapping with the keys seeds"),
        ("seeds: [4, 7]", "seeds: [", "expected"),
    ],
)
def test_a_mistake_in_a_grid_is_named_before_anything_is_trained(
    right, wrong, message, grid, monkeypatch, capsys
):
    assert right in GRID
    grid.write_text(GRID.replace(right, wrong, 1))
    with pytest.raises(SystemExit):
        run_main(monkeypatch, grid)
    printed = capsys.readouterr().err
    assert message in printed and f"'{grid}'" in printed


def test_a_table_of_unknown_strategies_and_a_missing_grid_are_named(grid, monkeypatch, capsys):
    grid.write_text(GRID + "tables: {Title: {row: {column: plan}}}")
    for path, message in ((grid, "table 'Title': unknown strategy 'plan'"), ("no.yaml", "No such")):
        with pytest.raises(SystemExit):
            run_main(monkeypatch, path)
        assert message in capsys.readouterr().err


def result(strategy, seed, ap, seconds=1.0):
    return comparison.Result("A", strategy, seed, *[ap] * 6, seconds, "")


def test_an_interval_of_one_strategy_is_that_of_students_t():
    # 4.303 = t(0.975, 2), from a table.
    values = [1.0, 2.0, 6.0]
    runs = [result("plain", seed, value) for seed, value in enumerate(values)]
    spread = comparison.spread(runs, "AP", paired=False)
    half = 4.303 * math.sqrt(7.0) / math.sqrt(3)
    assert spread.interval(values, runs_each=1) == pytest.approx((3.0, half), rel=1e-3)


def test_an_interval_of_differences_of_two_strategies_is_that_of_the_paired_t_test():
    values, others = [1.0, 2.0, 6.0, 3.0], [2.5, 2.0, 8.0, 3.5]
    runs = [result("plain", seed, value) for seed, value in enumerate(values)]
    runs += [result("other", seed, value) for seed, value in enumerate(others)]
    differences = [other - value for value, other in zip(values, others, strict=True)]
    mean, half = comparison.spread(runs, "AP", paired=True).interval(differences, runs_each=2)
    expected = ttest_rel(others, values).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx(tuple(expected))


def test_the_spread_is_pooled_over_strategies():
    of_strategies = {"plain": [1.0, 2.0, 6.0], "other": [10.0, 12.0], "once": [7.0]}
    runs = [
        result(name, seed, value)
        for name, values in of_strategies.items()
        for seed, value in enumerate(values)
    ]
    # Squares about the means: 4 + 1 + 9, and 1 + 1.
    assert comparison.spread(runs, "AP", paired=False) == pytest.approx((math.sqrt(16 / 3), 3))


def test_what_a_seed_does_to_all_strategies_alike_is_no_spread_of_differences():
    runs = [
        result(name, seed, base + offset)
        for name, base in (("plain", 50.0), ("other", 53.0), ("third", 41.0))
        for seed, offset in enumerate((0.0, 2.0, -1.0))
        if (name, seed) != ("third", 1)
    ]
    assert comparison.spread(runs, "AP", paired=True) == pytest.approx((0.0, 3), abs=1e-9)
    assert comparison.spread(runs, "AP", paired=False).deviation > 1


def test_single_runs_have_no_interval():
    runs = [result("plain", 1, 40.0), result("other", 1, 42.0)]
    for paired in (False, True):
        spread = comparison.spread(runs, "AP", paired)
        assert spread.interval([2.0], 2) == (2.0, math.inf)
        assert spread.interval([2.0], 2).text(signed=True) == "+2.0"


def test_models_that_are_not_compared_do_not_widen_each_others_intervals():
    """Here a seed lifts all strategies of one model alike, and does nothing to the others."""
    offsets = {"plain": (0.0, 0.0, 0.0), "deep": (0.0, 5.0, -3.0)}
    runs, pairs = [], []
    for model, of_seeds in offsets.items():
        for name, gain in ((model, 0.0), (f"{model} b", 1.0), (f"{model} c", 2.0)):
            runs += [result(name, seed, 50 + gain + offset) for seed, offset in enumerate(of_seeds)]
            pairs += [comparison.Pair(name, model)] if name != model else []
    elsewhere = result("other", 1, 0.0)._replace(dataset="B")
    grid = comparison.Grid([*runs, elsewhere], pairs, tables={})
    assert grid.families("A") == {
        frozenset(f"{model}{suffix}" for suffix in ("", " b", " c")) for model in offsets
    }
    for name, of_strategy in grid.spreads("A", paired=True).items():
        assert of_strategy["AP"] == pytest.approx((0.0, 4), abs=1e-9), name
    assert comparison.spread(runs, "AP", paired=True).deviation > 1
    of_runs = grid.spreads("A", paired=False)
    assert of_runs["plain c"]["AP"].deviation == pytest.approx(0, abs=1e-9)
    assert of_runs["deep c"]["AP"].deviation > 1


def test_differences_are_paired_by_seed_and_time_is_a_ratio():
    grid = comparison.Grid(
        [
            result("plain", 1, 50.0, 10.0),
            result("plain", 2, 40.0, 20.0),
            result("other", 2, 43.0, 30.0),
            result("other", 1, 51.0, 11.0),
            result("other", 3, 90.0, 1.0),  # has no partner
        ],
        [comparison.Pair("other", "plain"), comparison.Pair("absent", "plain")],
        tables={},
    )
    ((pair, beside),) = grid.compared("A").items()
    assert pair == ("other", "plain")
    assert sorted(comparison.differences(beside, "AP")) == [1.0, 3.0]
    ap, (_, _, row) = (table.splitlines() for table in comparison.markdown(grid).split("\n\n")[1:])
    assert [line.split(" | ")[1] for line in ap[2:]] == ["2", "3"]
    cells = row.strip("| ").split(" | ")
    assert cells[:4] == ["other", "plain", "2", "+2.0 ± 12.7"]  # t(0.975, 1)
    assert cells[-1] == "x 1.10"  # the fastest of each: 11 by 10 seconds


def test_a_table_of_two_choices_has_the_first_strategy_and_differences_to_it():
    runs = [result("plain", seed, 50.0) for seed in (1, 2)]
    runs += [result("hard", seed, 51.5) for seed in (1, 2)] + [result("both", 2, 49.0)]
    table = {"soft": {"few": "plain", "many": "absent"}, "hard": {"few": "hard", "many": "both"}}
    pairs = [comparison.Pair(name, "plain") for name in ("hard", "both")]
    grid = comparison.Grid(runs, pairs, {"Both choices": table})
    assert comparison.markdown(grid).rstrip().split("\n\n")[-2:] == [
        "Both choices, A:",
        "| AP | few | many |\n"
        "|---|---|---|\n"
        "| soft | 50.0 ± 0.0 | not run |\n"
        "| hard | +1.5 ± 0.0 | -1.0 ± 0.0 |",
    ]


def test_a_strategy_is_compared_with_the_baseline_or_with_what_it_names():
    assert compare.pairs_of(yaml.safe_load(GRID)) == [
        ("twice, x 2", "plain"),
        ("other", "plain"),
        ("other", "twice, x 2"),
    ]


GRIDS = sorted((ROOT / "projects/StrategyComparison").glob("*.yaml"))


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_every_strategy_of_every_grid_has_a_config_and_what_it_is_compared_with(path, tmp_path):
    grid = yaml.safe_load(path.read_text())
    runs = list(compare.runs_of(grid, tmp_path))
    assert len({run.folder for run in runs}) == len(runs) == len({run.name for run in runs})
    for run in runs:
        if run.script != "train_net.py":  # has keys of its own
            assert (ROOT / run.script).is_file() and (ROOT / run.config).is_file()
            continue
        cfg = get_cfg()
        pisa_d2.add_pisa_config(cfg)
        cfg.merge_from_file(str(ROOT / run.config))
        cfg.merge_from_list([str(word) for pair in run.options.items() for word in pair])
    assert {baseline for _, baseline in compare.pairs_of(grid)} <= set(grid["strategies"])
    for rows in grid.get("tables", {}).values():
        assert len({tuple(row) for row in rows.values()}) == 1
        assert {name for row in rows.values() for name in row.values()} <= set(grid["strategies"])
