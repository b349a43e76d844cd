"""The figures of README and docs follow from the committed runs."""

import csv
import re
import shutil
from collections.abc import Iterator
from statistics import fmean
from typing import NamedTuple

import pytest
import yaml
from helpers import ROOT, load_script
from scipy import stats

compare = load_script("projects/StrategyComparison/compare.py")

PROJECT = ROOT / "projects/StrategyComparison"
GRIDS = sorted(path.stem for path in PROJECT.glob("results/*.csv"))
COMPARED = ("strategies", "few_objects", "from_scratch")
# Headings of docs/results.md, and data in README's table.
SECTIONS = {
    "Digits": ("strategies", "Digits"),
    "BCCD": ("strategies", "BCCD"),
    "Digits with few objects": ("few_objects", "Digits"),
    "Digits, from scratch": ("from_scratch", "Digits"),
    "BCCD, from scratch": ("from_scratch", "BCCD"),
}
REPORT = (ROOT / "docs/results.md").read_text()
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", GRIDS)
def test_the_committed_tables_are_made_of_the_committed_runs(name, tmp_path, monkeypatch):
    results = shutil.copy(PROJECT / f"results/{name}.csv", tmp_path)
    words = [f"{PROJECT}/{name}.yaml", "--no-training", "--results", results, "--output", tmp_path]
    monkeypatch.setattr("sys.argv", ["compare.py", *map(str, words)])
    compare.main()
    assert (tmp_path / f"{name}.md").read_text() == (PROJECT / f"results/{name}.md").read_text()


class Comparison(NamedTuple):
    """By the runs of the two strategies alone: paired by seed, or Welch's for other schedules."""

    seeds: str
    mean: float
    mean_against: float
    low: float
    high: float
    p: float

    @property
    def difference(self) -> str:
        half = (self.high - self.low) / 2
        return f"{self.mean - self.mean_against:+.1f} ± {half:.1f}"


def compare_runs(ours: dict[str, float], theirs: dict[str, float], paired: bool) -> Comparison:
    shared = sorted(ours.keys() & theirs.keys())
    a = [ours[seed] for seed in shared] if paired else list(ours.values())
    b = [theirs[seed] for seed in shared] if paired else list(theirs.values())
    test = stats.ttest_rel(a, b) if paired else stats.ttest_ind(a, b, equal_var=False)
    seeds = str(len(a)) if len(a) == len(b) else f"{len(a)}, {len(b)}"
    interval = test.confidence_interval(0.95)
    return Comparison(seeds, fmean(a), fmean(b), interval.low, interval.high, test.pvalue)


def runs_of(name: str, metric: str = "AP") -> dict[tuple[str, str], dict[str, float]]:
    """AP, or another metric, by dataset and strategy, and by seed."""
    runs: dict[tuple[str, str], dict[str, float]] = {}
    with open(PROJECT / f"results/{name}.csv") as file:
        for row in csv.DictReader(file):
            of_strategy = runs.setdefault((row["dataset"], row["strategy"]), {})
            of_strategy[row["seed"]] = float(row[metric])
    return runs


def all_comparisons() -> Iterator[tuple[tuple[str, str, str, str], Comparison]]:
    """By grid, dataset, strategy and what it is compared with: all that the grids name."""
    for name in COMPARED:
        runs = runs_of(name)
        grid = yaml.safe_load((PROJECT / f"{name}.yaml").read_text())
        for dataset, strategy in runs:
            for against in grid["strategies"][strategy].get("against", [grid["baseline"]]):
                ours, theirs = runs[dataset, strategy], runs.get((dataset, against), {})
                if strategy != against and min(len(ours), len(theirs)) > 1:
                    paired = not ("steps" in strategy or "steps" in against)
                    key = (name, dataset, strategy, against)
                    yield key, compare_runs(ours, theirs, paired)


COMPARISONS = dict(all_comparisons())


def holm(p_values: list[float]) -> list[float]:
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for place, index in enumerate(order):
        highest = max(highest, (len(p_values) - place) * p_values[index])
        adjusted[index] = min(highest, 1.0)
    return adjusted


HOLM = dict(zip(COMPARISONS, holm([c.p for c in COMPARISONS.values()]), strict=True))


