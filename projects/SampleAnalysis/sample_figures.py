"""Figures of what a detector would be trained on: negatives, positives and their ranks."""

import numpy as np
from box_drawing import draw_boxes, show_image
from findings import FINE_IOU_EDGES, IOU_EDGES, LOSS_EDGES, Ranks, SampleStatistics
from html_report import Plot, Table
from loading import OVERLAP
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

DPI = 100
# Of Okabe and Ito, which colour-blind eyes tell apart.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, AMBER = "#56B4E9", "#E69F00"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, "black")
COLORS = {"random": BLUE, "hard": ORANGE, "prime": GREEN}
DASHES = {"random": "-", "hard": "--", "prime": "-."}
MOST_OBJECTS = len(PALETTE)  # told apart by colour


def plot_negative_ious(samples: dict[str, SampleStatistics], highest: float) -> Plot:
    """
    Args:
        samples: of each strategy.
        highest: the IoU up to which proposals are negative.
    """
    figure = Figure(figsize=(10, 4), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    centres = (FINE_IOU_EDGES[:-1] + FINE_IOU_EDGES[1:]) / 2
    for name, chosen in samples.items():
        below = np.concatenate([[0], chosen.negative_ious.cumsum()]) / max(chosen.num_negatives, 1)
        left.plot(
            FINE_IOU_EDGES, 100 - 100 * below, DASHES[name], color=COLORS[name], label=name, lw=2
        )
    left.axvline(OVERLAP, color="gray", lw=1, ls=":")
    left.text(OVERLAP + 0.004, 99, f"IoU {OVERLAP}", color="gray", va="top")
    left.set(xlim=(0, highest), ylim=(0, 100))
    left.set_xlabel("IoU of the proposal with its nearest object")
    left.set_ylabel("negatives of a higher IoU, in %")
    left.legend()
    shares = {
        name: 100 * chosen.num_overlapping / max(chosen.num_negatives, 1)
        for name, chosen in samples.items()
    }
    bars = right.bar(list(shares), list(shares.values()), color=[COLORS[n] for n in shares])
    right.bar_label(bars, [f"{share:.1f}%" for share in shares.values()])
    right.set_ylabel(f"negatives of IoU above {OVERLAP}, in %")
    right.set_ylim(0, 100)
    names = list(samples)
    rows = [
        [float(centre), *(int(samples[name].negative_ious[i]) for name in names)]
        for i, centre in enumerate(centres)
    ]
    counts = ", ".join(f"{samples[name].num_negatives:,} {name}" for name in names)
    return Plot(
        "1_negative_ious",
        "1. How far negatives overlap objects",
        "Look at whether hard negatives overlap objects more often than random ones.",
        f"Negatives: {counts}, chosen among the same proposals. Hard ones have the highest "
        "classification loss; prime ones the lowest Score-HLR. The authors report over 60% above "
        f"{OVERLAP} for hard negatives and under 30% for random ones. Where hard negatives overlap "
        "nothing, they are often objects without a label: look at some.",
        figure,
        Table(["IoU (centre of bin)", *names], rows),
        Table(
            ["", "negatives", f"IoU above {OVERLAP}"],
            [[name, f"{samples[name].num_negatives:,}", f"{shares[name]:.1f}%"] for name in names],
        ),
    )


def plot_densities(samples: dict[str, SampleStatistics], highest: float) -> Plot:
    """The arguments are those of :func:`plot_negative_ious`."""
    figure = Figure(figsize=(11, 6.6), dpi=DPI, layout="constrained")
    grid = figure.subplots(2, len(samples), sharey=True, sharex="row", squeeze=False)
    kinds = ("positives", "negatives")
    shares = {}
    for kind in kinds:
        for name, chosen in samples.items():
            counts = getattr(chosen, kind).counts
            shares[kind, name] = 100 * counts / max(counts.sum(), 1)
    for row, kind in zip(grid, kinds, strict=True):
        all_shares = np.concatenate([shares[kind, name].ravel() for name in samples])
        one, top = all_shares[all_shares > 0].min(initial=100), all_shares.max(initial=0) or 100
        for axes, (name, chosen) in zip(row, samples.items(), strict=True):
            share = shares[kind, name].T
            scale = LogNorm(min(one, top / 10), top)
            mesh = axes.pcolormesh(
                *(IOU_EDGES, LOSS_EDGES, np.ma.masked_equal(share, 0)),
                norm=scale,
                cmap="viridis",
                rasterized=True,
            )
            axes.set_yscale("log")
            axes.set_title(f"{name}: {getattr(chosen, kind).counts.sum():,} {kind}")
        axis = "regressed box" if kind == "positives" else "proposal"
        row[len(row) // 2].set_xlabel(f"IoU of the {axis} with its object")
        row[0].set_ylabel(f"{kind}: classification loss")
        figure.colorbar(mesh, ax=row, label="samples in a cell, in %")
    grid[0, 0].set_xlim(0.4, 1)
    grid[1, 0].set_xlim(0, highest)
    rows = [
        [kind, name, float(x), float(y), int(getattr(samples[name], kind).counts[i, j])]
        for kind in kinds
        for name in samples
        for i, x in enumerate(IOU_EDGES[:-1])
        for j, y in enumerate(LOSS_EDGES[:-1])
        if getattr(samples[name], kind).counts[i, j]
    ]
    return Plot(
        "2_where_samples_lie",
        "2. Where samples lie",
        "Look at prime positives, which should lie at the right (high IoU) whatever their loss, "
        "and at hard ones, which lie at the top whatever their IoU.",
        "Density of the samples of each strategy, all chosen among the same proposals with the "
        "objects themselves among them, as in training. Losses beyond the axis count at its ends. "
        "By the authors' account prime negatives spread between random ones (low loss, IoU near "
        "0) and hard ones (high loss).",
        figure,
        Table(["kind", "strategy", "IoU from", "loss from", "samples"], rows),
    )


def plot_two_steps(ranks: Ranks, image: np.ndarray, class_names: list[str]) -> Plot:
    """
    Args:
        ranks: of the positives of an image.
        image: uint8 (H, W, 3), RGB, in the size of the model's input.
        class_names: of all classes.
    """
    figure = Figure(figsize=(13, 4.6), dpi=DPI, layout="constrained")
    picture, first, second = figure.subplots(1, 3, width_ratios=[1.2, 1, 1])
    objects = np.unique(ranks.objects)
    colors = {int(o): to_rgb(PALETTE[i % len(PALETTE)]) for i, o in enumerate(objects)}
    show_image(picture, image, alpha=0.75)
    best = np.flatnonzero(ranks.local_ranks == 0)
    others = np.flatnonzero(ranks.local_ranks > 0)
    draw_boxes(picture, ranks.boxes[others], [(*colors[o], 0.3) for o in ranks.objects[others]])
    draw_boxes(picture, ranks.boxes[best], [colors[o] for o in ranks.objects[best]], [2.5] * 999)
    for i in best:
        # Labels stay inside the image.
        x0, y, x1, _ = ranks.boxes[i]
        at_right = x0 > 0.6 * image.shape[1]
        name = f"{label_of(ranks.objects[i])} {class_names[ranks.classes[i]]}"
        picture.text(
            *(min(x1, image.shape[1]) if at_right else max(x0, 0), max(y, 0)),
            f"{name}: IoU {ranks.ious[i]:.2f}, HLR {ranks.hlr[i]}",
            parse_math=False,
            ha="right" if at_right else "left",
            color=colors[ranks.objects[i]],
            fontsize=9,
            fontweight="bold",
            va="top" if y < 0.05 * image.shape[0] else "bottom",
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )
    picture.set_title(f"{len(ranks.objects)} positives; thick: the best of each object")

    class_ = np.bincount(ranks.classes).argmax()
    for o in objects:
        rows = np.flatnonzero(ranks.objects == o)
        rows = rows[np.argsort(ranks.local_ranks[rows])]
        color, label = colors[int(o)], f"object {label_of(o)}"
        first.plot(ranks.local_ranks[rows], ranks.ious[rows], "o-", color=color, label=label, ms=4)
    in_class = np.flatnonzero(ranks.classes == class_)
    in_class = in_class[np.argsort(ranks.hlr[in_class])]
    rounds = ranks.local_ranks[in_class]
    for i in range(1, rounds.max() + 1, 2):
        ends = np.searchsorted(rounds, [i, i + 1]) - 0.5
        second.axvspan(*ends, color="0.92", zorder=-1)
    second.plot(ranks.hlr[in_class], ranks.ious[in_class], color="0.7", lw=1, zorder=0)
    second.scatter(
        *(ranks.hlr[in_class], ranks.ious[in_class]),
        c=[colors[o] for o in ranks.objects[in_class]],
        s=25,
    )
    first.set_title("step 1: rank among those of the same object")
    first.set(xlabel="local rank", ylabel="IoU of the regressed box with its object")
    if len(objects) <= MOST_OBJECTS:
        first.legend()
    title = f"step 2: all firsts, all seconds, ... ({class_names[class_]})"
    second.set_title(title, parse_math=False)
    second.set_xlabel("IoU-HLR")
    second.sharey(first)
    for axes in (first, second):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    order = np.lexsort((ranks.hlr, ranks.classes))
    table = [
        [
            class_names[ranks.classes[i]],
            label_of(ranks.objects[i]),
            float(ranks.ious[i]),
            int(ranks.local_ranks[i]),
            int(ranks.hlr[i]),
        ]
        for i in order
    ]
    header = ["class", "object", "IoU", "local rank", "IoU-HLR"]
    shown = [[*row[:2], f"{row[2]:.3f}", *row[3:]] for row in table[:20]]
    return Plot(
        "3_two_steps",
        "3. Two steps to a rank",
        "Look at the stripes on the right: each is one round through the objects, so no object "
        "waits until another one's boxes are used up.",
        f"Positives of one image, after regression. The table has the first {len(shown)} of "
        f"{len(table)}; classes are ranked apart.",
        figure,
        Table(header, table),
        Table(header, shown),
    )


def label_of(index: int) -> str:
    """A to Z, then A1 and so on."""
    letter = chr(ord("A") + int(index) % 26)
    return letter if index < 26 else f"{letter}{int(index) // 26}"
