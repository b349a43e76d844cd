"""Statistics of the runs of a grid: means, differences by seed, and whether they may be chance."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pisa_d2.engine.metrics import COCO_METRICS
from pisa_d2.engine.paired import (
    SIGNIFICANT,
    Interval,
    holm,
    mean_interval,
    p_text,
    paired_t_test,
    welch,
)

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


class Pair(NamedTuple):
    """
    A strategy and what it is compared with.

    Attributes:
        paired: whether runs of the same seed have seen the same images in the same order.
        tested: whether the comparison is one of those that are corrected for each other.
    """

    strategy: str
    baseline: str
    paired: bool = True
    tested: bool = True


class Difference(NamedTuple):
    """
    A pair of strategies on a dataset.

    Attributes:
        runs, baseline: of the same seeds, in the same order, if paired.
        holm: the p-value adjusted for all that are tested with it; None if it is not tested.
    """

    dataset: str
    pair: Pair
    runs: list[Result]
    baseline: list[Result]
    holm: float | None

    def _of_each(self, metric: str) -> tuple[list[float], list[float]]:
        ours, theirs = ([getattr(run, metric) for run in of] for of in (self.runs, self.baseline))
        return ours, theirs

    def by_seed(self, metric: str) -> list[float]:
        """The differences of paired runs."""
        return [run - base for run, base in zip(*self._of_each(metric), strict=True)]

    def interval(self, metric: str) -> Interval:
        """The interval of the mean difference: by the paired t-test, or else by Welch's."""
        if self.pair.paired:
            return mean_interval(self.by_seed(metric))
        return welch(*self._of_each(metric)).interval()

    def p(self) -> float:
        """The p-value of the difference in AP by the same test."""
        if self.pair.paired:
            return paired_t_test(self.by_seed("AP"))
        return welch(*self._of_each("AP")).p_value()

    @property
    def seeds(self) -> str:
        numbers = [len(self.runs), len(self.baseline)]
        return str(numbers[0]) if self.pair.paired else ", ".join(map(str, numbers))

    @property
    def several(self) -> bool:
        """True if each strategy has more than one run; otherwise nothing can be tested."""
        return min(len(self.runs), len(self.baseline)) > 1

    @property
    def differs(self) -> bool:
        """True if this is a difference after the correction for all that are tested with it."""
        return self.holm is not None and self.holm < SIGNIFICANT

    @property
    def time(self) -> float:
        """Ratio of the fastest runs: other load of the machine can only slow a run down."""
        seconds, of_base = (min(run.seconds for run in of) for of in (self.runs, self.baseline))
        return seconds / of_base


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

    def difference(self, dataset: str, pair: Pair) -> Difference | None:
        """Return the difference of a pair, not corrected; None if there are no runs for it."""
        runs = self.runs(dataset)
        ours, theirs = runs.get(pair.strategy, {}), runs.get(pair.baseline, {})
        if pair.paired:
            shared = [seed for seed in ours if seed in theirs]
            ours, theirs = ({seed: of[seed] for seed in shared} for of in (ours, theirs))
        if not ours or not theirs:
            return None
        return Difference(dataset, pair, list(ours.values()), list(theirs.values()), None)

    def differences(self) -> list[Difference]:
        """
        Return the differences of all pairs on all datasets. Differences in a family are corrected
        for each other by Holm's method; a pair without two runs of each is not tested.
        """
        found = [
            difference
            for dataset in self.datasets()
            for pair in self.pairs
            if (difference := self.difference(dataset, pair))
        ]
        for family in self.families():
            tested = [
                place
                for place, difference in enumerate(found)
                if difference.pair.tested
                and difference.pair.strategy in family
                and difference.several
            ]
            adjusted = holm([found[place].p() for place in tested])
            for place, p in zip(tested, adjusted, strict=True):
                found[place] = found[place]._replace(holm=p)
        return found

    def families(self) -> set[frozenset[str]]:
        """Return the groups of strategies that are compared, directly or through others."""
        families: dict[str, frozenset[str]] = {}
        for pair in self.pairs:
            family = frozenset().union(*(families.get(name, {name}) for name in pair[:2]))
            families.update(dict.fromkeys(family, family))
        return set(families.values())


