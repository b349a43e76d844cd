"""Statistics of the runs of a grid: means, 95% intervals over seeds, and differences by seed."""

import math
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t as students_t

from pisa_d2.engine.metrics import COCO_METRICS

# Comparisons in a panel of the plot.
MAX_ROWS = 12


class Result(NamedTuple):
    """A run: COCO AP in percent, NaN for none; and seconds of training, NaN if not timed."""

    dataset: str
    strategy: str
    seed: int
    AP: float
    AP50: float
    AP75: float
    APs: float
    APm: float
    APl: float
    seconds: float
    settings: str

    @classmethod
    def from_row(cls, row: dict[str, str]) -> "Result":
        return cls(**{name: kind(row[name]) for name, kind in cls.__annotations__.items()})


class Interval(NamedTuple):
    """A mean over seeds and half of its 95% interval, infinite where nothing tells how wide."""

    mean: float
    half: float

    def text(self, signed: bool = False) -> str:
        if math.isnan(self.mean):  # COCO has no AP of a size without any object
            return "none"
        half = f" ± {self.half:.1f}" if math.isfinite(self.half) else ""
        return f"{self.mean:{'+' if signed else ''}.1f}{half}"


class Spread(NamedTuple):
    """
    Standard deviation of a metric over the runs of a strategy, and the degrees of freedom that it
    was estimated with.
    """

    deviation: float
    freedom: int

    def interval(self, values: Sequence[float], runs_each: int) -> Interval:
        """
        By Student's t, of the mean of ``values``, each of one run, or the difference of two
        (``runs_each`` = 2).
        """
        if self.freedom == 0:
            return Interval(statistics.mean(values), math.inf)
        quantile = students_t.ppf(0.975, self.freedom)
        error = self.deviation * math.sqrt(runs_each / len(values))
        return Interval(statistics.mean(values), quantile * error)


def spread(results: Sequence[Result], metric: str, paired: bool) -> Spread:
    """
    Estimate the spread of ``metric`` around the mean of each strategy; if ``paired``, also without
    the mean effect of each seed (the residuals of an analysis of variance with one or two factors).

    The spread is pooled over strategies, which are assumed to vary equally: three seeds of one
    strategy say so little about its spread that intervals would be twice as wide, and their width
    chance.
    """
    factors: list[list[Any]] = [[result.strategy for result in results]]
    if paired:
        factors.append([result.seed for result in results])
    levels = [
        [level == name for level in factor] for factor in factors for name in dict.fromkeys(factor)
    ]
    design = np.array(levels, dtype=float).T
    values = np.array([getattr(result, metric) for result in results])
    effects, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
    residuals = values - design @ effects
    freedom = len(values) - int(rank)
    return Spread(math.sqrt(residuals @ residuals / max(freedom, 1)), freedom)


class Pair(NamedTuple):
    """A strategy and what it is compared with."""

    strategy: str
    baseline: str


class Grid(NamedTuple):
    """
    Attributes:
        tables: strategies in rows and columns, by title, row and column.
    """

    results: list[Result]
    pairs: list[Pair]
    tables: dict[str, dict[str, dict[str, str]]]

    def datasets(self) -> list[str]:
        return list(dict.fromkeys(result.dataset for result in self.results))

    def runs(self, dataset: str) -> dict[str, dict[int, Result]]:
        """Return the runs on a dataset, by strategy and seed."""
        runs: dict[str, dict[int, Result]] = {}
        for result in self.results:
            if result.dataset == dataset:
                runs.setdefault(result.strategy, {})[result.seed] = result
        return runs

    def beside(self, dataset: str, pair: Pair) -> list[tuple[Result, Result]]:
        """Pair the runs of a strategy with the runs of its baseline of the same seed."""
        runs = self.runs(dataset)
        of_baseline = runs.get(pair.baseline, {})
        return [
            (run, of_baseline[seed])
            for seed, run in runs.get(pair.strategy, {}).items()
            if seed in of_baseline
        ]

    def compared(self, dataset: str) -> dict[Pair, list[tuple[Result, Result]]]:
        """Return the pairs of strategies that have runs of the same seed."""
        return {pair: beside for pair in self.pairs if (beside := self.beside(dataset, pair))}

    def families(self, dataset: str) -> set[frozenset[str]]:
        """Return the groups of strategies that are compared, directly or through others."""
        families = {name: frozenset([name]) for name in self.runs(dataset)}
        for pair in self.compared(dataset):
            family = families[pair.strategy] | families[pair.baseline]
            families.update(dict.fromkeys(family, family))
        return set(families.values())

    def spreads(self, dataset: str, paired: bool) -> dict[str, dict[str, Spread]]:
        """
        Return :func:`spread` by strategy and metric, over the strategy's family: a seed has
        different effects on different models, which would count as spread of both.
        """
        of_dataset = [result for result in self.results if result.dataset == dataset]
        spreads = {}
        for family in self.families(dataset):
            results = [result for result in of_dataset if result.strategy in family]
            of_family = {metric: spread(results, metric, paired) for metric in COCO_METRICS}
            spreads.update(dict.fromkeys(family, of_family))
        return spreads


