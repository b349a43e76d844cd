#!/usr/bin/env python3
"""
Train every strategy of a grid on every dataset with every seed, and compare their COCO AP.

Finished runs are kept, and interrupted ones continue from their last checkpoint when the command is
repeated.
"""

import argparse
import csv
import hashlib
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from comparison import Grid, Pair, Result, markdown, plot
from grid_checks import check_grid
from tqdm import tqdm

from pisa_d2.engine.metrics import COCO_METRICS, read_metrics
from pisa_d2.engine.signals import on_signals

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Run:
    dataset: str
    strategy: str
    seed: int
    script: str
    config: str
    options: dict[str, Any] = field(hash=False)
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.strategy} on {self.dataset}, seed {self.seed}"

    @property
    def settings(self) -> str:
        """Return a digest, so that results of other settings are not taken for this run's."""
        words = json.dumps([self.script, self.config, self.options], sort_keys=True)
        return hashlib.sha256(words.encode()).hexdigest()[:8]

    def command(self) -> list[str]:
        options = {"SEED": self.seed, "OUTPUT_DIR": self.folder, **self.options}
        words = [sys.executable, ROOT / self.script, "--resume", "--config-file"]
        words += [ROOT / self.config, *itertools.chain.from_iterable(options.items())]
        return [str(word) for word in words]


def runs_of(grid: dict[str, Any], output: Path) -> Iterator[Run]:
    """Yield the runs seed by seed, so that early results can be compared."""

    def seeds(strategy: dict[str, Any], dataset: str) -> list[int]:
        if dataset not in strategy.get("datasets", grid["datasets"]):
            return []
        seeds = strategy.get("seeds", grid["seeds"])
        return seeds[dataset] if isinstance(seeds, dict) else seeds

    strategies, datasets = grid["strategies"], grid["datasets"]
    every = {seed for of in strategies.values() for name in datasets for seed in seeds(of, name)}
    for seed in sorted(every):
        for dataset, options in datasets.items():
            for name, strategy in strategies.items():
                if seed not in seeds(strategy, dataset):
                    continue
                folder = re.sub(r"\W+", "_", name).strip("_")
                yield Run(
                    dataset=dataset,
                    strategy=name,
                    seed=seed,
                    script=strategy.get("script", "train_net.py"),
                    config=strategy["config"].format(dataset=dataset),
                    options={**(options or {}), **strategy.get("options", {})},
                    folder=output / dataset / folder / f"seed{seed}",
                )


def pairs_of(grid: dict[str, Any]) -> list[Pair]:
    """The comparisons that the grid tests, and those that it describes."""

    def schedule(name: str) -> list[Any]:
        options = grid["strategies"][name].get("options", {})
        return [options.get(f"SOLVER.{key}") for key in ("MAX_ITER", "IMS_PER_BATCH")]

    found = []
    for name, strategy in grid["strategies"].items():
        described = strategy.get("also", [])
        tested = strategy.get("against", [] if described else [grid["baseline"]])
        for baseline in [*tested, *described]:
            if name != baseline:
                paired = schedule(name) == schedule(baseline)
                found.append(Pair(name, baseline, paired, tested=baseline in tested))
    return found


def read_result(run: Run) -> Result | None:
    """
    Read the last evaluation of a run; None if it is not done.

    Raises:
        RuntimeError: the run is done, and has no AP.
    """
    path = run.folder / "metrics.json"
    lines = read_metrics(run.folder) if path.is_file() else []
    # Evaluations during the training are not the result.
    if not lines or "bbox/AP" not in lines[-1] or not (run.folder / "model_final.pth").is_file():
        return None
    scores = {metric: round(lines[-1][f"bbox/{metric}"], 3) for metric in COCO_METRICS}
    if math.isnan(scores["AP"]):
        raise RuntimeError(
            f"{run.name}, has no AP: its detector found nothing. Train for longer than "
            f"{lines[-1]['iteration']} steps, and remove '{run.folder}'."
        )
    # Detectron2 times no step before the fourth.
    times = [line["time"] for line in lines if "time" in line]
    of_step = statistics.median(times) if times else math.nan
    return Result(
        dataset=run.dataset,
        strategy=run.strategy,
        seed=run.seed,
        **scores,
        # A median, which interruptions and other load of the machine hardly change.
        seconds=round(of_step * lines[-1]["iteration"], 1),
        settings=run.settings,
    )


def read_results(path: Path, runs: Iterable[Run]) -> dict[Run, Result]:
    """
    The rows of a CSV file that belong to ``runs``.

    Raises:
        ValueError: a row was made with other settings than the grid has now.
    """
    if not path.is_file():
        return {}
    by_name = {(run.dataset, run.strategy, run.seed): run for run in runs}
    results = {}
    for row in csv.DictReader(path.open()):
        result = Result.from_row(row)
        run = by_name.get((result.dataset, result.strategy, result.seed))
        if run is None:
            continue
        if run.settings != result.settings:
            raise ValueError(
                f"'{path}' has a row of {run.name} that was made with other settings than the grid "
                f"has now. Remove the row and the folder '{run.folder}' to train it again."
            )
        results[run] = result
    return results


