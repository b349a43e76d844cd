#!/usr/bin/env python3
"""
How many operators and waits each part of the package adds to a step, on the path of a GPU, at 2 and
at 16 images. The numbers are exact and the same on every machine: they are counted on a CPU.
"""

import argparse
import csv
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import yaml
from benchmark_steps import NEGATIVE, POSITIVE, build, setup
from benchmark_steps import make_batch as make_images
from counted_steps import RETINANET, SAMPLING, SECTIONS, STOCK
from counting import Counts, count
from timing import peak_memory

import pisa_d2  # noqa: F401  # isort: skip  (before detectron2: it patches 0.6)

from detectron2.utils.events import EventStorage

HERE = Path(__file__).resolve().parent
BOUNDS, WAITS = HERE / "bounds.yaml", HERE / "waits.yaml"
NUM_IMAGES = (2, 16)
FASTER_RCNN = HERE.parents[1] / "configs/BCCD/pisa_faster_rcnn_R_18_FPN.yaml"


class Row(NamedTuple):
    """The counts of ``what``; ``added`` is the number of operators more than Detectron2's own."""

    section: str
    what: str
    images: int
    operators: int
    added: int
    waits: int
    added_waits: int
    peak_bytes: int


class Wait(NamedTuple):
    """Where a step waits for the device, whatever the line."""

    file: str
    function: str
    operator: str

    def __str__(self) -> str:
        return f"{self.file} {self.function}: {self.operator}"


# Whole steps whose waits are listed: a config, and overrides.
STEPS: dict[str, tuple[Path, list]] = {
    "PISA": (FASTER_RCNN, []),
    "PISA, Score-HLR": (
        FASTER_RCNN,
        [POSITIVE, "InstanceBalancedSampler", NEGATIVE, "ScoreHLRSampler"],
    ),
    "PISA, OHEM": (FASTER_RCNN, SAMPLING["OHEM"] or []),
    "RetinaNet, PISA": (RETINANET, []),
}
SMALL = ["MODEL.FPN.OUT_CHANNELS", 32, "MODEL.RPN.PRE_NMS_TOPK_TRAIN", 100]


def counts_of(section: str, what: str, num_images: int) -> Counts:
    make, variants = SECTIONS[section]
    step = make(variants[what], num_images)
    with EventStorage():  # at an iteration that logs no scalars of PISA
        step()
        return count(step)


def waits_of_step(name: str) -> list[Wait]:
    """Where a training step of a small model of two images waits for the device."""
    config, options = STEPS[name]
    cfg = setup(str(config), [*SMALL, *options], "cpu")
    model = build(cfg, [])
    batch = make_images(3, 2, (96, 128), 5)

    def step() -> None:
        sum(model(batch).values()).backward()

    with EventStorage():
        counts = count(step)
    return sorted({Wait(p.file, p.function, p.operator) for p in counts.waits})


def run(with_memory: bool = True) -> list[Row]:
    """All rows; without memory, which takes longer, its numbers are 0."""
    rows = []
    for section, (make, variants) in SECTIONS.items():
        for num_images in NUM_IMAGES:
            counts = {what: counts_of(section, what, num_images) for what in variants}
            for what, options in variants.items():
                own, stock = counts[what], counts[STOCK]
                peak = 0
                if with_memory:
                    with EventStorage():
                        peak = peak_memory(make(options, num_images), "cpu")
                row = row_of(section, what, num_images, own, stock)
                rows.append(row._replace(peak_bytes=peak))
    return rows


def row_of(section: str, what: str, num_images: int, own: Counts, stock: Counts) -> Row:
    """Make a row of these counts and their excess over Detectron2's own."""
    return Row(
        section,
        what,
        num_images,
        operators=own.num_operators,
        added=own.num_operators - stock.num_operators,
        waits=own.num_waits,
        added_waits=own.num_waits - stock.num_waits,
        peak_bytes=0,
    )


def bounds() -> dict:
    return yaml.safe_load(BOUNDS.read_text())


def check(rows: list[Row]) -> list[str]:
    """Return a line for each count that exceeds its bound in bounds.yaml."""
    highest = bounds()
    failures = []
    for row in rows:
        if row.what == STOCK:
            continue
        for name, value in (("operators", row.added), ("waits", row.added_waits)):
            bound = highest[f"added_{name}"][row.section][row.what][NUM_IMAGES.index(row.images)]
            if value > bound:
                failures.append(
                    f"{name} of {row.section}, {row.what}, {row.images} images: {value} beyond "
                    f"Detectron2's, bound {bound}"
                )
    return failures


def unlisted(waits: list[Wait]) -> list[Wait]:
    """The waits that waits.yaml gives no reason for."""
    listed = yaml.safe_load(WAITS.read_text())
    known = {Wait(w["file"], w["function"], w["operator"]) for w in listed}
    return [wait for wait in waits if wait not in known]


def markdown(rows: list[Row]) -> list[str]:
    lines = [
        "| part | of | images | operators | beyond Detectron2's | waits | beyond Detectron2's "
        "| peak memory, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.section} | {row.what} | {row.images} | {row.operators} | {row.added} "
            f"| {row.waits} | {row.added_waits} | {row.peak_bytes / 1e6:.1f} |"
        )
    return lines


def by_line(counts: Counts) -> list[str]:
    """Lines of text: how many operators each line of code runs, the most first."""
    lines: Counter[str] = Counter()
    for place, times in counts.operators.items():
        lines[f"{place.file}:{place.line} {place.function}"] += times
    return [f"{times:5d} {line}" for line, times in lines.most_common()]


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split()))
    parser.add_argument("--check", action="store_true", help="compare with bounds.yaml, waits.yaml")
    parser.add_argument("--csv", type=Path, help="write the rows to this file too")
    parser.add_argument(
        "--lines",
        nargs=3,
        metavar=("PART", "OF", "IMAGES"),
        help="only the lines of code behind one row, and its waits; such as: losses PISA 2",
    )
    args = parser.parse_args()
    if args.lines:
        section, what, num_images = args.lines
        counts = counts_of(section, what, int(num_images))
        print(counts.num_operators, "operators", *by_line(counts), sep="\n")
        lines = (f"{times:5d} {place}" for place, times in counts.waits.items())
        print(counts.num_waits, "waits", *lines, sep="\n")
        return
    rows = run()
    print(*markdown(rows), sep="\n")
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(Row._fields)
            writer.writerows(rows)
    waits = {name: waits_of_step(name) for name in STEPS}
    for name, of_step in waits.items():
        print(f"\nA step of {name} waits in", *of_step, sep="\n  ")
    if args.check:
        failures = check(rows)
        failures += [f"{name}: no reason for {w}" for name in STEPS for w in unlisted(waits[name])]
        if failures:
            sys.exit("\n".join(["Beyond their bounds:", *failures]))


if __name__ == "__main__":
    main()
