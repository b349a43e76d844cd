#!/usr/bin/env python3
"""
Draw the test AP and the losses of runs over the iterations, to see whether a schedule is long
enough. Without TEST.EVAL_PERIOD, a run has only its last AP.
"""

import argparse
import sys
from pathlib import Path

from matplotlib.figure import Figure

from pisa_d2.engine.metrics import read_metrics


def read_curves(folder: Path) -> dict[str, dict[int, float]]:
    """
    Read "AP" and each loss by iteration from the ``metrics.json`` of a run. If a resumed run
    repeated iterations, the later values are used.

    Raises:
        FileNotFoundError: the file is missing.
    """
    curves: dict[str, dict[int, float]] = {}
    for line in read_metrics(folder):
        for name, value in line.items():
            if name == "bbox/AP" or name.startswith("loss_"):
                curve = curves.setdefault(name.removeprefix("bbox/"), {})
                curve[line["iteration"]] = value
    return curves


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split()))
    parser.add_argument("folders", type=Path, nargs="+", help="OUTPUT_DIR of each run")
    parser.add_argument("--curves", nargs="+", default=["AP", "loss_cls", "loss_box_reg"])
    parser.add_argument("--output", type=Path, default=Path("output/curves.png"))
    args = parser.parse_args()

    figure = Figure(figsize=(5 * len(args.curves), 4), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(args.curves), squeeze=False)[0]
    for folder in args.folders:
        try:
            curves = read_curves(folder)
        except FileNotFoundError as error:
            sys.exit(f"'{folder}' is no folder of a run: {error}")
        for axes, name in zip(panels, args.curves, strict=True):
            if name in curves:
                points = zip(*sorted(curves[name].items()), strict=True)
                axes.plot(*points, marker=".", ms=3, label="/".join(folder.parts[-3:]))
    for axes, name in zip(panels, args.curves, strict=True):
        axes.set(xlabel="iteration", title=name)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output)
    print(args.output)


if __name__ == "__main__":
    main()
