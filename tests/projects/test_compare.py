import csv
import json
import math
import re
import signal
import sys

import numpy as np
import pytest
import yaml
from detectron2.config import get_cfg
from helpers import ROOT, load_script, run_until
from matplotlib.axes import Axes
from scipy.stats import ttest_ind, ttest_rel

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
    row = "| twice, x 2 | plain | 1 | +0.0 |  | not tested | +0.0 | +0.0 | none | +0.0 | +0.0 |"
    assert f"{row} not timed |" in printed

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
        ("against:", "also: [none], against:", "also of strategy 'other': unknown strategy 'none'"),
        ("against:", "also: [plain], against:", "'plain' is in both 'against' and 'also'"),
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


def some_grid(pairs, num_seeds=4, datasets=("A", "B")):
    """Random results of every strategy in ``pairs``, the same for the same seed and name."""
    names = list(dict.fromkeys(name for pair in pairs for name in pair[:2]))
    generator = np.random.default_rng(0)
    runs = [
        result(name, seed, float(generator.normal(50 + place, 1)))._replace(dataset=dataset)
        for dataset in datasets
        for place, name in enumerate(names)
        for seed in range(num_seeds)
    ]
    return comparison.Grid(runs, pairs, tables={})


def aps(found):
    return tuple([run.AP for run in runs] for runs in (found.runs, found.baseline))


def test_a_difference_has_the_interval_of_the_paired_t_test_of_its_own_runs():
    grid = some_grid([comparison.Pair(name, "plain") for name in ("other", "third")])
    for found in grid.differences():
        expected = ttest_rel(*aps(found))
        mean, half = found.interval("AP")
        assert (mean - half, mean + half) == pytest.approx(expected.confidence_interval(0.95)[:])
        assert found.p() == pytest.approx(expected.pvalue)
    alone = comparison.Grid(grid.results, grid.pairs[:1], {})
    assert alone.difference("A", grid.pairs[0]).interval("AP") == (
        grid.difference("A", grid.pairs[0]).interval("AP")
    )


def test_runs_of_another_schedule_are_compared_by_welchs_test():
    grid = some_grid([comparison.Pair("longer", "plain", paired=False)])
    grid.results.remove(next(run for run in grid.results if run.strategy == "longer"))
    for found in grid.differences():
        expected = ttest_ind(*aps(found), equal_var=False)
        mean, half = found.interval("AP")
        assert (mean - half, mean + half) == pytest.approx(expected.confidence_interval(0.95)[:])
        assert found.p() == pytest.approx(expected.pvalue)
    rows = [line for line in comparison.markdown(grid).splitlines() if "| plain |" in line]
    assert [row.split(" | ")[2] for row in rows if row.startswith("| longer")] == ["3, 4", "4, 4"]


def test_comparisons_of_a_family_are_corrected_for_each_other_on_all_datasets():
    families = {"plain": ("b", "c", "described"), "deep": ("deep b", "deep c")}
    pairs = [
        comparison.Pair(name, base, tested=name != "described")
        for base, names in families.items()
        for name in names
    ]
    grid = some_grid([*pairs, comparison.Pair("c", "b")])
    grid.results.append(result("once", 0, 10.0))
    grid.pairs.append(comparison.Pair("once", "plain"))
    assert grid.families() == {
        frozenset(["plain", "b", "c", "described", "once"]),
        frozenset(["deep", "deep b", "deep c"]),
    }
    found = grid.differences()
    assert [d.pair.strategy for d in found if d.holm is None] == ["described", "once", "described"]
    of_families = [
        [d for d in found if d.holm is not None and ("deep" in d.pair.strategy) == deep]
        for deep in (False, True)
    ]
    assert [len(family) for family in of_families] == [6, 4]
    for family in of_families:
        # The smallest p counts once for each comparison of its family.
        smallest = min(family, key=lambda d: d.p())
        assert smallest.holm == pytest.approx(min(1.0, len(family) * smallest.p()))
        largest = max(family, key=lambda d: d.p())
        assert largest.holm >= largest.p()


def test_only_what_differs_after_the_correction_is_bold_and_in_colour(monkeypatch, tmp_path):
    pairs = [comparison.Pair(name, "plain") for name in ("up", "down", "same")]
    offsets = {"plain": 0.0, "up": 3.0, "down": -3.0, "same": 0.0}
    noise = (0.0, 0.1, -0.1, 0.2)
    runs = [
        result(name, seed, 50 + offset + (0 if name == "plain" else noise[seed]))
        for name, offset in offsets.items()
        for seed in range(4)
    ]
    grid = comparison.Grid(runs, pairs, {})
    text = comparison.markdown(grid)
    bold = re.findall(r"^\| (\w+) \| plain \| 4 \| \*\*(.) *", text, re.MULTILINE)
    assert bold == [("up", "+"), ("down", "-")]
    drawn = []
    monkeypatch.setattr(Axes, "errorbar", lambda *args, color, **kwargs: drawn.append(color))
    comparison.plot(grid, tmp_path / "plot.png")
    assert drawn == ["C0", "C3", "gray"]


def test_single_runs_have_neither_interval_nor_p():
    runs = [result("plain", 1, 40.0), result("other", 1, 42.0)]
    grid = comparison.Grid(runs, [comparison.Pair("other", "plain")], {})
    assert "| other | plain | 1 | +2.0 |  | not tested | +2.0 |" in comparison.markdown(grid)


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
    (found,) = grid.differences()
    assert found.pair == grid.pairs[0]
    assert sorted(found.by_seed("AP")) == [1.0, 3.0]
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
        "| hard | +1.5 ± 0.0 | -1.0 |",
    ]


def test_a_strategy_is_compared_with_the_baseline_or_with_what_it_names():
    grid = yaml.safe_load(GRID)
    strategies = grid["strategies"]
    strategies["longer"] = {"config": "a", "options": {"SOLVER.MAX_ITER": 9}, "also": ["plain"]}
    strategies["other"]["also"] = ["longer"]
    assert compare.pairs_of(grid) == [
        ("twice, x 2", "plain", True, True),
        ("other", "plain", True, True),
        ("other", "twice, x 2", True, True),
        ("other", "longer", False, False),
        ("longer", "plain", False, False),
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
    assert {pair.baseline for pair in compare.pairs_of(grid)} <= set(grid["strategies"])
    for rows in grid.get("tables", {}).values():
        assert len({tuple(row) for row in rows.values()}) == 1
        assert {name for row in rows.values() for name in row.values()} <= set(grid["strategies"])
