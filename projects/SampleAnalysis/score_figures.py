"""Figures of scores: what raising them buys, and what ISR and CARL did to them."""

import numpy as np
from findings import IOU_EDGES, ScoreStatistics
from html_report import Plot, Table
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from running_sums import Means
from sample_figures import BLUE, DPI, GREEN, ORANGE, PURPLE
from what_if import Outcome

STYLES = ((BLUE, "-"), (ORANGE, "--"))  # of the two checkpoints
STYLES_OF_CHOICES = {
    "top 5 by IoU-HLR": (ORANGE, "-", "o"),
    "top 25 by IoU-HLR": (BLUE, "--", "s"),
    "hardest 5": (GREEN, "-.", "^"),
    "all": (PURPLE, ":", "D"),
}
FEWEST = 50  # samples that a mean is drawn of
NUM_POINTS = 25  # at least, of a curve over ranks


def plot_what_if(outcomes: list[Outcome]) -> Plot:
    """
    Args:
        outcomes: the detector as it is, then each choice of positives with each budget.
    """
    figure = Figure(figsize=(14, 4.4), dpi=DPI, layout="constrained")
    by_budget, by_iou, curve = figure.subplots(1, 3)
    plain, spent = outcomes[0], outcomes[1:]
    thresholds = plain.thresholds
    budgets = sorted({outcome.budget for outcome in spent})
    middle = budgets[len(budgets) // 2]
    ap = {id(o): 100 * o.precision.mean(axis=1) for o in outcomes}
    recalls = plain.recalls
    at_75 = int(np.argmin(np.abs(thresholds - 0.75)))
    curve.plot(
        *(recalls, plain.precision[at_75]),
        color="black",
        lw=1,
        label="as it is",
    )
    for name, (color, dashes, marker) in STYLES_OF_CHOICES.items():
        of_choice = [outcome for outcome in spent if outcome.choice == name]
        # "all" may lie on "top 25": its markers are rings around those.
        ring = {"mfc": "none", "ms": 10} if name == "all" else {}
        style = {"color": color, "ls": dashes, "label": name}
        x = [0.0] + [outcome.budget for outcome in of_choice]
        y = [ap[id(plain)].mean()] + [ap[id(outcome)].mean() for outcome in of_choice]
        by_budget.plot(x, y, marker=marker, **style, **ring)
        for outcome in of_choice:
            if outcome.budget == middle:
                gain = ap[id(outcome)] - ap[id(plain)]
                by_iou.plot(thresholds, gain, marker=marker, **style, **ring)
                curve.plot(recalls, outcome.precision[at_75], **style)
    by_budget.set(xlabel="total loss taken away", ylabel="AP (0.5 to 0.95), in %")
    by_budget.legend(title="scores raised of")
    by_iou.axhline(0, color="gray", lw=0.8)
    by_iou.set(xlabel="IoU threshold", ylabel="AP gained, in points")
    by_iou.set_title(f"at a loss reduction of {middle:.1f}")
    curve.set(xlabel="recall", ylabel="precision, mean of classes", xlim=(0, 1), ylim=(0, 1.02))
    curve.set_title(f"IoU 0.75, at a loss reduction of {middle:.1f}")
    curve.legend(loc="lower left")
    rows = [
        [o.choice, float(o.budget), float(o.delta), o.num_raised, float(ap[id(o)].mean())]
        + [float(value) for value in ap[id(o)]]
        for o in outcomes
    ]
    shown = [
        [row[0], f"{row[1]:.1f}", f"{row[2]:.3f}", f"{row[3]:,}", f"{row[4]:.2f}"] for row in rows
    ]
    header = ["scores raised of", "loss taken away", "logits raised by", "positives", "AP"]
    return Plot(
        "4_what_if",
        "4. What a better classifier would buy",
        "Look at whether the same loss, spent on the top 5 of each object, buys more AP than spent "
        "on the top 25, on the hardest or on all.",
        "The boxes are those of the detector, and nothing is trained. Test-time proposals that "
        "training would call positive get the logit of their class raised by one amount for all "
        "chosen ones, found by bisection so that their classification losses fall by the same "
        "total; scores, NMS and COCO AP follow. Top n: the n best regressed of each object. The "
        "budgets are 20, 50 and 80% of the total loss of that choice which has the least. "
        + _share_of_top_25(spent),
        figure,
        Table([*header, *(f"AP at {t:.2f}" for t in thresholds)], rows),
        Table(header, shown),
    )


def _share_of_top_25(outcomes: list[Outcome]) -> str:
    raised = {outcome.choice: outcome.num_raised for outcome in outcomes}
    share = raised["top 25 by IoU-HLR"] / max(raised["all"], 1)
    return f"The top 25 are {share:.0%} of all positives here."


def plot_ranks(scores: dict[str, ScoreStatistics]) -> Plot:
    """
    Args:
        scores: of one or two checkpoints, by name.
    """
    figure, panels = _panels(len(scores))
    rows = []
    for kind, axes in zip(("positives", "negatives"), panels, strict=True):
        found = {name: getattr(s, kind) for name, s in scores.items()}
        # A mean over few images would say more about these than about the rank.
        size = min(_num_drawn(f, scores[name].num_images) for name, f in found.items())
        width = max(size // NUM_POINTS, 1)
        starts = np.arange(0, size - width + 1, width)
        drawn = []
        for (name, means), style in zip(found.items(), STYLES, strict=False):
            sums, counts = (
                np.add.reduceat(x[: len(starts) * width], starts) if size else x[:0]
                for x in (means.sums, means.counts)
            )
            drawn.append(sums / counts)
            axes[0].plot(starts + (width - 1) / 2, drawn[-1], style[1], color=style[0], label=name)
            rows += [
                [kind, name, int(r), int(means.counts[r]), float(means.means[r])]
                for r in np.flatnonzero(means.counts)
            ]
        _difference(axes[1:], starts + (width - 1) / 2, drawn, scores)
        rank = "IoU-HLR in the image" if kind == "positives" else "Score-HLR in the image"
        score = "score of the object's class" if kind == "positives" else "highest score"
        axes[0].set(title=kind, ylabel=f"{score}, mean", ylim=(0, None))
        axes[0].legend()
        axes[-1].set_xlabel(rank)
    counts = ", ".join(
        f"{name}: {s.positives.counts.sum():,} positives and {s.negatives.counts.sum():,} ranked "
        "negatives"
        for name, s in scores.items()
    )
    return Plot(
        "5_isr_scores",
        "5. Scores by rank" if len(scores) == 1 else "5. What ISR did to scores",
        "Look at whether scores rise at the front of the positives and fall behind it, and fall "
        "most at the front of the negatives.",
        f"Test-time proposals of each detector, ranked by its own boxes and scores in each image "
        f"and, positives, class. {counts}. Drawn are ranks that half of the images reach, some at "
        "a time; the CSV file has each. Scores of negatives rise again where the second of each "
        "cluster follow the first.",
        figure,
        Table(["kind", "checkpoint", "rank", "samples", "mean score"], rows),
    )


def plot_score_by_iou(scores: dict[str, ScoreStatistics]) -> Plot:
    """
    Args:
        scores: of one or two checkpoints, by name.
    """
    size = len(IOU_EDGES) - 1
    centres = (IOU_EDGES[:-1] + IOU_EDGES[1:]) / 2
    heights = [3, 2, 1.4][: 1 + len(scores)] if len(scores) > 1 else [3, 1.4]
    figure = Figure(figsize=(7, 2.4 * len(heights)), dpi=DPI, layout="constrained")
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    rows, means = [], []
    width = IOU_EDGES[1] / (len(scores) + 0.5)
    for i, ((name, found), style) in enumerate(zip(scores.items(), STYLES, strict=False)):
        counts = np.zeros(size, dtype=np.int64)
        counts[: len(found.by_iou.counts)] = found.by_iou.counts
        values = np.full(size, np.nan)
        values[: len(found.by_iou.counts)] = found.by_iou.means
        means.append(np.where(counts >= FEWEST, values, np.nan))
        label = f"{name} (correlation {found.correlation.value:.2f})"
        axes[0].plot(centres, means[-1], style[1], color=style[0], marker="o", ms=3, label=label)
        at = centres + (i - (len(scores) - 1) / 2) * width
        axes[-1].bar(at, counts, width, color=style[0])
        rows += [
            [name, float(x), int(n), float(value), found.correlation.value]
            for x, n, value in zip(centres, counts, values, strict=True)
        ]
    _difference(axes[1:-1], centres, means, scores)
    axes[0].set(ylabel="score of the object's class, mean", ylim=(0, None))
    axes[0].legend(loc="upper left")
    axes[-1].set(xlabel="IoU of the regressed box with its object", ylabel="positives")
    axes[-1].set_xlim(0.3, 1)
    return Plot(
        "6_carl_scores",
        "6. Scores by IoU" if len(scores) == 1 else "6. What CARL did",
        "Look at whether scores rise at high IoU and fall at low IoU, so that the classifier says "
        "how well a box fits.",
        "Positives among the test-time proposals of each detector; means over fewer than "
        f"{FEWEST} are not drawn. The correlation is that of score and IoU over all positives.",
        figure,
        Table(
            ["checkpoint", "IoU (centre of bin)", "positives", "mean score", "correlation"], rows
        ),
    )


def _num_drawn(means: Means, num_images: int) -> int:
    """Ranks from 0 up to the last that half of the images reach."""
    return int((means.counts >= max(num_images / 2, 1)).cumprod().sum())


def _panels(num_checkpoints: int) -> tuple[Figure, list[np.ndarray]]:
    """Two columns, of two rows where there is a difference to draw."""
    rows = num_checkpoints
    figure = Figure(figsize=(11, 2 + 2 * rows), dpi=DPI, layout="constrained")
    grid = figure.subplots(
        rows, 2, sharex="col", squeeze=False, height_ratios=[3, 2][:rows] if rows > 1 else [1]
    )
    return figure, list(grid.T)


def _difference(
    panels: np.ndarray, x: np.ndarray, means: list[np.ndarray], names: dict[str, ScoreStatistics]
) -> None:
    """The second checkpoint's means less the first's, where there are two."""
    for axes in panels:
        _fill(axes, x, means[1] - means[0])
        first, second = names
        axes.set_ylabel(f"{second} - {first}")


def _fill(axes: Axes, x: np.ndarray, change: np.ndarray) -> None:
    axes.axhline(0, color="gray", lw=0.8)
    axes.plot(x, change, color="black", lw=1.2)
    axes.fill_between(x, change, 0, where=change > 0, color=ORANGE, alpha=0.4, interpolate=True)
    axes.fill_between(x, change, 0, where=change < 0, color=BLUE, alpha=0.4, interpolate=True)
