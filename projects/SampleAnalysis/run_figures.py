"""Figures that compare runs of one or several seeds: scores by rank and by IoU, and losses."""

import numpy as np
from findings import IOU_EDGES, KINDS, LOSS_EDGES, ScoreStatistics
from html_report import Plot, Table
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from palette import DPI, STYLES
from running_sums import Means
from seeds import OverSeeds, over_seeds

# The statistics of each seed, by the name of the run; the first run is the baseline.
Runs = dict[str, list[ScoreStatistics]]
Facts = dict[str, float | int | str]

FEWEST = 50  # samples that a mean is drawn of
NUM_POINTS = 25  # at least, of a curve over ranks
LOWEST_IOU = 0.3  # that is drawn
LOW_IOU, HIGH_IOU = 0.7, 0.8  # below and above which changes are summed up


def means_by_rank(means: Means, num_ranks: int, width: int) -> np.ndarray:
    """Return the mean score of blocks of ``width`` ranks, up to ``num_ranks``."""
    starts = np.arange(0, num_ranks - width + 1, width)
    if not len(starts):
        return np.zeros(0)
    end = len(starts) * width
    sums, counts = (np.add.reduceat(x[:end], starts) for x in (means.sums, means.counts))
    return sums / counts


def plot_ranks(runs: Runs) -> Plot:
    """
    Args:
        runs: one run of one seed, or several of equally many seeds.
    """
    names, base = list(runs), next(iter(runs))
    has_change = len(runs) > 1
    height = 5.6 if has_change else 3.6
    figure = Figure(figsize=(11, height), dpi=DPI, layout="constrained")
    grid = figure.subplots(1 + has_change, 2, squeeze=False, sharex="col")
    rows: list[list] = []
    facts: Facts = {}
    for kind, panels in zip(KINDS, grid.T, strict=True):
        found = {name: [getattr(s, kind) for s in seeds] for name, seeds in runs.items()}
        # A mean over few images would say more about these images than about the rank.
        num = min(
            _num_drawn(means, s.num_images)
            for name in names
            for means, s in zip(found[name], runs[name], strict=True)
        )
        width = max(num // NUM_POINTS, 1)
        curves = {n: [means_by_rank(m, num, width) for m in found[n]] for n in names}
        x = np.arange(len(curves[base][0])) * width + (width - 1) / 2
        for style, name in zip(STYLES, names, strict=False):
            _line(panels[0], x, OverSeeds.of(curves[name]), style, name)
            if name != base:
                _line(panels[-1], x, over_seeds(curves[name], curves[base]), style, name)
        of_kind = "IoU-HLR" if kind == "positives" else "Score-HLR"
        score = "score of the object's class" if kind == "positives" else "highest score"
        panels[0].set(title=kind, ylabel=f"{score}, mean", ylim=(0, None))
        panels[0].legend(fontsize=8)
        panels[-1].set_xlabel(f"{of_kind} in the image, from 0")
        if has_change:
            panels[-1].axhline(0, color="gray", lw=0.8)
            panels[-1].set_ylabel(f"change of the mean from {base}")
            panels[-1].legend(fontsize=8)
        facts |= {f"{kind}: ranks drawn": num, f"{kind}: ranks per point": width}
        for name in names:
            every = sum(int(m.counts.sum()) for m in found[name])
            beyond = sum(int(m.counts[num:].sum()) for m in found[name])
            facts |= {f"{name}: {kind}": every, f"{name}: {kind} beyond": beyond}
            rows += [
                [kind, name, seed + 1, rank, int(m.counts[rank]), float(m.means[rank])]
                for seed, m in enumerate(found[name])
                for rank in np.flatnonzero(m.counts[:num])
            ]
            if name == base or not num:
                continue
            parts = {"rank 0": slice(0, 1), "second half of the ranks": slice(num // 2, num)}
            for part, ranks in parts.items():
                of_seeds = [[m.means[ranks].mean() for m in found[n]] for n in (name, base)]
                facts |= over_seeds(*of_seeds).facts(f"{name} - {base}: {kind}, {part}")
    left = ", ".join(f"{facts[f'{base}: {k} beyond']:,} {k}" for k in KINDS)
    return Plot(
        "scores_by_rank",
        "Scores by rank",
        "Look at whether ISR raises the front of the positives and lowers what is behind it, and "
        "lowers negatives most at the front.",
        "Mean score of the test-time proposals of each detector, ranked by its own boxes and "
        "scores in each image and, positives, class. Drawn are ranks that at least half of the "
        f"images reach: {facts['positives: ranks drawn']} ranks of positives, "
        f"{facts['positives: ranks per point']} per point, and {facts['negatives: ranks drawn']} "
        f"of negatives, {facts['negatives: ranks per point']} per point; beyond them {base} has "
        f"{left}, which are not drawn. Scores of negatives rise again where the second of each "
        f"group follow the first. {_bands(runs)}",
        figure,
        Table(["kind", "run", "seed", "rank", "samples", "mean score"], rows),
        facts,
        _changes(facts, base),
    )


def plot_score_by_iou(runs: Runs) -> Plot:
    """
    Args:
        runs: one run of one seed, or several of equally many seeds.
    """
    names, base = list(runs), next(iter(runs))
    has_change = len(runs) > 1
    heights = [3, 2.4, 1.1] if has_change else [3, 1.2]
    figure = Figure(figsize=(7.5, 1.1 * sum(heights)), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    centres = (IOU_EDGES[:-1] + IOU_EDGES[1:]) / 2
    rows: list[list] = []
    facts: Facts = {}
    cells = {n: [_of_all_cells(s.by_iou, len(centres)) for s in runs[n]] for n in names}
    enough = np.all([counts >= FEWEST for n in names for counts, _ in cells[n]], axis=0)
    means = {
        n: [np.where(enough, sums / np.maximum(counts, 1), np.nan) for counts, sums in cells[n]]
        for n in names
    }
    for style, name in zip(STYLES, names, strict=False):
        values = OverSeeds.of([s.correlation.value for s in runs[name]])
        label = f"{name} (correlation {float(values.mean):.2f})"
        _line(panels[0], centres, OverSeeds.of(means[name]), style, label)
        facts[f"{name}: correlation"] = float(values.mean)
        if name != base:
            _line(panels[1], centres, over_seeds(means[name], means[base]), style, name)
            pair = [[s.correlation.value for s in runs[n]] for n in (name, base)]
            facts |= over_seeds(*pair).facts(f"{name} - {base}: correlation")
            for part, chosen in (
                (f"IoU below {LOW_IOU}", centres < LOW_IOU),
                (f"IoU above {HIGH_IOU}", centres > HIGH_IOU),
            ):
                pair = [
                    [s[chosen].sum() / max(c[chosen].sum(), 1) for c, s in cells[n]]
                    for n in (name, base)
                ]
                facts |= over_seeds(*pair).facts(f"{name} - {base}: {part}")
        rows += [
            [name, seed + 1, float(x), int(n), float(s / n) if n else float("nan")]
            for seed, (counts, sums) in enumerate(cells[name])
            for x, n, s in zip(centres, counts, sums, strict=True)
        ]
    counts = cells[base][0][0]
    panels[-1].bar(centres, counts, 0.8 * IOU_EDGES[1], color="0.5")
    panels[0].set(ylabel="score of the\nobject's class, mean", ylim=(0, None))
    panels[0].legend(loc="upper left", fontsize=8)
    if has_change:
        panels[1].axhline(0, color="gray", lw=0.8)
        panels[1].set_ylabel(f"change of the mean\nfrom {base}")
        panels[1].legend(loc="lower right", fontsize=8, ncols=2)
    panels[-1].set(xlabel="IoU of the regressed box with its object", ylabel="positives")
    panels[-1].set_xlim(LOWEST_IOU, 1)
    facts["positives"] = int(counts.sum())
    facts["fewest positives of a cell that is drawn"] = FEWEST
    facts["positives in cells that are not drawn"] = int(counts[~enough].sum())
    facts[f"positives below {LOWEST_IOU}"] = int(counts[centres < LOWEST_IOU].sum())
    return Plot(
        "scores_by_iou",
        "Scores by IoU",
        "Look at whether CARL raises scores at high IoU and lowers them at low IoU, so that the "
        "classifier tells how well a box fits.",
        "Mean score of the positives among the test-time proposals of each detector, in cells of "
        f"{IOU_EDGES[1]} of IoU. Cells in which some seed has fewer than {FEWEST} positives are "
        f"not drawn: {facts['positives in cells that are not drawn']:,} of the "
        f"{facts['positives']:,} positives of {base}, first seed, of which "
        f"{facts[f'positives below {LOWEST_IOU}']:,} lie left of the axis, below {LOWEST_IOU}. "
        "The lowest panel counts that seed's positives. The correlation is that of score and IoU. "
        f"{_bands(runs)}",
        figure,
        Table(["run", "seed", "IoU (centre of the cell)", "positives", "mean score"], rows),
        facts,
        _changes(facts, base),
    )


def plot_after_training(runs: Runs) -> Plot:
    """
    Args:
        runs: one run of one seed, or several of equally many seeds.
    """
    names, base = list(runs), next(iter(runs))
    figure = Figure(figsize=(11, 6.4), dpi=DPI, layout="constrained")
    grid = figure.subplots(2, 2)
    rows: list[list] = []
    facts: Facts = {}
    for panels, kind in zip(grid, KINDS, strict=True):
        for axes, value, edges in zip(
            panels, ("loss", "IoU"), (LOSS_EDGES, IOU_EDGES), strict=True
        ):
            field = {"loss": "losses", "IoU": "ious"}[value]
            for style, name in zip(STYLES, names, strict=False):
                found = [getattr(s, field)[kind] for s in runs[name]]
                shares = [100 * h.counts / max(h.counts.sum(), 1) for h in found]
                mean = OverSeeds.of([h.mean for h in found])
                label = f"{name} (mean {float(mean.mean):.2f})"
                centres = (
                    np.sqrt(edges[:-1] * edges[1:])
                    if value == "loss"
                    else (edges[:-1] + edges[1:]) / 2
                )
                _line(axes, centres, OverSeeds.of(shares), style, label)
                facts[f"{name}: mean {value} of {kind}"] = float(mean.mean)
                facts[f"{name}: {kind}"] = sum(int(h.counts.sum()) for h in found)
                if name != base:
                    pair = [[getattr(s, field)[kind].mean for s in runs[n]] for n in (name, base)]
                    facts |= over_seeds(*pair).facts(f"{name} - {base}: {value} of {kind}")
                rows += [
                    [kind, value, name, seed + 1, float(x), int(n)]
                    for seed, h in enumerate(found)
                    for x, n in zip(edges[:-1], h.counts, strict=True)
                ]
            if value == "loss":
                axes.set_xscale("log")
            axes.set(title=kind, ylim=(0, None), ylabel=f"{kind} in a cell, in %")
            box = "regressed box with its object" if value == "IoU" else ""
            axes.set_xlabel("classification loss" if value == "loss" else f"IoU of the {box}")
            axes.legend(fontsize=8)
    for axes in grid[1]:
        axes.set_yscale("log")
        axes.set_ylim(0.01, None)
    return Plot(
        "after_training",
        "Losses and boxes after training",
        "Look at which positives a strategy leaves with a high loss, and how well their boxes fit.",
        "Classification loss and IoU of the regressed box, of all positives and all negatives "
        "among the test-time proposals, after training by each strategy; a negative's box is the "
        "one of its highest-scored class. Cells are of equal width on the axis; losses beyond the "
        "axis are counted in its end cells. The negatives' axis is logarithmic, and cells below "
        f"0.01% are not drawn. {_bands(runs)}",
        figure,
        Table(["kind", "value", "run", "seed", "cell from", "samples"], rows),
        facts,
        _changes(facts, base),
    )


def _bands(runs: Runs) -> str:
    num = len(next(iter(runs.values())))
    if num == 1:
        return "One seed, so without a band."
    return f"Lines are means over {num} seeds, bands 95% intervals over these (Student's t)."


def _changes(facts: Facts, base: str) -> Table | None:
    """The differences with their intervals, for the page."""
    rows = []
    for name, value in facts.items():
        if f" - {base}: " in name and f"{name}, low" in facts:
            low, high = (float(facts[f"{name}, {end}"]) for end in ("low", "high"))
            interval = "" if np.isnan(low) else f"{low:+.3f} to {high:+.3f}"
            rows.append([name, f"{float(value):+.3f}", interval])
    return Table(["change", "mean", "95% interval over seeds"], rows) if rows else None


def _line(axes: Axes, x: np.ndarray, values: OverSeeds, style: tuple, label: str) -> None:
    color, dashes = style
    axes.plot(x, values.mean, ls=dashes, color=color, lw=1.7, label=label)
    axes.fill_between(
        x, values.mean - values.half, values.mean + values.half, color=color, alpha=0.15, lw=0
    )


def _num_drawn(means: Means, num_images: int) -> int:
    """Return the number of ranks from 0 that at least half of the images reach."""
    return int((means.counts >= max(num_images / 2, 1)).cumprod().sum())


def _of_all_cells(means: Means, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return counts and sums of all cells."""
    counts, sums = np.zeros(size, dtype=np.int64), np.zeros(size)
    counts[: len(means.counts)], sums[: len(means.sums)] = means.counts, means.sums
    return counts, sums
