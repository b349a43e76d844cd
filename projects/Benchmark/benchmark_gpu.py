#!/usr/bin/env python3
"""
Measure on a GPU the operators that benchmark_counts.py counts: launches, waits and milliseconds of
each part with 2 and 16 images, next to the counts. It needs no data and at most 10 minutes, and
writes its table to output/benchmark/gpu.md.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import detectron2
import torch
from benchmark_counts import NUM_IMAGES, counts_of
from counted_steps import SECTIONS, STOCK
from detectron2.utils.events import EventStorage
from timing import Timing, count_launches, count_synchronisations, in_turn

ROUNDS = 30


class Row(NamedTuple):
    """``launches`` and ``waits`` are None on a CPU."""

    section: str
    what: str
    images: int
    operators: int
    launches: int | None
    waits: int | None
    timing: Timing


def measure(section: str, num_images: int, device: str, rounds: int) -> list[Row]:
    make, variants = SECTIONS[section]
    steps: dict[str, Callable[[], None]] = {
        what: make(options, num_images, device) for what, options in variants.items()
    }
    with EventStorage():
        timings = in_turn(steps, STOCK, rounds, device)
        on_gpu = device == "cuda"
        return [
            Row(
                section=section,
                what=what,
                images=num_images,
                operators=counts_of(section, what, num_images).num_operators,
                launches=count_launches(step) if on_gpu else None,
                waits=count_synchronisations(step) if on_gpu else None,
                timing=timings[what],
            )
            for what, step in steps.items()
        ]


def markdown(rows: list[Row]) -> list[str]:
    stock = {(row.section, row.images): row for row in rows if row.what == STOCK}
    lines = [
        "| part | of | images | operators | launches | waits | ms | beyond Detectron2's, ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        base = stock[row.section, row.images].timing.median
        launches, waits = ("" if n is None else n for n in (row.launches, row.waits))
        lines.append(
            f"| {row.section} | {row.what} | {row.images} | {row.operators} | {launches} | {waits} "
            f"| {1e3 * row.timing.median:.2f} | {1e3 * (row.timing.median - base):.2f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split()))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="%(default)s by default")
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="start no part after these minutes (%(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path("output/benchmark"))
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"{parser.prog}: there is no GPU here; --device cpu measures without one.")
    args.output.mkdir(parents=True, exist_ok=True)
    on_gpu = args.device == "cuda"
    where = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    text = f"{where}, torch {torch.__version__}, Detectron2 {detectron2.__version__}, median of "
    start, rows = time.monotonic(), []
    for num_images in NUM_IMAGES:
        for section in SECTIONS:
            if time.monotonic() - start > 60 * args.minutes:
                print(f"Left out for time: {section}, {num_images} images", file=sys.stderr)
                continue
            print(f"{section}, {num_images} images ...", file=sys.stderr)
            rows += measure(section, num_images, args.device, args.rounds)
            # Written after each part, in case the machine is taken away.
            table = "\n".join([f"{text}{args.rounds}", "", *markdown(rows)])
            (args.output / "gpu.md").write_text(table + "\n")
    print(table)
    print(args.output / "gpu.md")


if __name__ == "__main__":
    main()
