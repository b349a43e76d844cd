"""The samples of one image under several strategies, drawn side by side."""

from dataclasses import dataclass

import numpy as np
from box_drawing import draw_boxes, draw_regions, show_image
from loading import OVERLAP
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLORS_OF_OBJECTS, MORE_COLORS = colormaps["tab10"], colormaps["tab20"]


@dataclass
class Samples:
    """A strategy's choice in an image: boxes (P, 4) and (N, 4) in pixels, and a number each."""

    positives: np.ndarray
    objects: np.ndarray
    positive_ious: np.ndarray
    negatives: np.ndarray
    negative_ious: np.ndarray
    regions: np.ndarray  # (M, 4), to ignore
    num_ignored: int  # proposals inside them that may not be chosen

    @property
    def share_overlapping(self) -> float:
        """The share of negatives with an IoU above ``OVERLAP``."""
        return float(np.mean(self.negative_ious > OVERLAP)) if len(self.negatives) else 0.0


def draw_samples(image: np.ndarray, samples: dict[str, Samples], highest: float) -> Figure:
    """
    Args:
        image: uint8 (H, W, 3), RGB.
        samples: of each strategy.
        highest: the IoU up to which proposals are negative.
    """
    size = 3.6 * image.shape[0] / image.shape[1]
    figure = Figure(figsize=(3.8 * len(samples), 2 * size + 2.6), dpi=90, layout="constrained")
    grid = figure.subplots(3, len(samples), squeeze=False, height_ratios=[size, size, 1.8])
    scale = ScalarMappable(Normalize(0, highest), "viridis")
    bins = np.linspace(0, 1, 21)
    for column, (name, chosen) in zip(grid.T, samples.items(), strict=True):
        positives = [COLORS_OF_OBJECTS(i % 10) for i in chosen.objects]
        show_image(column[0], image)
        draw_regions(column[0], chosen.regions)
        draw_boxes(column[0], chosen.positives, positives)
        column[0].set_title(f"{name}\n{len(chosen.positives)} positives, coloured by object")
        order = np.argsort(chosen.negative_ious)
        show_image(column[1], image)
        draw_regions(column[1], chosen.regions)
        draw_boxes(column[1], chosen.negatives[order], scale.to_rgba(chosen.negative_ious[order]))
        share = chosen.share_overlapping
        title = f"{len(chosen.negatives)} negatives, {share:.0%} of IoU above {OVERLAP}"
        if len(chosen.regions):
            title += f"\nregions to ignore: {len(chosen.regions)}, {chosen.num_ignored} proposals"
        column[1].set_title(title)
        column[2].hist(
            [chosen.negative_ious, chosen.positive_ious],
            bins,
            stacked=True,
            color=["tab:gray", "tab:orange"],
            label=["negatives", "positives"],
        )
        column[2].set_xlabel("IoU of the proposal with its object")
        column[2].sharey(grid[2, 0])
    grid[2, 0].set_ylabel("proposals")
    grid[2, 0].legend()
    figure.colorbar(scale, ax=grid[1], label="IoU of negatives", shrink=0.9)
    return figure


def draw_uneven(image: np.ndarray, samples: dict[str, Samples], num_objects: int) -> Figure:
    """
    Draw the positives of strategies, and their number for each object.

    Args:
        image: uint8 (H, W, 3), RGB.
        samples: of each strategy.
    """
    size = 4.4 * image.shape[0] / image.shape[1]
    figure = Figure(figsize=(4.6 * len(samples), size + 2.4), dpi=90, layout="constrained")
    grid = figure.subplots(2, len(samples), squeeze=False, height_ratios=[size, 1.8])
    for column, (name, chosen) in zip(grid.T, samples.items(), strict=True):
        counts = np.bincount(chosen.objects, minlength=num_objects)
        show_image(column[0], image)
        draw_regions(column[0], chosen.regions)
        draw_boxes(column[0], chosen.positives, [MORE_COLORS(i % 20) for i in chosen.objects])
        missed = int((counts == 0).sum())
        column[0].set_title(
            f"{name} positives: {len(chosen.positives)}\n"
            f"objects without any: {missed} of {num_objects}"
        )
        numbers = np.arange(num_objects)
        column[1].bar(numbers + 1, counts, color=[MORE_COLORS(i % 20) for i in numbers])
        column[1].xaxis.set_major_locator(MaxNLocator(integer=True))
        column[1].set_xlabel("object (colours as in the image)")
        column[1].sharey(grid[1, 0])
    grid[1, 0].set_ylabel("positives")
    return figure
