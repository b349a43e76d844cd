"""What benchmark.py measured: as CSV, as markdown and as a picture."""

import csv
from pathlib import Path
from typing import NamedTuple

import benchmark_steps
from benchmark_parts import NMS_SIZES, SIZES, Part
from matplotlib.axes import Axes
from matplotlib.figure import Figure


class Row(NamedTuple):
    """A line of the CSV. ``ratio`` is to ``base``."""

    section: str
    what: str
    size: str
    seconds: float
    base: str
    ratio: float
    peak_bytes: int | None = None
    synchronisations: int | None = None


def share_of_step(rows: list[Row]) -> dict[str, float]:
    """Time of PISA's losses beyond Detectron2's, by that of a whole step, for each model."""
    seconds = {(row.section, row.size, row.what): row.seconds for row in rows}
    return {
        size: (pisa - seconds["losses", size, "Detectron2"])
        / seconds["steps", size, benchmark_steps.BASE]
        for (section, size, what), pisa in seconds.items()
        if (section, what) == ("losses", "PISA")
    }


def write_csv(rows: list[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        for row in rows:
            writer.writerow(row._replace(seconds=f"{row.seconds:.6g}", ratio=f"{row.ratio:.4g}"))


def markdown(
    rows: list[Row], parts: dict[str, dict[str, dict[str, float]]], speeds: dict[str, float]
) -> str:
    lines = []
    for section in dict.fromkeys(row.section for row in rows):
        lines += [f"### {section.capitalize()}", ""]
        lines += ["| size | what | ms | ratio | to | peak memory, MB | synchronisations |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for row in rows:
            if row.section == section:
                peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.3g}"
                waits = "" if row.synchronisations is None else row.synchronisations
                lines.append(
                    f"| {row.size} | {row.what} | {1e3 * row.seconds:.3g} | {row.ratio:.3g} "
                    f"| {row.base} | {peak} | {waits} |"
                )
        lines.append("")
    for size, of_model in parts.items():
        if of_model:
            lines += [f"{size}:", "", *benchmark_steps.parts_table(of_model), ""]
    for size, share in share_of_step(rows).items():
        lines.append(f"PISA's losses beyond Detectron2's: {share:.2%} of a step ({size}).")
    lines += ["", "### Data", "", "| what | images a second |", "|---|---|"]
    lines += [f"| {what} | {speed:.3g} |" for what, speed in speeds.items()]
    return "\n".join(lines)


def plot(parts: list[Part], rows: list[Row], path: Path) -> None:
    figure = Figure(figsize=(12, 4.2), dpi=110, layout="constrained")
    growth, steps = figure.subplots(1, 2)
    plot_growth(growth, parts)
    plot_steps(steps, [row for row in rows if row.section == "steps"])
    figure.savefig(path)


def plot_growth(axes: Axes, parts: list[Part]) -> None:
    # Of the sizes those that differ by the number of samples alone.
    sizes = {str(size) for size in SIZES[:4]} | {f"{num} boxes of an image" for num in NMS_SIZES}
    parts = sorted((p for p in parts if p.size in sizes), key=lambda p: p.samples)
    lines = [("HLR", "sort", "gray", "--")]
    for color, name in zip(("C0", "C1", "C2"), ("HLR", "ISR-P", "NMS groups"), strict=True):
        lines += [(name, "ours", color, "-"), (name, "loops", color, ":")]
    for name, kind, color, style in lines:
        points = [
            (p.samples, 1e3 * p.timings[kind].median)
            for p in parts
            if p.name == name and kind in p.timings
        ]
        label = "one bare sort" if kind == "sort" else f"{name}, {kind}"
        axes.plot(*zip(*points, strict=True), style, color=color, marker=".", label=label)
    axes.set(xscale="log", yscale="log", xlabel="samples", ylabel="ms", title="How the cost grows")
    axes.legend(fontsize=8)


def plot_steps(axes: Axes, rows: list[Row]) -> None:
    models = list(dict.fromkeys(row.size for row in rows))
    names = list(dict.fromkeys(row.what for row in rows))
    height = 0.8 / len(models)
    for i, size in enumerate(models):
        of_model = [row for row in rows if row.size == size]
        places = [names.index(row.what) + i * height for row in of_model]
        axes.barh(places, [row.ratio for row in of_model], height, label=size)
    axes.set_yticks(range(len(names)), names)
    axes.axvline(1, color="gray", lw=1)
    axes.invert_yaxis()
    axes.set(xlabel="time of a training step, ratio to random sampling without PISA")
    axes.legend(fontsize=8)