def write_results(path: Path, results: Iterable[Result]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    with scratch.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Result._fields)
        writer.writerows(results)
    scratch.replace(path)


class Processes:
    """Trainings that run at the same time, and end together on SIGTERM or Ctrl-C."""

    def __init__(self) -> None:
        self.stopped = False
        self._running: set[subprocess.Popen] = set()

    def call(self, command: list[str], **kwargs: Any) -> int:
        """Run a command as ``subprocess.call`` does."""
        with subprocess.Popen(command, **kwargs) as process:
            self._running.add(process)
            if self.stopped:  # after the signal had looked at the running ones
                process.terminate()
            process.wait()
            self._running.discard(process)
        return process.returncode

    @contextmanager
    def ended_by_signals(self) -> Iterator[None]:
        """
        Pass SIGTERM and Ctrl-C on to all processes, where trainings save a checkpoint and end.

        Raises:
            KeyboardInterrupt: after either signal.
        """

        def stop(signum: int, frame: FrameType | None) -> None:
            self.stopped = True
            for process in list(self._running):
                process.terminate()  # not SIGINT, which a terminal itself sends to all
            raise KeyboardInterrupt

        with on_signals(stop):
            yield


def train(run: Run, threads: int, processes: Processes) -> Result:
    """
    Train a run, or finish its training, and read its result.

    Raises:
        RuntimeError: the run failed; names its log.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    path = run.folder / "train.log"
    with path.open("a") as log:
        status = processes.call(
            run.command(),
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
    result = read_result(run) if status == 0 else None
    if result is None:
        raise RuntimeError(f"{run.name}, failed: see the end of '{path}'.")
    return result


def train_all(
    runs: list[Run], wanted: list[Run], results: dict[Run, Result], path: Path, jobs: int
) -> list[str]:
    """
    Train the wanted runs that have no result yet. Each result is added to ``results`` and to the
    file when its run is done. If a run fails, the others continue.

    Args:
        runs: the whole grid, in the order of the file.

    Returns:
        A line for each failed run.

    Raises:
        KeyboardInterrupt: SIGTERM or Ctrl-C ended the trainings.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    lock = threading.Lock()
    failures = []
    missing = [run for run in wanted if run not in results]
    progress = tqdm(desc="runs", initial=len(wanted) - len(missing), total=len(wanted))
    processes = Processes()

    def work(run: Run) -> None:
        if processes.stopped:
            return
        try:
            result = train(run, threads, processes)
            with lock:
                results[run] = result
                write_results(path, (results[run] for run in runs if run in results))
                progress.write(f"{run.name}: {result.AP:.1f} AP", file=sys.stderr)
        except RuntimeError as error:
            if processes.stopped:
                return
            failures.append(str(error))
            progress.write(str(error), file=sys.stderr)
        progress.update()

    with processes.ended_by_signals(), progress, ThreadPoolExecutor(jobs) as pool:
        for _ in pool.map(work, missing):  # which starts no other after an exception
            pass
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("grid", type=Path, help="yaml file with datasets, seeds and strategies")
    parser.add_argument("--output", type=Path, help="folder of the runs (output/<grid's name>)")
    parser.add_argument(
        "--results", type=Path, help="CSV file to go on with and write (<output>/results.csv)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (%(default)s)")
    parser.add_argument("--datasets", nargs="+", help="to train on (all of the grid)")
    parser.add_argument("--strategies", nargs="+", help="to train (all of the grid)")
    parser.add_argument("--no-training", action="store_true", help="report what is done already")
    args = parser.parse_args()
    try:
        grid = yaml.safe_load(args.grid.read_text())
        check_grid(grid)
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(f"'{args.grid}': {error}")
    for part in ("datasets", "strategies"):
        for name in getattr(args, part) or ():
            if name not in grid[part]:
                parser.error(f"{name!r} is not in the grid: its {part} are {list(grid[part])}.")
    output = args.output or Path("output") / args.grid.stem
    path = args.results or output / "results.csv"
    runs = list(runs_of(grid, output))

    results = read_results(path, runs)
    num_read = len(results)
    failures = []
    for run in runs:
        try:
            if run not in results and (done := read_result(run)):
                results[run] = done
        except RuntimeError as error:
            failures.append(str(error))
    wanted = [
        run
        for run in runs
        if run.dataset in (args.datasets or grid["datasets"])
        and run.strategy in (args.strategies or grid["strategies"])
    ]
    if not args.no_training:
        try:
            failures = train_all(runs, wanted, results, path, args.jobs)
        except KeyboardInterrupt:
            sys.exit("Interrupted. Give the same command again to continue.")
    if not results:
        sys.exit("\n".join([f"'{path}' has no result of this grid.", *failures]))
    rows = [results[run] for run in runs if run in results]
    if len(rows) > num_read:  # runs that were done before had no row
        write_results(path, rows)
    compared = Grid(rows, pairs_of(grid), grid.get("tables") or {})
    text = markdown(compared)
    path.with_suffix(".md").write_text(text)
    plot(compared, path.with_suffix(".png"))
    print(text)
    print(path, path.with_suffix(".md"), path.with_suffix(".png"), sep="\n")
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
