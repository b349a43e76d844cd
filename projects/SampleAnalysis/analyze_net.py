#!/usr/bin/env python3
"""
Draw a report on a two-stage detector: which samples each strategy trains on, what their ranks are
worth, and, with checkpoints of several runs, what each run did to scores, losses and AP.
"""

import argparse
import logging
import re
import sys
from pathlib import Path

import pisa_d2  # noqa: F401  # isort: skip  (before detectron2: it patches 0.6)

from chapters import Report
from detectron2.config import CfgNode
from html_report import Plot, write_report
from loading import STRATEGIES, dataset_of, setup, with_samplers
from records import load_records, num_objects


def make_cfg(config_file: str, options: list[str]) -> CfgNode:
    """The config of the boxes alone, with samplers that need the box head's predictions."""
    cfg = setup(config_file, options)
    cfg.MODEL.MASK_ON = cfg.MODEL.KEYPOINT_ON = False
    # The report shows positives and negatives separately.
    cfg.MODEL.ROI_HEADS.HARD_SAMPLER.JOINT = False
    return with_samplers(cfg, *STRATEGIES["hard"])


CONFIG_KEY = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)*")


def take_config_keys(words: list[str]) -> list[str]:
    """Remove config keys and values, which argparse leaves in the last --run, and return them."""
    for i, word in enumerate(words[1:], start=1):
        if CONFIG_KEY.fullmatch(word) and not Path(word).exists():
            keys, words[i:] = words[i:], []
            return keys
    return []


def parse_runs(parser: argparse.ArgumentParser, words: list[list[str]]) -> dict[str, list[str]]:
    """Return the checkpoints of each run by its name."""
    runs = {name: checkpoints for name, *checkpoints in words}
    if len(runs) < len(words):
        parser.error("--run: the names of runs must differ")
    if len(runs) == 1:
        parser.error("--run must be given twice or more: the first run is the baseline")
    if numbers := sorted({len(checkpoints) for checkpoints in runs.values()}):
        if numbers[0] == 0:
            parser.error("--run needs a name and one checkpoint or more")
        if len(numbers) > 1:
            parser.error(f"--run: all runs must have equally many checkpoints, not {numbers}")
    return runs


def parse_args() -> tuple[argparse.Namespace, dict[str, list[str]]]:
    parser = argparse.ArgumentParser(description=" ".join((__doc__ or "").split()))
    parser.add_argument("--config-file", required=True, help="of a two-stage detector")
    parser.add_argument(
        "--run",
        nargs="+",
        action="append",
        default=[],
        metavar="NAME_OR_CHECKPOINT",
        help="name and checkpoints of a run, one for each seed in the same order; give it for each "
        "run, the baseline first",
    )
    parser.add_argument("--dataset", help="registered name (the first of DATASETS.TEST)")
    parser.add_argument("--num-images", type=int, help="this many, evenly from the dataset (all)")
    parser.add_argument("--bootstrap", type=int, default=200, help="draws (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of samplers and bootstrap")
    parser.add_argument("--output", type=Path, help="folder of the report (OUTPUT_DIR/analysis)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config keys and values")
    args = parser.parse_args()
    for name in ("num_images", "bootstrap"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    args.opts = [*(take_config_keys(args.run[-1]) if args.run else []), *args.opts]
    runs = parse_runs(parser, args.run)
    if "MODEL.WEIGHTS" not in args.opts and not runs:
        parser.error(
            "name a detector with MODEL.WEIGHTS CHECKPOINT after the options, or runs with --run"
        )
    return args, runs


def say_what_it_is_of(
    plots: list[Plot], dataset: str, records: list[dict], source: str, seeds: int
) -> None:
    """End each caption with the dataset and the checkpoints, and add both to its numbers."""
    images, objects = len(records), num_objects(records)
    for plot in plots:
        plot.explained += f" {images:,} images of {dataset} with {objects:,} objects; {source}."
        plot.facts |= {"dataset": dataset, "images": images, "objects in the dataset": objects}
        plot.facts |= {"made by": source, "seeds of a run": seeds}


def main() -> None:
    args, runs = parse_args()
    cfg = make_cfg(args.config_file, args.opts)
    weights = cfg.MODEL.WEIGHTS if "MODEL.WEIGHTS" in args.opts else None
    config = Path(args.config_file).name
    dataset = dataset_of(cfg, args.dataset)
    logging.getLogger("detectron2").setLevel(logging.WARNING)
    records = load_records(dataset, args.num_images)
    report = Report(cfg, dataset, records, args.bootstrap, args.seed)
    try:
        plots = []
        if weights:
            plots = report.of_detector(weights)
            source = f"detector {config}, {named(weights)}, AP {report.ap:.1f}"
            say_what_it_is_of(plots, dataset, records, source, 1)
            for plot in plots:
                plot.facts["AP of the detector"] = report.ap
        if runs:
            compared = report.of_runs(runs)
            seeds = len(next(iter(runs.values())))
            source = f"{config}, runs {', '.join(runs)} with {seeds} checkpoint(s) each"
            say_what_it_is_of(compared, dataset, records, source, seeds)
            # Scores by rank and IoU are drawn once, of the runs.
            names = {plot.name for plot in compared}
            plots = [plot for plot in plots if plot.name not in names] + compared
        else:
            report.left_out.append(
                "Differences between runs: they need checkpoints of two runs or more (--run)."
            )
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    facts = [
        ("config", args.config_file),
        *([("checkpoint of the detector", weights)] if weights else []),
        *((f"checkpoints of {name}", ", ".join(paths)) for name, paths in runs.items()),
        ("dataset", f"{dataset}: {len(records)} images, {num_objects(records)} objects"),
    ]
    if "Cascade" in cfg.MODEL.ROI_HEADS.NAME:
        facts.append(
            (
                "cascade",
                "samples, ranks and scores are those of its first stage; AP revisited, "
                "detections and AP are those of the whole",
            )
        )
    output = args.output or Path(cfg.OUTPUT_DIR) / "analysis"
    title = f"Samples of {Path(args.config_file).stem} on {dataset}"
    print(write_report(output, title, facts, plots, report.left_out))


def named(weights: str) -> str:
    """The file and its folder."""
    return "/".join(Path(weights).parts[-2:])


if __name__ == "__main__":
    main()
