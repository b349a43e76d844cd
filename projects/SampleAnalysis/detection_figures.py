"""Figures that compare the detections of two checkpoints."""

import warnings
from collections.abc import Callable

import numpy as np
from box_drawing import draw_boxes, show_image
from coco_scores import SIZES, Evaluation, average_precision
from html_report import Plot, Table
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from mistakes import KINDS, ImageResult, count_mistakes
from sample_figures import BLUE, DPI, ORANGE, SKY
from score_figures import STYLES

# Colour, line and words for what a detection is.
RIGHT = (BLUE, "-", "right at IoU 0.75")
LOOSE = (SKY, "--", "right at IoU 0.5 only")
WRONG = (ORANGE, ":", "wrong at IoU 0.5")
LOOKS = (RIGHT, LOOSE, WRONG)
MISSED = {"fc": (0, 0, 0, 0.25), "ec": "black", "hatch": "//", "lw": 0.8}


def plot_detections(
    pairs: list[tuple[ImageResult, ImageResult]],
    images: list[np.ndarray],
    names: list[str],
) -> Plot:
    """
    Args:
        pairs: results of both checkpoints on some images.
        images: these, uint8 (H, W, 3), RGB.
        names: of the checkpoints.
    """
    heights = [image.shape[0] / image.shape[1] for image in images]
    figure = Figure(figsize=(13, 4.3 * sum(heights) + 0.8), dpi=DPI, layout="constrained")
    grid = figure.subplots(len(images), 3, squeeze=False, height_ratios=heights)
    rows = []
    for axes, pair, image in zip(grid, pairs, images, strict=True):
        show_image(axes[0], image, alpha=0.8)
        draw_boxes(axes[0], _xyxy([o["bbox"] for o in pair[0].objects]), ["black"] * 999)
        axes[0].set_title(f"image {pair[0].image_id}: {len(pair[0].objects)} objects", fontsize=10)
        for panel, result, name in zip(axes[1:], pair, names, strict=True):
            show_image(panel, image, alpha=0.8)
            _draw_result(panel, result)
            panel.set_title(f"{name}: {result.num_errors} errors", fontsize=10)
            rows += [
                [
                    *(str(result.image_id), name, d.class_id, float(d.score)),
                    *(float(round(x, 1)) for x in d.box),
                    *(int(0.5 in d.right_at), int(0.75 in d.right_at), d.mistake or ""),
                ]
                for d in result.detections
            ]
    handles = [Line2D([], [], color=c, ls=s, lw=2.5, label=text) for c, s, text in LOOKS]
    handles.append(Patch(**MISSED, label="object missed at IoU 0.5"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return Plot(
        "7_detections",
        "7. Detections side by side",
        "Look at whether the differences are better boxes, missed objects or detections of objects "
        "that have no label.",
        f"The {len(images)} images on which the two differ most in their number of errors: false "
        "positives and missed objects, at IoU 0.5 and at 0.75. Of each class those detections are "
        "drawn that score highest in the data set, as many as it has objects.",
        figure,
        Table(
            ["image", "checkpoint", "class id", "score", "x", "y", "width", "height"]
            + ["right at 0.5", "right at 0.75", "mistake"],
            rows,
        ),
    )


def _xyxy(boxes: list[list[float]]) -> np.ndarray:
    array = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    return np.concatenate([array[:, :2], array[:, :2] + array[:, 2:]], axis=1)


def _draw_result(axes: Axes, result: ImageResult) -> None:
    unfound = [
        item["bbox"]
        for item, missed in zip(result.objects, result.missed_at, strict=True)
        if 0.5 in missed
    ]
    for x, y, width, height in unfound:
        axes.add_patch(Rectangle((x, y), width, height, **MISSED))
    for color, style, _ in reversed(LOOKS):
        chosen = [d.box for d in result.detections if _look(d.right_at)[0] == color]
        draw_boxes(axes, _xyxy(chosen), [color] * len(chosen), [2.2] * len(chosen), style)


def _look(right_at: set[float]) -> tuple[str, str, str]:
    if 0.75 in right_at:
        return RIGHT
    return LOOSE if 0.5 in right_at else WRONG


def plot_average_precision(
    evaluations: list[Evaluation],
    draws: list[np.ndarray],
    images: list[list[ImageResult]],
    names: list[str],
    class_names: list[str],
) -> Plot:
    """
    Args:
        evaluations: of both checkpoints.
        draws: AP (draws, T, K, A) of each, of resampled images.
        images: results of each.
        names: of the checkpoints.
        class_names: of all classes.
    """
    figure = Figure(figsize=(13, 8), dpi=DPI, layout="constrained")
    (by_iou, by_class), (by_size, by_kind) = figure.subplots(2, 2)
    points = [average_precision(e) for e in evaluations]
    thresholds = evaluations[0].thresholds
    groups = {
        "IoU": _by_group(points, draws, lambda ap: _mean(ap[..., 0], -1)),
        "class": _by_group(points, draws, lambda ap: _mean(ap[..., 0], -2)),
        "size": _by_group(points, draws, lambda ap: _mean(ap, (-3, -2))),
    }
    labels = {"IoU": [f"{t:.2f}" for t in thresholds], "class": class_names, "size": list(SIZES)}
    for i, (name, (color, style)) in enumerate(zip(names, STYLES, strict=True)):
        value, low, high = groups["IoU"][i]
        by_iou.plot(thresholds, value, style, color=color, marker="o", ms=4, label=name)
        by_iou.fill_between(thresholds, low, high, color=color, alpha=0.2)
    by_iou.set(xlabel="IoU threshold", ylabel="AP, in %", ylim=(0, 100))
    by_iou.legend()
    most = 12  # classes that a picture can name
    shown = _most_changed(groups["class"], most)
    _bars(by_class, [class_names[i] for i in shown], groups["class"], names, shown)
    by_class.set_title("by class" if len(class_names) <= most else f"the {most} that differ most")
    _bars(by_size, list(SIZES), groups["size"], names, list(range(len(SIZES))))
    by_size.set_title("by size of the object (COCO: 32 and 96 pixels squared)")
    kinds = [count_mistakes(results) for results in images]
    _mistake_bars(by_kind, kinds, names)
    rows = [
        [kind, label, *(float(v[row]) for v in of_first), *(float(v[row]) for v in of_second)]
        + [float(v[row]) for v in change]
        for kind, (of_first, of_second, change) in groups.items()
        for row, label in enumerate(labels[kind])
    ]
    rows += [
        ["false positives", kind, *(x for k in kinds for x in (float(k[kind]), "", "")), "", "", ""]
        for kind in KINDS
    ]
    columns = [f"{name}{part}" for name in (*names, "difference") for part in ("", " low", " high")]
    overall = [
        row for row in rows if row[:2] in (["size", "all"], ["IoU", "0.50"], ["IoU", "0.75"])
    ]
    overall += [row for row in rows if row[0] == "class"][:most]
    text = [
        [f"{kind} {label}", *(_with_interval(numbers[c : c + 3]) for c in (0, 3, 6))]
        for kind, label, *numbers in overall
    ]
    return Plot(
        "8_average_precision",
        "8. Where the AP comes from",
        "Look at whether the gain grows with the IoU threshold, and at intervals of the difference "
        "that hold 0: these images cannot tell the two apart there.",
        f"COCO AP by pycocotools. Bands and whiskers are 95% intervals over {len(draws[0])} "
        f"bootstrap draws of the {len(images[0])} images, the same for both. They do not hold the "
        "spread between training runs, and are wide and lopsided where a class has so few objects "
        "that some draws have none. False positives are those of figure 7's detections at IoU "
        "0.5: a duplicate overlaps an object of its class that another detection took; wrong class "
        "(IoU 0.5 or more with an object of another class); localisation (0.1 to 0.5 with one of "
        "its own); and background.",
        figure,
        Table(["by", "of", *columns], rows),
        Table(["AP", *names, "difference"], text),
    )


Group = list[tuple[np.ndarray, np.ndarray, np.ndarray]]


def _mean(values: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    with warnings.catch_warnings():  # a draw may hold no object of a class
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(values, axis=axis)


def _with_interval(numbers: list[float]) -> str:
    value, low, high = numbers
    return f"{value:.1f} ({low:.1f} to {high:.1f})"


def _by_group(
    points: list[np.ndarray],
    draws: list[np.ndarray],
    reduce: Callable[[np.ndarray], np.ndarray],
) -> Group:
    """Value and 95% interval of the first, the second and their difference."""
    values = [reduce(ap) for ap in points]
    spread = [reduce(ap) for ap in draws]
    values.append(values[1] - values[0])
    spread.append(spread[1] - spread[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return [
            (value, *np.nanpercentile(drawn, [2.5, 97.5], axis=0))
            for value, drawn in zip(values, spread, strict=True)
        ]


def _most_changed(group: Group, num: int) -> list[int]:
    change = np.nan_to_num(np.abs(group[2][0]))
    return sorted(np.argsort(-change, kind="stable")[:num].tolist())


def _bars(axes: Axes, labels: list[str], group: Group, names: list[str], rows: list[int]) -> None:
    x = np.arange(len(rows))
    for i, (name, (color, _)) in enumerate(zip(names, STYLES, strict=True)):
        value, low, high = (np.nan_to_num(v[rows]) for v in group[i])
        reach = np.stack([value - low, high - value]).clip(min=0)
        at = x + 0.38 * (i - 0.5)
        axes.bar(at, value, 0.36, color=color, label=name, yerr=reach, capsize=3, alpha=0.85)
    many = len(rows) > 6
    placed = {"rotation": 30 * many, "ha": "right" if many else "center"}
    axes.set_xticks(x, labels, parse_math=False, **placed)
    axes.set(ylabel="AP (0.5 to 0.95), in %", ylim=(0, 100))
    axes.legend()


def _mistake_bars(axes: Axes, kinds: list[dict[str, int]], names: list[str]) -> None:
    x = np.arange(len(KINDS))
    for i, (counts, name, (color, _)) in enumerate(zip(kinds, names, STYLES, strict=True)):
        bars = axes.bar(x + 0.38 * (i - 0.5), counts.values(), 0.36, color=color, alpha=0.85)
        axes.bar_label(bars)
        bars.set_label(f"{name}, {sum(counts.values())} in all")
    axes.set_xticks(x, KINDS)
    axes.set(title="false positives at IoU 0.5, by kind", ylabel="detections")
    axes.margins(y=0.12)
    axes.legend()
