"""The reports of head studies follow from the committed rows."""

import csv
import json
import re

import pytest
from head_study.report import About, markdown
from head_study.results import Results
from head_study.strategies import read_strategies
from helpers import ROOT
from scipy import stats

PROJECT = ROOT / "projects/HeadStudy"
# A folder per study, DATASET or DATASET_STUDY, with the reports of yaml files in plan/
REPORTS = sorted(PROJECT.glob("results/*/*.md"))
ids = [f"{path.parent.name} {path.stem}" for path in REPORTS]


def read_ap(study: str) -> dict[str, dict[int, float]]:
    """AP by strategy and seed, read without the project's code."""
    ap: dict[str, dict[int, float]] = {}
    for row in csv.DictReader((PROJECT / f"results/{study}/results.csv").open()):
        ap.setdefault(row["strategy"], {})[int(row["seed"])] = float(row["AP"])
    return ap


def holm_corrected(p_values: list[float]) -> list[float]:
    """Holm's correction of ``p_values``, from the smallest to the largest."""
    steps = [(len(p_values) - i) * p for i, p in enumerate(sorted(p_values))]
    return [min(1.0, max(steps[: place + 1])) for place in range(len(steps))]


@pytest.mark.parametrize("report", REPORTS, ids=ids)
def test_a_committed_report_is_made_of_the_committed_rows(report):
    strategies = read_strategies(PROJECT / f"plan/{report.stem}.yaml")
    about = About(**json.loads((report.parent / "about.json").read_text()))
    results = Results(report.parent / "results.csv")
    assert markdown(results, strategies, about) == report.read_text()


@pytest.mark.parametrize("report", REPORTS, ids=ids)
def test_its_intervals_are_those_that_scipy_gives(report):
    runs = read_ap(report.parent.name)
    text = report.read_text()
    table = text[text.index("| difference in AP of") :].splitlines()[2:]
    lines = [[c.strip(" *") for c in x.strip("|").split("|")] for x in table if x.startswith("|")]
    assert lines
    p_values = {}
    for name, baseline, num, interval, holm, p, _, p_signs, *_ in lines:
        seeds = sorted(runs[name].keys() & runs[baseline].keys())
        of_both = [[runs[strategy][seed] for seed in seeds] for strategy in (name, baseline)]
        test = stats.ttest_rel(*of_both)
        low, high = test.confidence_interval(0.95)
        assert int(num) == len(seeds)
        assert interval == f"{(low + high) / 2:+.2f} ± {(high - low) / 2:.2f}"
        assert float(p.strip("< ")) == pytest.approx(max(test.pvalue, 1e-4), rel=0.05)
        ups = [a > b for a, b in zip(*of_both, strict=True) if a != b]
        expected = stats.binomtest(sum(ups), len(ups)).pvalue
        assert float(p_signs.strip("< ")) == pytest.approx(max(expected, 1e-4), rel=0.05)
        if holm != "not tested":
            p_values[name, baseline] = test.pvalue, float(holm.strip("< "))
    corrected = holm_corrected([p for p, _ in p_values.values()])
    for (p, printed), expected in zip(sorted(p_values.values()), corrected, strict=True):
        assert printed == pytest.approx(max(1e-4, expected), rel=0.05), p


def test_the_results_quote_the_reports():
    """A difference in docs/results.md stands in a report, for the dataset that it names."""
    text = (ROOT / "docs/results.md").read_text()
    lines: dict[str, str] = {}
    for path in REPORTS:
        dataset = path.parent.name.partition("_")[0]
        lines[dataset] = lines.get(dataset, "") + path.read_text()
    quoted = re.findall(r"^\| (\w+) \| ([^|]+) \| ([^|]+) \| ([+-][^|]+) \|$", text, re.MULTILINE)
    for dataset, name, baseline, interval in quoted:
        row = rf"^\| {re.escape(name)} \| {re.escape(baseline)} \| \d+ \| \**{re.escape(interval)}"
        assert re.search(row, lines[dataset.lower()], re.MULTILINE), (dataset, name, baseline)
    assert bool(quoted) == bool(REPORTS)


def test_differences_in_sentences_stand_in_the_reports():
    """Differences with two decimals are of these studies; any of a row's spreads can be named."""
    known = set()
    for path in REPORTS:
        for mean, seeds, spreads in re.findall(
            r"\| \**[+-]([\d.]+) ± ([\d.]+)\** \|(?: [^|]+ \|){4} (.+) \|$",
            path.read_text(),
            re.MULTILINE,
        ):
            known |= {f"{mean} ± {spread}" for spread in (seeds, *spreads.split(" | "))}
    for document in ("README.md", "docs/results.md"):
        text = re.sub(r"^\|.*$", "", (ROOT / document).read_text(), flags=re.MULTILINE)
        named = re.findall(r"\b\d+\.\d\d\s±\s\d+\.\d\d\b", text)
        assert named and {re.sub(r"\s", " ", difference) for difference in named} <= known


def test_the_table_of_settings_follows_from_the_rows():
    """Mean differences from the best plain box loss on validation data, and their average."""
    text = (ROOT / "docs/results.md").read_text()
    table = re.search(r"^\| setting \|.+\n\|[-|]+\n((?:\|.+\n)+)", text, re.MULTILINE)
    assert table is not None
    printed = {}
    for line in table[1].splitlines():
        name, *values = [cell.strip(" *") for cell in line.strip("|").split("|")]
        printed[name] = values

    sets = ("bccd", "groceries", "allergen")
    expected: dict[str, list[float]] = {}
    for dataset in sets:
        ap = read_ap(f"{dataset}_settings")
        plain = ap["best plain box loss"]
        for name in [name for name in ap if name.startswith("PISA")]:
            gains = [ap[name][seed] - plain[seed] for seed in range(1, 6)]
            expected.setdefault(name, []).append(sum(gains) / 5)
    assert {name: values[:3] for name, values in printed.items()} == {
        name: [f"{value:+.2f}" for value in values] for name, values in expected.items()
    }
    averages = {name: sum(values) / len(sets) for name, values in expected.items()}
    assert {name: values[3] for name, values in printed.items()} == {
        name: f"{value:+.2f}" for name, value in averages.items()
    }
    assert list(printed) == sorted(averages, key=lambda name: -averages[name])


def test_the_confirmation_is_corrected_over_the_sets():
    """Each report has one test; docs/results.md corrects them for three."""
    p_values = {}
    for dataset in ("BCCD", "groceries", "allergen"):
        ap = read_ap(dataset.lower())
        chosen, plain = (
            [ap[name][seed] for seed in range(1, 21)]
            for name in ("PISA, all negatives ranked", "best plain box loss")
        )
        p_values[dataset] = stats.ttest_rel(chosen, plain).pvalue
    text = " ".join((ROOT / "docs/results.md").read_text().split())
    ordered = sorted(p_values, key=lambda name: p_values[name])
    for dataset, p in zip(ordered, holm_corrected(list(p_values.values())), strict=True):
        shown = f"= {p:.2g}" if p >= 1e-4 else "< 0.0001"
        assert f"{dataset} (p {shown})" in text
