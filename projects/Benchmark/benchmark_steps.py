#!/usr/bin/env python3
"""
Measure the cost of PISA and of the sampling strategies: whole training steps (forward, backward,
optimizer) of one model on one batch, in turn in one run, and the additional pass of the samplers
that need predictions by its parts.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from timing import Timing, count_synchronisations, in_turn, now, peak_memory

import pisa_d2  # noqa: F401  # isort: skip  (before detectron2: it patches 0.6)

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from pisa_d2.config import read_config
from pisa_d2.data import register_from_config
from pisa_d2.data.classes import take_num_classes
from pisa_d2.roi_heads import scoring

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs/COCO-Detection/pisa_faster_rcnn_R_50_FPN_1x.yaml"
BASE = "random sampling, PISA off"
POSITIVE = "MODEL.ROI_HEADS.POSITIVE_SAMPLER.NAME"
NEGATIVE = "MODEL.ROI_HEADS.NEGATIVE_SAMPLER.NAME"
SAMPLERS: dict[str, list] = {
    "IoU-balanced negatives": [NEGATIVE, "IoUBalancedSampler"],
    "instance-balanced positives": [POSITIVE, "InstanceBalancedSampler"],
    "hard negatives": [NEGATIVE, "HardSampler"],
    "Score-HLR negatives": [NEGATIVE, "ScoreHLRSampler"],
}
NEED_PREDICTIONS = ("hard negatives", "Score-HLR negatives")


def switch(*on: str) -> list:
    """Overrides that leave these parts of PISA alone on."""
    parts = ("ISR_P", "ISR_N", "CARL")
    return [x for part in parts for x in (f"MODEL.PISA.{part}.ENABLED", part in on)]


class Step(NamedTuple):
    name: str
    timing: Timing
    peak: int
    synchronisations: int | None  # None where there is no GPU


def variants(cfg: CfgNode) -> dict[str, list]:
    """Overrides of each row; the stock model's name the class that PISA's extends."""
    if cfg.MODEL.META_ARCHITECTURE == "PISARetinaNet":
        return {
            "Detectron2": ["MODEL.META_ARCHITECTURE", "RetinaNet"],
            BASE: switch(),
            "ISR-P": switch("ISR_P"),
            "PISA": switch("ISR_P", "CARL"),
        }
    return {
        "Detectron2": ["MODEL.ROI_HEADS.NAME", "StandardROIHeads"],
        BASE: switch(),
        "ISR-P": switch("ISR_P"),
        "ISR-P and ISR-N": switch("ISR_P", "ISR_N"),
        "PISA": switch("ISR_P", "ISR_N", "CARL"),
        **{name: [*switch(), *options] for name, options in SAMPLERS.items()},
    }


def setup(config_file: str, options: list, device: str) -> CfgNode:
    cfg = read_config(config_file)
    # NMS would leave a handful of proposals; without it there are as many as asked for.
    cfg.merge_from_list(["MODEL.DEVICE", device, "MODEL.RPN.NMS_THRESH", 1.0, *options])
    register_from_config(cfg)
    take_num_classes(cfg)
    return cfg


def build(cfg: CfgNode, options: list) -> nn.Module:
    cfg = cfg.clone()
    cfg.merge_from_list(options)
    torch.manual_seed(0)
    model = build_model(cfg).train()
    if hasattr(model, "roi_heads"):
        # All proposals are taken for objects: the most that Score-HLR can have to rank.
        nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.3)
        # Proposals are then the anchors; an untrained R50 would propose boxes without area.
        nn.init.zeros_(model.proposal_generator.rpn_head.anchor_deltas.weight)
    return model


def make_batch(
    num_classes: int, num_images: int, size: tuple[int, int], objects: int
) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    limits = torch.tensor([size[1], size[0]])
    batch = []
    for _ in range(num_images):
        extent = (0.05 + 0.4 * torch.rand(objects, 2, generator=generator)) * limits
        corner = torch.rand(objects, 2, generator=generator) * (limits - extent)
        instances = Instances(size)
        instances.gt_boxes = Boxes(torch.cat([corner, corner + extent], dim=1))
        instances.gt_classes = torch.randint(num_classes, (objects,), generator=generator)
        image = torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances})
    return batch


def steps_of(
    cfg: CfgNode, batch: list[dict], only: Sequence[str]
) -> tuple[dict[str, nn.Module], dict[str, Callable[[], None]]]:
    """Models, by name, and a function for each that trains it a step."""
    models: dict[str, nn.Module] = {}
    functions: dict[str, Callable[[], None]] = {}
    for name, options in variants(cfg).items():
        if only and name not in (BASE, *only):
            continue
        model = models[name] = build(cfg, options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)

        def step(model: nn.Module = model, optimizer: Any = optimizer) -> None:
            losses = model(batch)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()

        functions[name] = step
    return models, functions


def run(
    cfg: CfgNode, batch: list[dict], rounds: int, device: str, only: Sequence[str] = ()
) -> tuple[list[Step], dict[str, dict[str, float]]]:
    """The measured steps, and seconds of the parts of sampling where it needs predictions."""
    models, functions = steps_of(cfg, batch, only)
    with EventStorage():
        timings = in_turn(functions, BASE, rounds, device)
        steps = [
            Step(
                name,
                timings[name],
                peak_memory(function, device),
                count_synchronisations(function) if device == "cuda" else None,
            )
            for name, function in functions.items()
        ]
        parts = {
            name: measure_parts(models[name], functions[name], device)
            for name in NEED_PREDICTIONS
            if name in models
        }
    return steps, parts


def measure_parts(model: nn.Module, step: Callable[[], None], device: str) -> dict[str, float]:
    """Seconds of each part of sampling in one step."""
    seconds: dict[str, float] = defaultdict(float)
    heads: Any = model.roi_heads
    predict_all = scoring.predict_all
    sampler, predictor = type(heads.sampler.negative), heads.box_predictor

    def timed(name: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = now(device)
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] += now(device) - start

        return call

    def watch(name: str, owner: Any, attribute: str) -> Any:
        return patch.object(owner, attribute, timed(name, getattr(owner, attribute)))

    def watched_predict_all(*args: Any) -> Any:
        with (  # the chosen ones go through both too
            watch("pooling of all proposals", heads.box_pooler, "forward"),
            watch("box head of all proposals", heads.box_head, "forward"),
        ):
            return predict_all(*args)

    with (
        patch.object(scoring, "predict_all", watched_predict_all),
        watch("losses, scores and boxes", predictor, "predict_candidates"),
        watch("choosing of negatives", sampler, "__call__"),
    ):
        step()
    return dict(seconds)


def markdown(steps: list[Step], parts: dict[str, dict[str, float]]) -> str:
    lines = [
        "| step of | ms | quartiles | ratio | peak memory, MB | synchronisations |",
        "|---|---|---|---|---|---|",
    ]
    for name, (low, median, high, ratio), peak, waits in steps:
        lines.append(
            f"| {name} | {1e3 * median:.0f} | {1e3 * low:.0f} to {1e3 * high:.0f} | {ratio:.3f} "
            f"| {peak / 1e6:.0f} | {'' if waits is None else waits} |"
        )
    if parts:
        lines += ["", *parts_table(parts)]
    return "\n".join(lines)


def parts_table(parts: dict[str, dict[str, float]]) -> list[str]:
    """Lines of markdown, from seconds of each part of sampling, by sampler."""
    lines = [f"| part of a step, ms | {' | '.join(parts)} |", "|---|" + "---|" * len(parts)]
    for part in dict.fromkeys(part for of in parts.values() for part in of):
        cells = (f"{1e3 * of.get(part, 0):.0f}" for of in parts.values())
        lines.append(f"| {part} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split()))
    parser.add_argument("--config-file", default=str(CONFIG), help="of a PISA detector")
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1066), metavar=("H", "W"))
    parser.add_argument("--proposals", type=int, default=1000, help="an image (%(default)s)")
    parser.add_argument("--objects", type=int, default=10, help="an image (%(default)s)")
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW", help="and the base")
    parser.add_argument("--rounds", type=int, default=20, help="%(default)s by default")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config keys and values")
    args = parser.parse_args()

    proposals = ["MODEL.RPN.POST_NMS_TOPK_TRAIN", args.proposals]
    cfg = setup(args.config_file, [*proposals, *args.opts], args.device)
    batch = make_batch(cfg.MODEL.ROI_HEADS.NUM_CLASSES, args.images, tuple(args.size), args.objects)
    steps, parts = run(cfg, batch, args.rounds, args.device, args.only)
    print(
        f"{args.images} images of {args.size[0]} x {args.size[1]}, {args.proposals} proposals and "
        f"{args.objects} objects each, {args.device}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, median of {args.rounds}"
    )
    print(markdown(steps, parts))


if __name__ == "__main__":
    main()