def row_of(strategy: str, against: str, c: Comparison, adjusted: float | None) -> str:
    """The row of docs/results.md."""
    bold = "**" if adjusted is not None and adjusted < 0.05 else ""
    p = f"{c.p:.4f}" if c.p < 0.01 else f"{c.p:.2f}"
    p_holm = "not tested"
    if adjusted is not None:
        p_holm = f"{adjusted:.3f}" if adjusted < 0.1 else f"{adjusted:.2f}"
    cells = [strategy, against, c.seeds, f"{c.mean:.1f}", f"{c.mean_against:.1f}"]
    return f"| {' | '.join(cells)} | {bold}{c.difference}{bold} | {p} | {p_holm} |"


def printed(key: tuple[str, str, str, str]) -> str:
    return row_of(*key[2:], COMPARISONS[key], HOLM[key])


def section_of(title: str) -> str:
    """The text below a heading of docs/results.md."""
    return re.split(rf"^##+ {title}$", REPORT, flags=re.MULTILINE)[1].split("\n##")[0]


def rows_of(title: str) -> list[str]:
    """The rows of differences below a heading of docs/results.md."""
    return re.findall(r"^\|.*±.*\|$", section_of(title), flags=re.MULTILINE)


@pytest.mark.parametrize("title", SECTIONS)
def test_rows_of_the_report_follow_from_the_runs(title):
    rows = rows_of(title)
    known = [printed(key) for key in COMPARISONS if key[:2] == SECTIONS[title]]
    assert len(rows) >= 8
    assert [row for row in rows if row not in known] == []


Pairs = tuple[tuple[str, str], ...]


def check_rows(title: str, name: str, families: dict[Pairs, bool]) -> None:
    """
    Compare the rows below a heading with the runs of a grid, of which all strategies have five
    seeds. A family of pairs is corrected by itself if it is True, and not tested if it is False.
    """
    runs = {strategy: of for (_, strategy), of in runs_of(name).items()}
    expected = []
    for pairs, tested in families.items():
        found = [compare_runs(runs[ours], runs[theirs], paired=True) for ours, theirs in pairs]
        adjusted = holm([c.p for c in found]) if tested else [None] * len(found)
        expected += [row_of(*pair, c, p) for pair, c, p in zip(pairs, found, adjusted, strict=True)]
    assert rows_of(title) == expected
    assert {len(of) for of in runs.values()} == {5}


def test_whole_detectors_on_bccd_are_compared_as_planned():
    """Each model's comparisons are corrected apart: projects/HeadStudy/plan.md, "End to end"."""
    random, twice = "random", "random, box loss x 2"
    released = "PISA as released (Score-HLR negatives)"
    retina, retina_twice, retina_pisa = "RetinaNet", "RetinaNet, box loss x 2", "PISA RetinaNet"
    families = {
        (("PISA", twice), ("PISA", random), (released, twice), (released, random)): True,
        ((twice, random), ("IoU-balanced negatives", random)): False,
        ((retina_pisa, retina_twice), (retina_pisa, retina)): True,
        ((retina_twice, retina),): False,
    }
    check_rows("Whole detectors on BCCD", "end_to_end", families)


def test_whole_detectors_on_groceries_are_compared_as_planned():
    """By projects/HeadStudy/plan.md, "Five seeds on groceries"."""
    random, half = "random", "random, box loss x 0.5"
    pisa = "PISA, a quarter of the box losses"
    released = "PISA as released, a quarter of the box losses"
    families = {
        ((pisa, random), (released, random)): True,
        ((half, random), (pisa, half), (released, pisa)): False,
        (("IoU-balanced negatives", random),): False,
    }
    title, name = "Five seeds of whole detectors", "groceries_five_seeds"
    check_rows(title, name, families)

    def gain(strategy: str, metric: str) -> str:
        runs = {strategy: of for (_, strategy), of in runs_of(name, metric).items()}
        return f"{fmean(runs[strategy].values()) - fmean(runs[random].values()):+.1f}"

    lower, ours, theirs = ((gain(s, "AP50"), gain(s, "AP75")) for s in (half, pisa, released))
    words = " ".join(section_of(title).split())
    assert "changes AP50 of random sampling by {} and AP75 by {}".format(*lower) in words
    assert f"{' and '.join(ours)}, and as released {' and '.join(theirs)}" in words


