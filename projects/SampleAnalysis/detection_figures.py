"""Figures that compare the detections of two detectors."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from box_drawing import draw_boxes, label_box, show_image
from coco_scores import SIZES, Evaluation, average_precision
from html_report import Plot, Table
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from mistakes import KINDS, THRESHOLDS, ImageResult, count_mistakes
from palette import BLUE, DPI, ORANGE, SKY
from resampling import mean_ap
from seeds import OverSeeds

# Colour, line and words for a detection.
RIGHT = (BLUE, "-", "right at IoU 0.75")
LOOSE = (SKY, "--", "right at IoU 0.5 only")
WRONG = (ORANGE, ":", "wrong at IoU 0.5")
LOOKS = (RIGHT, LOOSE, WRONG)
STYLES = ((BLUE, "-"), (ORANGE, "--"))  # of the two detectors
MISSED: dict[str, Any] = {"fc": (0, 0, 0, 0.25), "ec": "black", "hatch": "//", "lw": 0.8}


def plot_detections(
    pairs: list[tuple[ImageResult, ImageResult]],
    images: list[np.ndarray],
    names: list[str],
    classes: dict[int, str],
) -> Plot:
    """
    Args:
        pairs: results of both detectors on some images.
        images: uint8 (H, W, 3), RGB, of each pair.
        names: of the detectors.
        classes: the names of classes by the dataset's own ids.
    """
    heights = [image.shape[0] / image.shape[1] for image in images]
    figure = Figure(figsize=(8.8, 4.3 * sum(heights) + 0.9), dpi=DPI, layout="constrained")
    grid = figure.subplots(len(images), 2, squeeze=False, height_ratios=heights)
    rows: list[list] = []
    facts: dict[str, float | int | str] = {"images drawn": len(images)}
    facts |= {f"IoU of a right detection, {i}": iou for i, iou in enumerate(THRESHOLDS, start=1)}
    for number, (axes, pair, image) in enumerate(zip(grid, pairs, images, strict=True), start=1):
        facts[f"image {number}"] = str(pair[0].image_id)
        facts[f"image {number}: objects"] = len(pair[0].objects)
        for panel, result, name in zip(axes, pair, names, strict=True):
            show_image(panel, image, alpha=0.8)
            _draw_result(panel, result, image.shape)
            panel.set_title(
                f"{name}, image {result.image_id}: {result.num_errors} errors, "
                f"{len(result.objects)} objects",
                fontsize=10,
            )
            facts[f"image {number}: errors of {name}"] = result.num_errors
            rows += [
                [
                    *(str(result.image_id), name, classes[d.class_id], float(d.score)),
                    *(float(round(x, 1)) for x in d.box),
                    *(int(0.5 in d.right_at), int(0.75 in d.right_at), d.mistake or ""),
                ]
                for d in result.detections
            ]
    handles: list[Artist] = [
        Line2D([], [], color=c, ls=s, lw=2.5, label=text) for c, s, text in LOOKS
    ]
    handles.append(Patch(**MISSED, label="object missed at IoU 0.5"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return Plot(
        "detections",
        "Detections side by side",
        "Look at whether the differences are better boxes, missed objects or detections of objects "
        "that have no label.",
        f"The {len(images)} images on which the two detectors differ most in their number of "
        "errors: false positives and missed objects, counted at IoU 0.5 and again at 0.75. "
        "Numbers are scores; classes are in the CSV file. Of each class those detections are "
        "drawn that score highest in the dataset, as many as it has objects. The rule shows large "
        "differences, in either direction: these are not typical images.",
        figure,
        Table(
            ["image", "detector", "class", "score", "x", "y", "width", "height"]
            + ["right at 0.5", "right at 0.75", "mistake"],
            rows,
        ),
        facts,
    )


def _xyxy(boxes: list[list[float]]) -> np.ndarray:
    array = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    return np.concatenate([array[:, :2], array[:, :2] + array[:, 2:]], axis=1)


def _draw_result(axes: Axes, result: ImageResult, shape: tuple[int, ...]) -> None:
    unfound = [
        item["bbox"]
        for item, missed in zip(result.objects, result.missed_at, strict=True)
        if 0.5 in missed
    ]
    for x, y, width, height in unfound:
        axes.add_patch(Rectangle((x, y), width, height, **MISSED))
    for color, style, _ in reversed(LOOKS):
        chosen = [d for d in result.detections if _look(d.right_at)[0] == color]
        boxes = _xyxy([d.box for d in chosen])
        draw_boxes(axes, boxes, [color] * len(boxes), [2.2] * len(boxes), style)
        for box, detection in zip(boxes, chosen, strict=True):
            label_box(axes, box, shape, f"{detection.score:.2f}".lstrip("0"), color, 7)


def _look(right_at: tuple[float, ...]) -> tuple[str, str, str]:
    if 0.75 in right_at:
        return RIGHT
    return LOOSE if 0.5 in right_at else WRONG


def plot_average_precision(
    evaluations: list[list[Evaluation]],
    draws: list[np.ndarray],
    images: list[list[ImageResult]],
    names: list[str],
    class_names: list[str],
) -> Plot:
    """
    Args:
        evaluations: of the seeds of both runs.
        draws: AP (draws, T, K, A) of both, the mean over seeds, of resampled images.
        images: results of the first seed of both.
        names: of the runs.
        class_names: of all classes.
    """
    figure = Figure(figsize=(13, 8), dpi=DPI, layout="constrained")
    (by_iou, by_class), (by_size, by_kind) = figure.subplots(2, 2)
    points = [_mean(np.stack([average_precision(e) for e in seeds]), 0) for seeds in evaluations]
    thresholds = evaluations[0][0].thresholds
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
    rows: list[list[Any]] = [
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
    num_seeds = len(evaluations[0])
    changes = _over_seeds(evaluations)
    facts: dict[str, float | int | str] = {"seeds": num_seeds, "bootstrap draws": len(draws[0])}
    for metric, (first, second, change) in changes.items():
        facts[f"{names[0]}: {metric}"] = float(first.mean)
        facts[f"{names[1]}: {metric}"] = float(second.mean)
        facts |= change.facts(f"{names[1]} - {names[0]}: {metric}, over seeds")
    _, _, size = groups["size"]
    ends = zip(("", ", low", ", high"), size, strict=True)
    facts |= {f"{names[1]} - {names[0]}: AP, over images{e}": float(v[0]) for e, v in ends}
    overall = [
        row for row in rows if row[:2] in (["size", "all"], ["IoU", "0.50"], ["IoU", "0.75"])
    ]
    overall += [row for row in rows if row[0] == "class"][:most]
    text = [
        [f"{kind} {label}", *(_with_interval(numbers[c : c + 3]) for c in (0, 3, 6))]
        for kind, label, *numbers in overall
    ]
    return Plot(
        "average_precision",
        "Where the AP comes from",
        "Look at whether the gain grows with the IoU threshold, and at differences whose interval "
        "holds 0: these images cannot tell the two runs apart there.",
        f"COCO AP by pycocotools, the mean over {num_seeds} seed{'s' * (num_seeds > 1)} of each "
        f"run. Bands and whiskers are 95% intervals over {len(draws[0])} bootstrap draws of the "
        f"{len(images[0])} images, the same for both; they do not hold the spread between seeds, "
        f"for which the difference in AP is {changes['AP'][2].text(1)} (Student's t, paired). "
        "They are wide and lopsided where a class has so few objects that some draws have none. "
        "False positives are those of the first seed, among the detections that score highest, of "
        "each class as many as it has objects, at IoU 0.5: a duplicate overlaps an object of its "
        "class that another detection took; wrong class (IoU 0.5 or more with an object of "
        "another class); localisation (0.1 to 0.5 with one of its own); and background.",
        figure,
        Table(["by", "of", *columns], rows),
        facts,
        Table(["AP", *names, "difference"], text),
    )


def _over_seeds(
    evaluations: list[list[Evaluation]],
) -> dict[str, tuple[OverSeeds, OverSeeds, OverSeeds]]:
    """AP, AP50 and AP75 of both runs and their paired difference, over seeds."""
    found = {}
    for name, rows in (("AP", slice(None)), ("AP50", slice(0, 1)), ("AP75", slice(5, 6))):
        first, second = (
            [float(mean_ap(average_precision(e)[rows])) for e in seeds] for seeds in evaluations
        )
        change = [b - a for a, b in zip(first, second, strict=True)]
        found[name] = OverSeeds.of(first), OverSeeds.of(second), OverSeeds.of(change)
    return found


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
    """Return value and 95% interval of the first, the second and their difference."""
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
    align = "right" if many else "center"
    axes.set_xticks(x, labels, parse_math=False, rotation=30 * many, ha=align)
    axes.set(ylabel="AP (0.5 to 0.95), in %", ylim=(0, 100))
    axes.legend()


def _mistake_bars(axes: Axes, kinds: list[dict[str, int]], names: list[str]) -> None:
    x = np.arange(len(KINDS))
    for i, (counts, name, (color, _)) in enumerate(zip(kinds, names, STYLES, strict=True)):
        bars = axes.bar(x + 0.38 * (i - 0.5), list(counts.values()), 0.36, color=color, alpha=0.85)
        axes.bar_label(bars)
        bars.set_label(f"{name}, {sum(counts.values())} in all")
    axes.set_xticks(x, KINDS)
    axes.set(title="false positives at IoU 0.5, by kind", ylabel="detections")
    axes.margins(y=0.12)
    axes.legend()
