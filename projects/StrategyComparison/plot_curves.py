#!/usr/bin/env python3
"""
Draw the test AP, losses and other values of runs over the iterations, to see whether a schedule is
long enough. Without TEST.EVAL_PERIOD, a run has only its last AP.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
from cycler import cycler
from matplotlib.figure import Figure

from pisa_d2.engine.metrics import read_metrics


def read_curves(folder: Path, names: Iterable[str]) -> dict[str, dict[int, float]]:
    """
    Read values by iteration from the ``metrics.json`` of a run. If a resumed run repeated
    iterations, the later values are used.

    Args:
        names: keys of the file, or "AP" for COCO's of boxes. Keys that the run never wrote are left
            out.

    Raises:
        FileNotFoundError: the file is missing.
    """
    curves: dict[str, dict[int, float]] = {}
    for line in read_metrics(folder):
        for name in names:
            value = line.get("bbox/AP" if name == "AP" else name)
            if value is not None:
                curves.setdefault(name, {})[line["iteration"]] = value
    return curves


def draw(runs: dict[str, dict[str, dict[int, float]]], names: Sequence[str]) -> Figure:
    """
    Draw a panel per curve.

    Args:
        runs: what :func:`read_curves` returns, by the name of the run.
        names: of the curves. A run without one is left out of its panel.
    """
    size = 5 * len(names), 4 + 0.25 * math.ceil(len(runs) / len(names))
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    styles = cycler(linestyle=["-", "--", ":"]) * cycler(color=matplotlib.color_sequences["tab10"])
    lines = {}
    for (run, curves), style in zip(runs.items(), styles(), strict=False):
        for axes, name in zip(panels, names, strict=True):
            if name in curves:
                points = zip(*sorted(curves[name].items()), strict=True)
                (lines[run],) = axes.plot(*points, marker=".", ms=3, label=run, **style)
    for axes, name in zip(panels, names, strict=True):
        axes.set(xlabel="iteration", title=name)
        axes.grid(alpha=0.3)
    figure.legend(handles=lines.values(), loc="outside lower left", ncols=len(names), fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split()))
    parser.add_argument("folders", type=Path, nargs="+", help="OUTPUT_DIR of each run")
    parser.add_argument(
        "--curves",
        nargs="+",
        default=["AP", "loss_cls", "loss_box_reg"],
        help="keys of metrics.json, or AP (%(default)s)",
    )
    parser.add_argument("--output", type=Path, default=Path("output/curves.png"))
    args = parser.parse_args()

    runs = {}
    for folder in args.folders:
        try:
            runs["/".join(folder.parts[-3:])] = read_curves(folder, args.curves)
        except FileNotFoundError as error:
            sys.exit(f"'{folder}' is no folder of a run: {error}")
    for name in args.curves:
        if not any(name in curves for curves in runs.values()):
            print(f"No run has {name!r}: its panel is empty.", file=sys.stderr)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw(runs, args.curves).savefig(args.output)
    print(args.output)


if __name__ == "__main__":
    main()
