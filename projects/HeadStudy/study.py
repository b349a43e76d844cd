#!/usr/bin/env python3
"""
Find out in minutes which strategy pays on a detector and its data.

Caches what the frozen backbone and RPN of a two-stage detector make of its images, trains the box
head alone under each strategy with the same seeds, and compares their COCO AP. A run that is done
is kept when the same command is given again.
"""

import pisa_d2  # noqa: F401  # isort: skip  (before detectron2: it patches 0.6)

import argparse
import json
import subprocess
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from importlib.metadata import version
from multiprocessing import active_children, get_context
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils.logger import setup_logger
from head_study.report import DETECTOR, About, markdown, plot
from head_study.results import Results
from head_study.runs import Study, about, add_config, prepare, run, score_detector, start_worker
from head_study.strategies import Strategies, read_strategies
from tqdm import tqdm

from pisa_d2.data.classes import take_num_classes
from pisa_d2.engine.signals import on_signals
from pisa_d2.preflight import check_config, check_data
from pisa_d2.train_net import load_config

HERE = Path(__file__).resolve().parent


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--config-file", help="of the detector")
    parser.add_argument(
        "--strategies", type=Path, default=HERE / "strategies.yaml", help="yaml (%(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=8, help="runs per strategy (%(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="per run (%(default)s)")
    parser.add_argument(
        "--from-detector",
        action="store_true",
        help="train the detector's own head on, not a new one",
    )
    parser.add_argument("--processes", type=int, default=1, help="runs at a time (%(default)s)")
    parser.add_argument(
        "--max-gb", type=float, default=8.0, help="disk for the cached features (%(default)s)"
    )
    parser.add_argument("--half", action="store_true", help="cache features in half precision")
    parser.add_argument(
        "--use",
        nargs="+",
        default=[],
        metavar="MODULE[:FUNCTION]",
        help="modules that register what the detector or a strategy names, and functions in them "
        "that add config keys",
    )
    parser.add_argument("--output", type=Path, default=Path("output/head_study"), help="folder")
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="FOLDER",
        help="write a checkpoint of the detector with each trained head, STRATEGY/seedN.pth",
    )
    parser.add_argument("--report-only", action="store_true", help="report what is done already")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, help="config keys and values, with MODEL.WEIGHTS"
    )
    args = parser.parse_args()
    if not args.report_only and args.config_file is None:
        parser.error("--config-file is missing: name the detector's.")
    for name in ("seeds", "steps", "processes"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1.")
    return args


def load(args: argparse.Namespace) -> CfgNode:
    """
    The detector's config.

    Raises:
        ValueError: it names several datasets to test on, or none.
    """
    cfg = load_config(args, partial(add_config, args.use))
    cfg.OUTPUT_DIR = str(args.output)
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
        print("No GPU was found: MODEL.DEVICE is set to cpu.", file=sys.stderr)
    if cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DEVICE == "cpu":
        print("SOLVER.AMP.ENABLED needs a GPU: the heads train in float32.", file=sys.stderr)
    if len(cfg.DATASETS.TEST) != 1:
        raise ValueError(f"DATASETS.TEST = {cfg.DATASETS.TEST} must name one dataset to test on.")
    take_num_classes(cfg)
    cfg.freeze()
    check_config(cfg, train=False)
    check_data(cfg, train=True)
    return cfg


def versions() -> str:
    names = ("torch", "pisa_d2")
    parts = [f"{name} {version(name)}" for name in names]
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True)
    return ", ".join([*parts, *([f"commit {commit.stdout.strip()}"] * (commit.returncode == 0))])


def interrupt(signum: int, frame: FrameType | None) -> None:
    """
    End the processes of a pool, too, as a terminal does on Ctrl-C. Otherwise they outlive this one
    on SIGTERM, and wait forever.
    """
    for process in active_children():
        process.terminate()
    raise KeyboardInterrupt


@on_signals(interrupt)
def train_all(study: Study, strategies: Strategies, results: Results, args: Any) -> list[str]:
    """
    Train what is not done yet, seed by seed.

    Returns:
        A line for each run that failed; the others go on.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM ended the runs.
    """
    wanted = [(s, seed) for seed in range(1, args.seeds + 1) for s in strategies.options]
    missing = [
        key
        for key in wanted
        if not results.done(*key, study.settings(key[0]))
        or ((path := study.checkpoint(*key)) and not path.exists())
    ]
    failures = []
    threads = max(1, torch.get_num_threads() // args.processes)
    pool = ProcessPoolExecutor(
        args.processes, get_context("spawn"), start_worker, (study, threads, args.use)
    )
    progress = tqdm(desc="runs", initial=len(wanted) - len(missing), total=len(wanted))
    try:
        futures = {pool.submit(run, *key): key for key in missing}
        for future in as_completed(futures):
            strategy, seed = futures[future]
            try:
                results.add(*future.result())
                results.write([DETECTOR, *strategies.options])
            except (FloatingPointError, ValueError, TypeError, RuntimeError) as error:
                failures.append(f"{strategy}, seed {seed}, failed: {error}")
                progress.write(failures[-1], file=sys.stderr)
            progress.update()
    finally:  # Ctrl-C starts no other
        pool.shutdown(wait=False, cancel_futures=True)
        progress.close()
    return failures


def main() -> None:
    args = parse_args()
    strategies = read_strategies(args.strategies)
    args.output.mkdir(parents=True, exist_ok=True)
    about_path = args.output / "about.json"
    results = Results(args.output / "results.csv")
    failures = []
    if not args.report_only:
        warnings.filterwarnings("ignore", "torch.meshgrid", UserWarning)
        setup_logger(name="pisa_d2")
        cfg = load(args)
        study = prepare(cfg, args, strategies)
        about_path.write_text(json.dumps(about(study, cfg, args, versions())._asdict(), indent=1))
        if not results.done(DETECTOR, 0, study.folder.name):
            results.add(*score_detector(study))
            results.write([DETECTOR])
        try:
            failures = train_all(study, strategies, results, args)
        except KeyboardInterrupt:
            sys.exit("Interrupted. Give the same command again to continue.")
    if not results.rows:
        sys.exit("\n".join([f"'{results.path}' has no run yet.", *failures]))
    told = About(**json.loads(about_path.read_text()))
    text = markdown(results, strategies, told)
    report, picture = (args.output / f"{args.strategies.stem}.{kind}" for kind in ("md", "png"))
    report.write_text(text)
    plot(results, strategies, told, picture)
    print(text)
    print(results.path, report, picture, sep="\n")
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
