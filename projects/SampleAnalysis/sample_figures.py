"""Figures of the samples that a detector would be trained on."""

import numpy as np
from findings import FINE_IOU_EDGES, IOU_EDGES, LOSS_EDGES, SampledImage, SampleStatistics
from html_report import Plot, Table
from loading import OVERLAP
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter
from palette import COLORS, DPI
from resampling import share_interval
from sampling_picture import draw_samples, draw_uneven

FINE_PER_BAR = 5  # cells of FINE_IOU_EDGES: bars of 0.05
DRAWN = ("random", "hard", "prime")
LOWEST_IOU = 0.4  # of the positives that are drawn


def plot_negative_ious(samples: dict[str, SampleStatistics], highest: float, seed: int) -> Plot:
    """
    Args:
        samples: of each strategy.
        highest: the IoU up to which proposals are negative.
        seed: of the bootstrap.
    """
    figure = Figure(figsize=(9.5, 3.6), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    rows, shown = [], []
    facts: dict[str, float | int | str] = {}
    shares = {
        name: share_interval(of_images[:, 1], of_images[:, 0], seed)
        for name, chosen in samples.items()
        if len(of_images := np.array(chosen.per_image).reshape(-1, 4))
    }
    for name, (share, low, high) in shares.items():
        number = samples[name].num_negatives
        facts[f"{name}: negatives"] = number
        facts |= {
            f"{name}: % above {OVERLAP}{end}": value for end, value in _ends(share, low, high)
        }
        shown.append([name, f"{number:,}", f"{share:.1f}% ({low:.1f} to {high:.1f})"])
    fine = len(FINE_IOU_EDGES) - 1
    for name, chosen in samples.items():
        rows += [
            [name, float(FINE_IOU_EDGES[i]), int(chosen.negative_ious[i])] for i in range(fine)
        ]
    for axes, name in zip(panels, DRAWN[:2], strict=True):
        fine_counts = samples[name].negative_ious
        counts = fine_counts.reshape(-1, FINE_PER_BAR).sum(axis=1)
        percent = 100 * counts / max(counts.sum(), 1)
        starts = FINE_IOU_EDGES[:-1:FINE_PER_BAR]
        drawn = starts < highest - 1e-9
        colors = ["0.7" if start < OVERLAP - 1e-9 else COLORS[name] for start in starts[drawn]]
        style = {"align": "edge", "color": colors, "ec": "white"}
        bars = axes.bar(starts[drawn], percent[drawn], starts[1], **style)
        axes.bar_label(bars, [f"{p:.0f}" for p in percent[drawn]], fontsize=8)
        axes.axvline(OVERLAP, color="black", lw=1, ls=":")
        share, low, high = shares.get(name, (float("nan"),) * 3)
        axes.text(
            *(0.97, 0.95),
            f"{share:.1f}% ({low:.1f} to {high:.1f})\nof IoU above {OVERLAP}",
            transform=axes.transAxes,
            ha="right",
            va="top",
            color=COLORS[name],
            fontweight="bold",
        )
        axes.set(title=f"{name} negatives: {counts.sum():,}", xlim=(0, highest))
        axes.set_xlabel("IoU of the proposal with its nearest object")
    panels[0].set(ylabel="negatives, in %", ylim=(0, 100))
    return Plot(
        "negative_ious",
        "How far negatives overlap objects",
        "Look at whether hard negatives overlap objects (coloured bars) more often than random "
        "ones.",
        "Both strategies choose among the same proposals, as many as in training. Hard negatives "
        "have the highest classification loss. In parentheses: 95% bootstrap intervals over "
        "images. The authors report over 60% for hard negatives and under 30% for random ones, on "
        "COCO. Hard negatives that overlap nothing are often objects without a label: look at "
        "some.",
        figure,
        Table(["strategy", "IoU from", "negatives"], rows),
        facts,
        Table(["", "negatives", f"IoU above {OVERLAP}"], shown),
    )


def _ends(value: float, low: float, high: float) -> list[tuple[str, float]]:
    return [("", value), (", low", low), (", high", high)]


def plot_densities(samples: dict[str, SampleStatistics], highest: float) -> Plot:
    """
    Args:
        samples: of the drawn strategies.
        highest: the IoU up to which proposals are negative.
    """
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
        bar = figure.colorbar(
            mesh, ax=row, label="samples in a cell, in %", ticks=LogLocator(subs=(1, 2, 5))
        )
        bar.ax.yaxis.set_major_formatter(FormatStrFormatter("%.2g"))
        bar.ax.yaxis.set_minor_formatter(NullFormatter())
    grid[0, 0].set_xlim(LOWEST_IOU, 1)
    grid[1, 0].set_xlim(0, highest)
    rows = [
        [kind, name, float(x), float(y), int(getattr(samples[name], kind).counts[i, j])]
        for kind in kinds
        for name in samples
        for i, x in enumerate(IOU_EDGES[:-1])
        for j, y in enumerate(LOSS_EDGES[:-1])
        if getattr(samples[name], kind).counts[i, j]
    ]
    first = int(np.searchsorted(IOU_EDGES, LOWEST_IOU - 1e-9))
    facts: dict[str, float | int | str] = {"lowest IoU drawn": LOWEST_IOU}
    for name in samples:
        for kind in kinds:
            density = getattr(samples[name], kind)
            facts[f"{name}: {kind}"] = int(density.counts.sum())
            facts[f"{name}: mean IoU of {kind}"] = density.x_mean
            facts[f"{name}: mean loss of {kind}"] = density.y_mean
        facts[f"{name}: positives below the axis"] = int(
            samples[name].positives.counts[:first].sum()
        )
    below = ", ".join(f"{facts[f'{n}: positives below the axis']} {n}" for n in samples)
    table = [
        [name, kind, f"{facts[f'{name}: mean IoU of {kind}']:.2f}"]
        + [f"{facts[f'{name}: mean loss of {kind}']:.2f}"]
        for name in samples
        for kind in kinds
    ]
    return Plot(
        "where_samples_lie",
        "Where samples lie",
        "Look at prime positives, which should lie at the right (high IoU) whatever their loss, "
        "and at hard positives, which lie at the top whatever their IoU.",
        "Density of the samples of each strategy. All are chosen among the same proposals, which "
        "include the objects' own boxes, as in training. Of positives the IoU is that of the "
        f"regressed box; left of the axis, below {LOWEST_IOU}, are these positives: {below}. "
        "Losses beyond the axis are drawn at its ends. The authors "
        "find prime negatives spread between random ones "
        "(low loss, IoU near 0) and hard ones (high loss).",
        figure,
        Table(["kind", "strategy", "IoU from", "loss from", "samples"], rows),
        facts,
        Table(["strategy", "samples", "mean IoU", "mean loss"], table),
    )


def plot_samples(sampled: SampledImage, image: np.ndarray, highest: float) -> Plot:
    """
    Args:
        image: uint8 (H, W, 3), RGB, in the size of the model's input.
        highest: the IoU up to which proposals are negative.
    """
    facts: dict[str, float | int | str] = {"image": str(sampled.inputs["image_id"])}
    facts["objects"] = sampled.num_objects
    rows = []
    for name, chosen in sampled.samples.items():
        facts[f"{name}: positives"] = len(chosen.positives)
        facts[f"{name}: negatives"] = len(chosen.negatives)
        facts[f"{name}: % of negatives above {OVERLAP}"] = 100 * chosen.share_overlapping
        for kind in ("positive", "negative"):
            boxes, ious = getattr(chosen, f"{kind}s"), getattr(chosen, f"{kind}_ious")
            rows += [
                [name, kind, *(float(x) for x in box), float(iou)]
                for box, iou in zip(boxes, ious, strict=True)
            ]
    return Plot(
        "samples",
        "What a sampler takes",
        "Look at where the negatives (second row) lie: on background, around the objects, or on "
        "objects that have no label.",
        f"Samples of one image, {facts['image']}, with {sampled.num_objects} labelled objects, by "
        "strategy, chosen among the same proposals. First row: positives in the colour of their "
        "object. Second row: negatives, brighter the more they overlap an object. Third row: "
        "histogram of IoU. IoU-balanced stands for instance-balanced positives with IoU-balanced "
        "negatives. The image is the one whose smallest object is the largest, among images with 2 "
        "to 5 objects; without any such image, the one with the fewest objects.",
        draw_samples(image, sampled.samples, highest),
        Table(["strategy", "kind", "x0", "y0", "x1", "y1", "IoU"], rows),
        facts,
    )


def plot_uneven(
    uneven: SampledImage, image: np.ndarray, samples: dict[str, SampleStatistics], seed: int
) -> Plot:
    """
    Args:
        image: uint8 (H, W, 3), RGB, in the size of the model's input.
        samples: of the strategies, over all images.
        seed: of the bootstrap.
    """
    facts: dict[str, float | int | str] = {"image": str(uneven.inputs["image_id"])}
    facts["objects in the image"] = uneven.num_objects
    names = {"IoU-balanced": "instance-balanced"}
    chosen = {names.get(name, name): s for name, s in uneven.samples.items()}
    rows = []
    shares = []
    for name, of_strategy in zip(chosen, uneven.samples, strict=True):
        counts = np.bincount(chosen[name].objects, minlength=uneven.num_objects)
        facts[f"{name}: positives"] = int(counts.sum())
        facts[f"{name}: objects without any"] = int((counts == 0).sum())
        rows += [[name, i + 1, int(count)] for i, count in enumerate(counts)]
        of_images = np.array(samples[of_strategy].per_image)
        share, low, high = share_interval(of_images[:, 2] - of_images[:, 3], of_images[:, 2], seed)
        facts |= {
            f"{name}: % of all objects without any{end}": value
            for end, value in _ends(share, low, high)
        }
        shares.append(f"{share:.1f}% ({low:.1f} to {high:.1f}) with {name} ones")
    return Plot(
        "positives_per_object",
        "Positives per object",
        "Look at the objects that random positives leave out: they teach nothing in this step.",
        f"Positives of one image, {facts['image']}, under two strategies. It is the image where "
        "random positives miss the most objects that instance-balanced positives reach. Over all "
        f"images, these shares of the objects have no positive: {'; '.join(shares)} (95% bootstrap "
        "intervals over images).",
        draw_uneven(image, chosen, uneven.num_objects),
        Table(["strategy", "object", "positives"], rows),
        facts,
    )