def differences(beside: list[tuple[Result, Result]], metric: str) -> list[float]:
    return [getattr(run, metric) - getattr(base, metric) for run, base in beside]


def markdown(grid: Grid) -> str:
    """Return a table of AP and a table of differences from the baselines for each dataset."""
    columns = " | ".join(COCO_METRICS)
    rule = "---|" * len(COCO_METRICS)
    lines = []
    for dataset in grid.datasets():
        lines += [f"### {dataset}", "", f"| strategy | seeds | {columns} |", f"|---|---|{rule}"]
        of_runs = grid.spreads(dataset, paired=False)
        of_differences = grid.spreads(dataset, paired=True)
        for name, runs in grid.runs(dataset).items():
            cells = [
                of_runs[name][metric]
                .interval([getattr(run, metric) for run in runs.values()], 1)
                .text()
                for metric in COCO_METRICS
            ]
            lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
        if compared := grid.compared(dataset):
            head = f"| difference of | to | seeds | {columns} | time |"
            lines += ["", head, f"|---|---|---|{rule}---|"]
        for (name, baseline), beside in compared.items():
            cells = [
                of_differences[name][metric]
                .interval(differences(beside, metric), 2)
                .text(signed=True)
                for metric in COCO_METRICS
            ]
            # The fastest of each: other load of the machine can only slow a run down.
            seconds, of_base = (
                min(run.seconds for run in runs) for runs in zip(*beside, strict=True)
            )
            ratio = seconds / of_base
            time = f"x {ratio:.2f}" if math.isfinite(ratio) else "not timed"
            values = " | ".join([*cells, time])
            lines.append(f"| {name} | {baseline} | {len(beside)} | {values} |")
        lines.append("")
        for title, rows in grid.tables.items():
            table = cross_table(grid, dataset, rows, of_runs, of_differences)
            lines += [f"{title}, {dataset}:", "", *table, ""]
    return "\n".join(lines)


def cross_table(
    grid: Grid,
    dataset: str,
    rows: dict[str, dict[str, str]],
    of_runs: dict[str, dict[str, Spread]],
    of_differences: dict[str, dict[str, Spread]],
) -> list[str]:
    """Return a table of the first strategy's AP and the others' differences from it."""
    first = next(iter(next(iter(rows.values())).values()))

    def cell(name: str) -> str:
        beside = grid.beside(dataset, Pair(name, first))
        if not beside:
            return "not run"
        if name == first:
            return of_runs[name]["AP"].interval([run.AP for run, _ in beside], 1).text()
        return of_differences[name]["AP"].interval(differences(beside, "AP"), 2).text(signed=True)

    columns = next(iter(rows.values()))
    lines = [f"| AP | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for name, row in rows.items():
        lines.append(f"| {name} | {' | '.join(cell(row[column]) for column in columns)} |")
    return lines


def plot(grid: Grid, path: Path) -> None:
    """
    Draw differences in AP from the baselines, one panel per dataset: the comparisons with the most
    seeds, at most ``MAX_ROWS``. The tables have all comparisons and metrics.
    """
    datasets = {name: compared for name in grid.datasets() if (compared := grid.compared(name))}
    if not datasets:
        return
    drawn = {}
    for dataset, compared in datasets.items():
        most = sorted(compared, key=lambda pair: -len(compared[pair]))[:MAX_ROWS]
        drawn[dataset] = [pair for pair in compared if pair in most]
    rows = max(map(len, drawn.values()))
    size = 6.5 * len(datasets), 1.2 + 0.33 * rows
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    for axes, (dataset, pairs) in zip(
        figure.subplots(1, len(datasets), squeeze=False)[0], drawn.items(), strict=True
    ):
        spreads = grid.spreads(dataset, paired=True)
        for place, pair in enumerate(pairs):
            values = differences(datasets[dataset][pair], "AP")
            plot_difference(axes, place, values, spreads[pair.strategy]["AP"])
        axes.axvline(0, color="gray", lw=1)
        axes.grid(axis="x", alpha=0.3)
        axes.tick_params(axis="y", length=0)
        left_out = len(datasets[dataset]) - len(pairs)
        more = f" ({left_out} more: see the tables)" if left_out else ""
        axes.set_title(f"{dataset}{more}", fontsize=9, parse_math=False)
        labels = [textwrap.fill(f"{name} - ({baseline})", 36) for name, baseline in pairs]
        axes.set_yticks(range(len(labels)), labels, fontsize=8, parse_math=False)
        axes.set_ylim(rows - 0.5, -0.5)
    figure.supxlabel(
        "difference in AP to the baseline of the same seed: each, mean and 95% interval\n"
        "(spread pooled over all strategies; in colour where the interval excludes 0)",
        fontsize=9,
    )
    figure.savefig(path)


def plot_difference(axes: Axes, place: int, values: list[float], spread: Spread) -> None:
    mean, half = spread.interval(values, runs_each=2)
    axes.plot(values, [place] * len(values), ".", color="lightgray")
    # An interval that excludes 0 is drawn in colour.
    color = "gray" if abs(mean) <= half else ("C0" if mean > 0 else "C3")
    length = half if math.isfinite(half) else None
    axes.errorbar(mean, place, xerr=length, fmt="o", ms=4, color=color)
