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
# Those whose difference to the baseline is in the table; the picture has all.
COMPARED = METRICS[:3]


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
    """A mean over seeds and half of its 95% interval, infinite with one seed."""

    mean: float
    half: float

    def text(self, signed: bool = False) -> str:
        half = f" ± {self.half:.1f}" if math.isfinite(self.half) else ""
        return f"{self.mean:{'+' if signed else ''}.1f}{half}"


def interval(values: Sequence[float]) -> Interval:
    """By Student's t: what the seeds leave open, as if they were drawn from a normal law."""
    if len(values) < 2:
        return Interval(values[0], math.inf)
    quantile = students_t.ppf(0.975, len(values) - 1)
    return Interval(
        statistics.mean(values), quantile * statistics.stdev(values) / math.sqrt(len(values))
    )


class Grid(NamedTuple):
    """``against``: for each strategy, the one that it is compared with."""

    results: list[Result]
    against: dict[str, str]

    def datasets(self) -> list[str]:
        return list(dict.fromkeys(result.dataset for result in self.results))

    def rows(self, dataset: str) -> dict[str, list[Result]]:
        """The runs on a data set, by strategy, in the sequence of the grid."""
        rows = {
            name: [r for r in self.results if (r.dataset, r.strategy) == (dataset, name)]
            for name in self.against
        }
        return {name: runs for name, runs in rows.items() if runs}

    def pairs(self, dataset: str, strategy: str) -> list[tuple[Result, Result]]:
        """The runs of a strategy beside those of its baseline with the same seed."""
        rows = self.rows(dataset)
        base = {result.seed: result for result in rows.get(self.against[strategy], [])}
        return [(run, base[run.seed]) for run in rows[strategy] if run.seed in base]

    def differences(self, dataset: str, strategy: str, metric: str) -> list[float]:
        pairs = self.pairs(dataset, strategy)
        return [getattr(run, metric) - getattr(base, metric) for run, base in pairs]


def markdown(grid: Grid) -> str:
    """A table for each data set."""
    lines = []
    for dataset in grid.datasets():
        differences = [f"difference in {metric}" for metric in COMPARED]
        head = ["strategy", "against", "seeds", *METRICS, *differences, "time"]
        lines += [f"### {dataset}", "", f"| {' | '.join(head)} |", "|---|" + "---|" * len(head[1:])]
        for name, runs in grid.rows(dataset).items():
            cells = [interval([getattr(run, metric) for run in runs]).text() for metric in METRICS]
            pairs = grid.pairs(dataset, name)
            against = grid.against[name]
            if name == against or not pairs:
                cells += [""] * (len(COMPARED) + 1)
            else:
                for metric in COMPARED:
                    difference = interval(grid.differences(dataset, name, metric))
                    cells.append(difference.text(signed=True))
                ratio = statistics.median(run.seconds / base.seconds for run, base in pairs)
                cells.append(f"{ratio:.2f}")
            shown = "" if name == against else against
            lines.append(f"| {name} | {shown} | {len(runs)} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def plot(grid: Grid, path: Path) -> None:
    """Differences to the baseline, a panel for each metric, a row of panels for each data set."""
    compared = {
        dataset: [
            name
            for name in grid.rows(dataset)
            if name != grid.against[name] and grid.pairs(dataset, name)
        ]
        for dataset in grid.datasets()
    }
    compared = {dataset: names for dataset, names in compared.items() if names}
    if not compared:
        return
    heights = [0.9 + 0.24 * len(names) for names in compared.values()]
    figure = Figure(figsize=(15, sum(heights)), dpi=100, layout="constrained")
    panels = figure.subplots(
        len(compared), len(METRICS), squeeze=False, sharey="row", height_ratios=heights
    )
    for row, (dataset, names) in zip(panels, compared.items(), strict=True):
        for axes, metric in zip(row, METRICS, strict=True):
            for place, name in enumerate(names):
                plot_difference(axes, place, grid.differences(dataset, name, metric))
            axes.axvline(0, color="gray", lw=1)
            axes.grid(axis="x", alpha=0.3)
            axes.set_title(f"{dataset}, {metric}", fontsize=10)
        row[0].set_yticks(range(len(names)), [label(grid, name) for name in names], fontsize=8)
        row[0].invert_yaxis()
    figure.supxlabel("difference to the baseline of the same seed: each, mean and 95% interval")
    figure.savefig(path)


def label(grid: Grid, name: str) -> str:
    """The strategy; with its baseline, where that is not the one of most."""
    baselines = list(grid.against.values())
    usual = max(baselines, key=baselines.count)
    own = grid.against[name]
    return name if own == usual else f"{name} against {own}"


def plot_difference(axes: Axes, place: int, differences: list[float]) -> None:
    mean, half = interval(differences)
    axes.plot(differences, [place] * len(differences), ".", color="lightgray")
    # An interval that leaves 0 out is drawn in colour.
    color = "gray" if abs(mean) <= half else ("C0" if mean > 0 else "C3")
    length = half if math.isfinite(half) else None
    axes.errorbar(mean, place, xerr=length, fmt="o", ms=4, color=color)