def markdown(grid: Grid) -> str:
    """Return a table of AP and a table of differences from the baselines for each dataset."""
    columns = " | ".join(COCO_METRICS)
    rule = "---|" * len(COCO_METRICS)
    differences = grid.differences()
    lines = []
    for dataset in grid.datasets():
        lines += [f"### {dataset}", "", f"| strategy | seeds | {columns} |", f"|---|---|{rule}"]
        for name, runs in grid.runs(dataset).items():
            cells = [
                _text(mean_interval([getattr(run, metric) for run in runs.values()]))
                for metric in COCO_METRICS
            ]
            lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
        if of_dataset := [found for found in differences if found.dataset == dataset]:
            first, *others = COCO_METRICS
            head = f"| difference of | to | seeds | {first} | p | p, Holm |"
            head += f" {' | '.join(others)} | time |"
            lines += ["", head, f"|---|---|---|---|---|---|{'---|' * len(others)}---|"]
        lines += [_line(found) for found in of_dataset]
        lines.append("")
        for title, rows in grid.tables.items():
            table = cross_table(grid, dataset, rows)
            lines += [f"{title}, {dataset}:", "", *table, ""]
    return "\n".join(lines)


def _text(interval: Interval, signed: bool = False) -> str:
    return interval.text(signed, digits=1)


def _line(found: Difference) -> str:
    ap, *others = (_text(found.interval(metric), signed=True) for metric in COCO_METRICS)
    cells = [
        found.pair.strategy,
        found.pair.baseline,
        found.seeds,
        f"**{ap}**" if found.differs else ap,
        p_text(found.p()) if found.several else "",
        "not tested" if found.holm is None else p_text(found.holm),
        *others,
        f"x {found.time:.2f}" if math.isfinite(found.time) else "not timed",
    ]
    return f"| {' | '.join(cells)} |"


def cross_table(grid: Grid, dataset: str, rows: dict[str, dict[str, str]]) -> list[str]:
    """Return a table of the first strategy's AP and the others' differences from it."""
    first = next(iter(next(iter(rows.values())).values()))

    def cell(name: str) -> str:
        found = grid.difference(dataset, Pair(name, first))
        if found is None:
            return "not run"
        if name == first:
            return _text(mean_interval([run.AP for run in found.runs]))
        return _text(found.interval("AP"), signed=True)

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
    by_dataset: dict[str, list[Difference]] = {}
    for found in grid.differences():
        by_dataset.setdefault(found.dataset, []).append(found)
    if not by_dataset:
        return
    drawn = {}
    for dataset, of_dataset in by_dataset.items():
        most = sorted(of_dataset, key=lambda found: -len(found.runs))[:MAX_ROWS]
        drawn[dataset] = [found for found in of_dataset if found in most]
    rows = max(map(len, drawn.values()))
    size = 6.5 * len(drawn), 1.2 + 0.33 * rows
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    for axes, (dataset, differences) in zip(
        figure.subplots(1, len(drawn), squeeze=False)[0], drawn.items(), strict=True
    ):
        for place, found in enumerate(differences):
            plot_difference(axes, place, found)
        axes.axvline(0, color="gray", lw=1)
        axes.grid(axis="x", alpha=0.3)
        axes.tick_params(axis="y", length=0)
        left_out = len(by_dataset[dataset]) - len(differences)
        more = f" ({left_out} more: see the tables)" if left_out else ""
        axes.set_title(f"{dataset}{more}", fontsize=9, parse_math=False)
        labels = [f"{found.pair.strategy} - ({found.pair.baseline})" for found in differences]
        wrapped = [textwrap.fill(label, 36) for label in labels]
        axes.set_yticks(range(len(wrapped)), wrapped, fontsize=8, parse_math=False)
        axes.set_ylim(rows - 0.5, -0.5)
    figure.supxlabel(
        "difference in AP from the baseline: of each seed (light), and their mean with its 95% "
        "interval\n(in colour if it differs after Holm's correction for all that are tested)",
        fontsize=9,
    )
    figure.savefig(path)


def plot_difference(axes: Axes, place: int, found: Difference) -> None:
    mean, half = found.interval("AP")
    values: Sequence[float] = found.by_seed("AP") if found.pair.paired else []
    axes.plot(values, [place] * len(values), ".", color="lightgray")
    color = "gray" if not found.differs else ("C0" if mean > 0 else "C3")
    length = half if math.isfinite(half) else None
    axes.errorbar(mean, place, xerr=length, fmt="o", ms=4, color=color)
