"""Reports of benchmark.py: CSV, markdown and a picture."""

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
    """Return the extra time of PISA's losses as a share of a whole step, for each model."""
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
            rounded = {"seconds": f"{row.seconds:.6g}", "ratio": f"{row.ratio:.4g}"}
            writer.writerow({**row._asdict(), **rounded}.values())


def markdown(
    rows: list[Row], parts: dict[str, dict[str, dict[str, float]]], speeds: dict[str, float]
) -> str:
    lines = ["### Parts", "", *parts_alone(rows)]
    for section in ("losses", "steps"):
        of_section = [row for row in rows if row.section == section]
        lines += ["", f"### {section.capitalize()}", "", *table(of_section), ""]
    for size, of_model in parts.items():
        if of_model:
            lines += [f"{size}:", "", *benchmark_steps.parts_table(of_model), ""]
    for size, share in share_of_step(rows).items():
        lines.append(f"PISA's losses beyond Detectron2's: {share:.2%} of a step ({size}).")
    if speeds:
        lines += ["", "### Data", "", "| what | images a second |", "|---|---|"]
    lines += [f"| {what} | {speed:.3g} |" for what, speed in speeds.items()]
    return "\n".join(lines)


def parts_alone(rows: list[Row]) -> list[str]:
    """Return a line for each part and size: the package next to one bare sort and to loops."""
    lines = ["| part | size | ms | ratio to a sort | loops, ratio | peak memory, MB |"]
    lines.append("|---|---|---|---|---|---|")
    by_name = {(row.size, row.what): row for row in rows if row.section == "parts"}
    for (size, what), ours in by_name.items():
        name, _, kind = what.rpartition(", ")
        if kind == "ours":
            loops = by_name.get((size, f"{name}, loops"))
            peak = "" if ours.peak_bytes is None else f"{ours.peak_bytes / 1e6:.3g}"
            lines.append(
                f"| {name} | {size} | {1e3 * ours.seconds:.3g} | {ours.ratio:.3g} "
                f"| {f'{loops.ratio:.3g}' if loops else ''} | {peak} |"
            )
    return lines


def table(rows: list[Row]) -> list[str]:
    head = ["model", "what", "ms", "ratio", "peak memory, MB", "synchronisations"]
    lines = []
    for row in rows:
        peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.3g}"
        waits = "" if row.synchronisations is None else row.synchronisations
        cells = (f"{1e3 * row.seconds:.4g}", f"{row.ratio:.3f}", peak, waits)
        lines.append((row.size, row.what, *cells))
    # Columns without values, such as waits for a GPU on a CPU, are left out.
    kept = [i for i in range(len(head)) if any(line[i] != "" for line in lines)]
    texts = [" | ".join(str(line[i]) for i in kept) for line in [head, *lines]]
    return [f"| {texts[0]} |", "|" + "---|" * len(kept), *(f"| {text} |" for text in texts[1:])]


def plot(parts: list[Part], rows: list[Row], path: Path) -> None:
    figure = Figure(figsize=(12, 4.2), dpi=110, layout="constrained")
    growth, steps = figure.subplots(1, 2)
    plot_growth(growth, parts)
    plot_steps(steps, [row for row in rows if row.section == "steps"])
    figure.savefig(path)


def plot_growth(axes: Axes, parts: list[Part]) -> None:
    # Only the sizes that differ in nothing but the number of samples.
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
    for i, (size, marker) in enumerate(zip(models, "osD^v", strict=False)):
        of_model = [row for row in rows if row.size == size]
        places = [names.index(row.what) + 0.15 * i for row in of_model]
        axes.plot([row.ratio for row in of_model], places, marker, label=size)
    axes.set_yticks(range(len(names)), names)
    axes.axvline(1, color="gray", lw=1)
    axes.grid(alpha=0.3)
    axes.invert_yaxis()
    axes.set(xlabel="time of a training step, ratio to random sampling without PISA")
    axes.legend(fontsize=8, loc="upper right")
