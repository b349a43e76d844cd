"""Figures of ranks in one image: the two steps, and a prime next to a hard sample."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from box_drawing import draw_boxes, label_box, show_image
from findings import RankedBoxes, Scene
from html_report import Plot, Table
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from palette import DPI, GREEN, ORANGE, PALETTE

MOST_GROUPS = len(PALETTE)  # that colours distinguish


@dataclass
class Words:
    """The words of a figure of two steps; ``label`` names the group of an index."""

    value: str
    rank: str
    group: str
    label: Callable[[int], str]
    boxes: str


def label_of(index: int) -> str:
    """Return A to Z, then A1 and so on."""
    letter = chr(ord("A") + int(index) % 26)
    return letter if index < 26 else f"{letter}{int(index) // 26}"


def plot_iou_ranks(scene: Scene, image: np.ndarray, class_names: list[str]) -> Plot:
    """
    Args:
        image: uint8 (H, W, 3), RGB, in the size of the model's input.
        class_names: of all classes.
    """
    found = scene.positives
    words = Words("IoU of the regressed box with its object", "IoU-HLR", "object", label_of, "")
    words.boxes = f"{len(found)} positives; thick: the best of each object"

    def name(i: int) -> str:
        return f"{label_of(found.groups[i])} {class_names[found.partitions[i]]}"

    in_class = int(np.bincount(found.partitions).argmax())
    title = f"step 2: all firsts, all seconds, ... ({class_names[in_class]})"
    figure = _two_steps(found, found.ious, image, words, in_class, title, name)
    order = np.lexsort((found.ranks, found.partitions))
    table = [
        [class_names[found.partitions[i]], label_of(found.groups[i]), float(found.ious[i])]
        + [int(found.local_ranks[i]), int(found.ranks[i])]
        for i in order
    ]
    header = ["class", "object", "IoU", "local rank", "IoU-HLR"]
    facts = _facts(scene, found)
    return Plot(
        "iou_hlr",
        "Two steps to a rank: IoU-HLR of positives",
        "Look at the stripes on the right: each is one round through the objects, so no object "
        "waits until another one's boxes are used up.",
        f"All {len(found)} positives of one image, {facts['image']}, by the IoU of their regressed "
        f"boxes: {facts['groups']} objects. Step 1 ranks the boxes of each object. Step 2 goes "
        "through all firsts by IoU, then all seconds, and so on; classes are ranked separately. "
        "These are test-time proposals: unlike in training, the objects' own boxes are not "
        "among them. No box is left out.",
        figure,
        Table(header, table),
        facts,
        _short(header, table),
    )


def plot_score_ranks(scene: Scene, image: np.ndarray, ranked_above: float, nms: float) -> Plot:
    """
    Args:
        image: uint8 (H, W, 3), RGB, in the size of the model's input.
        ranked_above: the score above which negatives are ranked.
        nms: IoU of the NMS that groups them.
    """
    found = scene.negatives
    words = Words("highest foreground score", "Score-HLR", "group", str, "")
    # Groups by their highest score: 1, 2, ...
    firsts = np.flatnonzero(found.local_ranks == 0)
    firsts = firsts[np.argsort(-found.scores[firsts], kind="stable")]
    numbers = np.zeros(int(found.groups.max()) + 1, dtype=np.int64)
    numbers[found.groups[firsts]] = np.arange(len(firsts)) + 1
    found = RankedBoxes(**{**vars(found), "groups": numbers[found.groups]})
    drawn = min(len(firsts), MOST_GROUPS)
    words.boxes = f"{len(found)} negatives in {len(firsts)} groups; thick: the first of each"
    title = "step 2: all firsts, all seconds, ..."
    figure = _two_steps(found, found.scores, image, words, 0, title, lambda i: str(found.groups[i]))
    order = np.argsort(found.ranks)
    table = [
        [int(found.groups[i]), float(found.scores[i]), float(found.ious[i])]
        + [int(found.local_ranks[i]), int(found.ranks[i])]
        for i in order
    ]
    header = ["group", "score", "IoU", "local rank", "Score-HLR"]
    facts = _facts(scene, found)
    facts |= {"coloured groups": drawn, "score above": ranked_above, "NMS": nms}
    return Plot(
        "score_hlr",
        "Two steps to a rank: Score-HLR of negatives",
        "Look at the groups on the image: each is one neighbourhood, and its highest-scored box is "
        "the false positive that NMS would leave.",
        f"The {len(found)} negatives of one image, {facts['image']}, with a score above "
        f"{ranked_above}, as regressed for their highest-scored class. NMS at IoU {nms} makes "
        f"{facts['groups']} groups; the {drawn} with the highest scores are coloured and numbered, "
        "the others grey. Step 1 ranks the boxes of each group by score, step 2 goes through all "
        "firsts, then all seconds, and so on. Negatives with lower scores have no rank.",
        figure,
        Table(header, table),
        facts,
        _short(header, table),
    )


def _facts(scene: Scene, found: RankedBoxes) -> dict[str, float | int | str]:
    groups = len(np.unique(found.groups))
    return {"image": str(scene.inputs["image_id"]), "boxes": len(found), "groups": groups}


def _short(header: list[str], table: list[list]) -> Table:
    shown = [[f"{v:.3f}" if isinstance(v, float) else v for v in row] for row in table[:12]]
    return Table(header, shown)


def _two_steps(
    found: RankedBoxes,
    values: np.ndarray,
    image: np.ndarray,
    words: Words,
    partition: int,
    second_title: str,
    name: Callable[[int], str],
) -> Figure:
    """
    Args:
        values: (N,), what is ranked by.
        partition: the one that the second step is drawn of.
        name: of the box of an index.
    """
    height = 0.4 + 4.9 * image.shape[0] / image.shape[1]
    figure = Figure(figsize=(13, max(height, 4.3)), dpi=DPI, layout="constrained")
    picture, first, second = figure.subplots(1, 3, width_ratios=[1.25, 1, 1])
    groups = np.unique(found.groups)
    colors = {int(g): to_rgb("0.6") for g in groups}
    colors |= {int(g): to_rgb(PALETTE[i]) for i, g in enumerate(groups[:MOST_GROUPS])}
    coloured = np.isin(found.groups, groups[:MOST_GROUPS])
    show_image(picture, image, alpha=0.75)
    best = np.flatnonzero(found.local_ranks == 0)
    others = np.flatnonzero(found.local_ranks > 0)
    draw_boxes(picture, found.boxes[others], [(*colors[g], 0.35) for g in found.groups[others]])
    draw_boxes(picture, found.boxes[best], [colors[g] for g in found.groups[best]], [2.2] * 9999)
    value = words.value.split()[0] if words.rank == "IoU-HLR" else "score"
    for i in best[coloured[best]][::-1]:
        text = f"{name(i)}: {value} {values[i]:.2f}, rank {found.ranks[i]}"
        label_box(picture, found.boxes[i], image.shape, text, colors[found.groups[i]])
    picture.set_title(words.boxes, fontsize=11)

    for g in groups[:MOST_GROUPS]:
        rows = np.flatnonzero(found.groups == g)
        rows = rows[np.argsort(found.local_ranks[rows])]
        label = f"{words.group} {words.label(g)}"
        first.plot(
            found.local_ranks[rows], values[rows], "o-", color=colors[int(g)], label=label, ms=4
        )
    rows = np.flatnonzero(found.partitions == partition)
    rows = rows[np.argsort(found.ranks[rows])]
    rounds = found.local_ranks[rows]
    for i in range(1, int(rounds.max()) + 1, 2):
        ends = np.searchsorted(rounds, [i, i + 1]) - 0.5
        second.axvspan(*ends, color="0.92", zorder=-1)
    second.plot(found.ranks[rows], values[rows], color="0.7", lw=1, zorder=0)
    second.scatter(
        *(found.ranks[rows], values[rows]), c=[colors[g] for g in found.groups[rows]], s=20
    )
    first.set_title(f"step 1: rank in each {words.group}", fontsize=11)
    first.set(xlabel="local rank", ylabel=words.value)
    first.legend(fontsize=8)
    second.set_title(second_title, parse_math=False, fontsize=11)
    second.set_xlabel(words.rank)
    second.sharey(first)
    for axes in (first, second):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def plot_prime_and_hard(scene: Scene, image: np.ndarray) -> Plot:
    """
    Draw the prime positive of the object with the hardest positive next to that one, and the prime
    negative next to the hardest negative.

    Args:
        image: uint8 (H, W, 3), RGB, in the size of the model's input.
    """
    positives, negatives = scene.positives, scene.negatives
    hard = int(positives.losses.argmax())
    prime = int(
        np.flatnonzero((positives.groups == positives.groups[hard]) & (positives.local_ranks == 0))[
            0
        ]
    )
    picked = [("prime positive", positives, prime), ("hard positive", positives, hard)]
    if len(negatives):
        picked.append(("prime negative", negatives, int(negatives.ranks.argmin())))
    if len(scene.hardest_negative):
        picked.append(("hard negative", scene.hardest_negative, 0))
    figure = Figure(figsize=(12, 2.9), dpi=DPI, layout="constrained")
    grid = figure.subplots(1, 4)
    facts: dict[str, float | int | str] = {"image": str(scene.inputs["image_id"])}
    rows = []
    for axes, (name, boxes, i) in zip(grid, picked, strict=False):
        color = GREEN if name.startswith("prime") else ORANGE
        _draw_sample(axes, image, boxes, i, name, color)
        values = {"IoU": boxes.ious[i], "score": boxes.scores[i], "loss": boxes.losses[i]}
        facts |= {f"{name}: {key}": float(value) for key, value in values.items()}
        rows.append([name, *(float(x) for x in (*boxes.boxes[i], *values.values()))])
    for axes in grid[len(picked) :]:
        axes.set_axis_off()
    return Plot(
        "prime_and_hard",
        "A prime sample next to a hard one",
        "Look at what the two ask of the classifier: the prime one decides which box is found, the "
        "hard one costs the most loss.",
        f"Samples of one image, {facts['image']}, among its test-time proposals, as regressed. The "
        "hard positive has the highest classification loss of the image; the prime positive is the "
        "one of the same object with the highest IoU. The prime negative has the lowest Score-HLR, "
        "the hard negative the highest loss; they can be one box. Score: of the object's class for "
        "positives, the highest foreground score for negatives.",
        figure,
        Table(["sample", "x0", "y0", "x1", "y1", "IoU", "score", "loss"], rows),
        facts,
        Table(
            ["sample", "IoU", "score", "loss"],
            [[row[0], *(f"{v:.2f}" for v in row[5:])] for row in rows],
        ),
    )


def _draw_sample(
    axes: Axes, image: np.ndarray, found: RankedBoxes, i: int, name: str, color: str
) -> None:
    show_image(axes, image, alpha=0.85)
    draw_boxes(axes, found.boxes[i : i + 1], [color], [3.0])
    axes.set_title(
        f"{name}\nIoU {found.ious[i]:.2f}, score {found.scores[i]:.2f}, loss {found.losses[i]:.2f}",
        fontsize=10,
        color=color,
    )
