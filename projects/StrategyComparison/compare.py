#!/usr/bin/env python3
"""
Train every strategy of a grid with every seed, and tabulate the COCO AP of the test images.

A run that is done is kept, and one that was interrupted goes on from its last checkpoint when the
same command is given again.
"""

import argparse
import csv
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@dataclass(frozen=True)
class Run:
    strategy: str
    seed: int
    config: str
    options: dict[str, Any]
    folder: Path

    def command(self) -> list[str]:
        options = {"SEED": self.seed, "OUTPUT_DIR": self.folder, **self.options}
        return [
            *(sys.executable, str(ROOT / "train_net.py"), "--resume"),
            *("--config-file", str(ROOT / self.config)),
            *(str(word) for pair in options.items() for word in pair),
        ]


def read_grid(path: Path, output: Path) -> Iterator[Run]:
    """The runs of a grid, seed by seed, so that what is done first can be compared."""
    grid = yaml.safe_load(path.read_text())
    for seed in grid["seeds"]:
        for strategy, settings in grid["strategies"].items():
            folder = output / re.sub(r"\W+", "_", strategy) / f"seed{seed}"
            options = settings.get("options", {})
            yield Run(strategy, seed, settings["config"], options, folder)


def read_result(run: Run) -> dict[str, Any] | None:
    """The last evaluation of a run; None if it is not done."""
    path = run.folder / "metrics.json"
    lines = [json.loads(line) for line in path.open()] if path.is_file() else []
    evaluations = [line for line in lines if "bbox/AP" in line]
    if not evaluations:
        return None
    return {
        "strategy": run.strategy,
        "seed": run.seed,
        **{metric: round(evaluations[-1][f"bbox/{metric}"], 3) for metric in METRICS},
    }


def train(run: Run, threads: int) -> None:
    """
    Raises:
        RuntimeError: the run failed; names its log.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    path = run.folder / "train.log"
    with path.open("a") as log:
        result = subprocess.run(
            run.command(),
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
    if result.returncode != 0:
        raise RuntimeError(f"{run.strategy}, seed {run.seed}, failed: see the end of '{path}'.")


def markdown_table(results: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds, a row a strategy."""
    lines = [
        f"| strategy | seeds | {' | '.join(METRICS)} |",
        "|---|---|" + "---|" * len(METRICS),
    ]
    for strategy in dict.fromkeys(result["strategy"] for result in results):
        rows = [result for result in results if result["strategy"] == strategy]
        cells = []
        for metric in METRICS:
            values = [row[metric] for row in rows]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(f"| {strategy} | {len(rows)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("grid", type=Path, help="yaml file with seeds and strategies")
    parser.add_argument("--output", type=Path, help="folder of the runs (output/<grid's name>)")
    parser.add_argument("--results", type=Path, help="CSV file to write (<output>/results.csv)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (%(default)s)")
    args = parser.parse_args()
    output = args.output or Path("output") / args.grid.stem
    runs = list(read_grid(args.grid, output))

    missing = [run for run in runs if read_result(run) is None]
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    pool = ThreadPoolExecutor(args.jobs)
    try:
        done = pool.map(lambda run: train(run, threads), missing)
        for _ in tqdm(done, desc="runs", initial=len(runs) - len(missing), total=len(runs)):
            pass
    finally:  # a failed run, or Ctrl-C, starts no other
        pool.shutdown(cancel_futures=True)

    results = [result for run in runs if (result := read_result(run))]
    path = args.results or output / "results.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(results[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(results)
    print(markdown_table(results))
    print(path)


if __name__ == "__main__":
    main()
