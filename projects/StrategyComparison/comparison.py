"""What the runs of a grid say: means, 95% intervals over seeds, and differences by seed."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t as students_t

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


class Result(NamedTuple):
    """A run: COCO AP in percent, and seconds of training."""

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
    """A mean over seeds and half of its 95% interval, infinite with fewer than three."""

    mean: float
    half: float

    def text(self, signed: bool = False) -> str:
        half = f" ± {self.half:.1f}" if math.isfinite(self.half) else ""
        return f"{self.mean:{'+' if signed else ''}.1f}{half}"


def interval(values: Sequence[float]) -> Interval:
    """
    By Student's t: what the seeds leave open, as if they were drawn from a normal law. That of two
    seeds would be 12 times as wide as these lie apart, and hide all else in a picture.
    """
    if len(values) < 3:
        return Interval(statistics.mean(values), math.inf)
    quantile = students_t.ppf(0.975, len(values) - 1)
    return Interval(
        statistics.mean(values), quantile * statistics.stdev(values) / math.sqrt(len(values))
    )


class Pair(NamedTuple):
    """A strategy and what it is compared with."""

    strategy: str
    baseline: str


class Grid(NamedTuple):
    results: list[Result]
    pairs: list[Pair]

    def datasets(self) -> list[str]:
        return list(dict.fromkeys(result.dataset for result in self.results))

    def runs(self, dataset: str) -> dict[str, dict[int, Result]]:
        """The runs on a data set, by strategy and seed."""
        runs: dict[str, dict[int, Result]] = {}
        for result in self.results:
            if result.dataset == dataset:
                runs.setdefault(result.strategy, {})[result.seed] = result
        return runs

    def compared(self, dataset: str) -> dict[Pair, list[tuple[Result, Result]]]:
        """The runs of each strategy beside those of its baseline with the same seed."""
        runs = self.runs(dataset)
        compared = {
            pair: [
                (run, runs[pair.baseline][seed])
                for seed, run in runs.get(pair.strategy, {}).items()
                if seed in runs.get(pair.baseline, {})
            ]
            for pair in self.pairs
        }
        return {pair: beside for pair, beside in compared.items() if beside}


def differences(beside: list[tuple[Result, Result]], metric: str) -> list[float]:
    return [getattr(run, metric) - getattr(base, metric) for run, base in beside]


def markdown(grid: Grid) -> str:
    """For each data set a table of AP, and one of the differences to the baselines."""
    columns = " | ".join(METRICS)
    rule = "---|" * len(METRICS)
    lines = []
    for dataset in grid.datasets():
        lines += [f"### {dataset}", "", f"| strategy | seeds | {columns} |", f"|---|---|{rule}"]
        for name, runs in grid.runs(dataset).items():
            cells = [
                interval([getattr(run, metric) for run in runs.values()]).text()
                for metric in METRICS
            ]
            lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
        if compared := grid.compared(dataset):
            head = f"| difference of | to | seeds | {columns} | time |"
            lines += ["", head, f"|---|---|---|{rule}---|"]
        for (name, baseline), beside in compared.items():
            cells = [interval(differences(beside, metric)).text(signed=True) for metric in METRICS]
            # The fastest of each: what else the machine does can only slow a run down.
            seconds, of_base = (
                min(run.seconds for run in runs) for runs in zip(*beside, strict=True)
            )
            ratio = seconds / of_base
            values = " | ".join([*cells, f"x {ratio:.2f}"])
            lines.append(f"| {name} | {baseline} | {len(beside)} | {values} |")
        lines.append("")
    return "\n".join(lines)


def plot(grid: Grid, path: Path) -> None:
    """Differences to the baselines, a panel for each metric and data set."""
    datasets = {name: compared for name in grid.datasets() if (compared := grid.compared(name))}
    if not datasets:
        return
    heights = [0.9 + 0.24 * len(compared) for compared in datasets.values()]
    figure = Figure(figsize=(16, sum(heights)), dpi=100, layout="constrained")
    panels = figure.subplots(
        len(datasets), len(METRICS), squeeze=False, sharey="row", height_ratios=heights
    )
    for row, (dataset, compared) in zip(panels, datasets.items(), strict=True):
        for axes, metric in zip(row, METRICS, strict=True):
            for place, beside in enumerate(compared.values()):
                plot_difference(axes, place, differences(beside, metric))
            axes.axvline(0, color="gray", lw=1)
            axes.grid(axis="x", alpha=0.3)
            axes.set_title(f"{dataset}, {metric}", fontsize=10)
        labels = [f"{name} - ({baseline})" for name, baseline in compared]
        row[0].set_yticks(range(len(labels)), labels, fontsize=8)
        row[0].invert_yaxis()
    figure.supxlabel("difference to the baseline of the same seed: each, mean and 95% interval")
    figure.savefig(path)


def plot_difference(axes: Axes, place: int, values: list[float]) -> None:
    mean, half = interval(values)
    axes.plot(values, [place] * len(values), ".", color="lightgray")
    # An interval that leaves 0 out is drawn in colour.
    color = "gray" if abs(mean) <= half else ("C0" if mean > 0 else "C3")
    length = half if math.isfinite(half) else None
    axes.errorbar(mean, place, xerr=length, fmt="o", ms=4, color=color)