def test_the_ranks_of_retinanet_are_judged_as_planned():
    pair = "PISA RetinaNet", "PISA RetinaNet, ranks permuted"
    check_rows("The ranks in RetinaNet", "retinanet_ranks", {(pair,): True})


def test_the_report_says_how_many_comparisons_there_are_and_names_those_that_are_shown():
    assert set(re.findall(r"\b(\d+) comparisons", REPORT)) == {str(len(COMPARISONS))}
    shown = [key for key in COMPARISONS if HOLM[key] < 0.05]
    assert len(shown) == 4
    for key in shown:
        assert printed(key) in REPORT
        assert COMPARISONS[key].difference.lstrip("+-") in REPORT.split("\n## ")[0]


@pytest.mark.parametrize("text", [README, REPORT], ids=["README", "results.md"])
def test_differences_in_sentences_stand_in_the_tables(text):
    in_tables = set(re.findall(r"[+-](\d+\.\d ± \d+\.\d)", REPORT))
    sentences = re.sub(r"^\|.*$", "", text, flags=re.MULTILINE)
    named = re.findall(r"(\d+\.\d ±\s+\d+\.\d)", sentences)
    assert {re.sub(r"\s+", " ", difference) for difference in named} <= in_tables


def test_rows_of_the_readme_follow_from_the_runs():
    rows = re.findall(
        r"^\| (.+) \| (.+): ([\d.]+) \| (.+): ([\d.]+) \| (.+ ± .+) \| (\d+) \| .* \|$",
        README,
        flags=re.MULTILINE,
    )
    assert len(rows) == len(re.findall(r"^\|.* ± ", README, re.MULTILINE))
    data = {"digits": "Digits", "digits, few objects": "Digits with few objects", "BCCD": "BCCD"}
    for name, against, ap_against, strategy, ap, difference, seeds in rows:
        c = COMPARISONS[(*SECTIONS[data[name]], strategy, against)]
        said = (f"{c.mean_against:.1f}", f"{c.mean:.1f}", c.difference, c.seeds)
        assert (ap_against, ap, difference, seeds) == said


def test_the_time_of_the_readme_follows_from_the_runs():
    (more,) = re.findall(r"PISA as released.* (\d+)%; \d+% in a model of full size", README)
    (row,) = re.findall(
        r"^\| PISA as released .* \| random \| 3 \|.* \| x ([\d.]+) \|$",
        (PROJECT / "results/strategies.md").read_text().split("### Digits")[1],
        flags=re.MULTILINE,
    )
    assert int(more) == round(100 * (float(row) - 1))


def test_the_table_of_learning_rates_is_the_one_of_the_runs():
    with open(PROJECT / "results/tuning.csv") as file:
        runs = {(row["dataset"], row["strategy"]): float(row["AP"]) for row in csv.DictReader(file)}
    for dataset, name in {"BCCD": "BCCD `val`", "Digits": "digits, another draw"}.items():
        aps = [f"{runs[dataset, f'rate {rate}, 400 steps']:.1f}" for rate in (0.02, 0.04, 0.08)]
        assert f"| {name} | {' | '.join(aps)} |" in REPORT


def test_the_table_of_whole_detectors_is_the_one_of_the_runs():
    runs: dict[str, list[str]] = {}
    with open(PROJECT / "results/groceries_end_to_end.csv") as file:
        for row in csv.DictReader(file):
            runs.setdefault(row["strategy"], []).append(f"{float(row['AP']):.1f}")
    rows = [f"| {name} | {' | '.join(aps)} |" for name, aps in runs.items()]

    with open(PROJECT / "results/groceries_tuning.csv") as file:
        at_rate = {row["strategy"]: f"{float(row['AP']):.1f}" for row in csv.DictReader(file)}
    for name in dict.fromkeys(name.split(", rate ")[0] for name in at_rate):
        aps = [at_rate.get(f"{name}, rate {rate}", "") for rate in ("0.04", "0.02", "0.01")]
        rows.append(f"| {name} | {' | '.join(aps)} |")
    section = section_of("Whole detectors on photographs")
    printed = re.findall(r"^\| .*\d.* \|$", section, flags=re.MULTILINE)
    assert [line for line in printed if not line.startswith("| strategy")] == rows
