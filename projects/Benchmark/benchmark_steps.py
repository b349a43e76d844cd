#!/usr/bin/env python3
"""
What sampling strategies cost: whole training steps of one model on one batch, in turn in one run,
as ratios to random sampling, and the additional pass of those that need predictions by its parts.
"""

import argparse
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pisa_d2  # isort: skip  (before Detectron2, which it readies)

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from tqdm import tqdm

from pisa_d2.roi_heads import roi_heads

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs/COCO-Detection/pisa_faster_rcnn_R_50_FPN_1x.yaml"
STOCK = "Detectron2's own heads"
# Samplers of the positives and of the negatives.
STRATEGIES = {
    "random": ("RandomSampler", "RandomSampler"),
    "IoU-balanced negatives": ("RandomSampler", "IoUBalancedSampler"),
    "instance-balanced positives": ("InstanceBalancedSampler", "RandomSampler"),
    "hard negatives": ("RandomSampler", "HardSampler"),
    "Score-HLR negatives": ("RandomSampler", "ScoreHLRSampler"),
}


def setup(config_file: str, options: list[str], device: str) -> CfgNode:
    cfg = get_cfg()
    pisa_d2.add_pisa_config(cfg)
    cfg.merge_from_file(config_file)
    # Sampling alone is measured here; benchmark_losses.py is for the losses.
    for part in ("ISR_P", "ISR_N", "CARL"):
        cfg.MODEL.PISA[part].ENABLED = False
    cfg.merge_from_list(options)
    cfg.MODEL.DEVICE = device
    return cfg


def build(cfg: CfgNode, strategy: str) -> nn.Module:
    cfg = cfg.clone()
    if strategy == STOCK:
        cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    else:
        positive, negative = STRATEGIES[strategy]
        cfg.MODEL.ROI_HEADS.POSITIVE_SAMPLER.NAME = positive
        cfg.MODEL.ROI_HEADS.NEGATIVE_SAMPLER.NAME = negative
    torch.manual_seed(0)
    model = build_model(cfg).train()
    # As in the midst of training some proposals are taken for objects, which Score-HLR then ranks.
    nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.3)
    return model


def make_batch(cfg: CfgNode, num_images: int, size: tuple[int, int], objects: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    limits = torch.tensor([size[1], size[0]])
    batch = []
    for _ in range(num_images):
        extent = (0.05 + 0.4 * torch.rand(objects, 2, generator=generator)) * limits
        corner = torch.rand(objects, 2, generator=generator) * (limits - extent)
        instances = Instances(size)
        instances.gt_boxes = Boxes(torch.cat([corner, corner + extent], dim=1))
        classes = torch.randint(cfg.MODEL.ROI_HEADS.NUM_CLASSES, (objects,), generator=generator)
        instances.gt_classes = classes
        image = torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances})
    return batch


class Stopwatch:
    """Adds up the time that functions take, by name."""

    def __init__(self, device: str) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.device = device

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def watch(self, name: str, function: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += self.now() - start

        return timed


def measure_parts(
    model: nn.Module, batch: list[dict], step: Callable, watch: Stopwatch
) -> dict[str, float]:
    """Seconds of each part of sampling in one step, which is slowed down by the measurement."""
    heads = model.roi_heads
    pooler, predictor, sampler = heads.box_pooler, heads.box_predictor, heads.negative_sampler
    own_predict_all = roi_heads.predict_all
    originals = (pooler.forward, heads.box_head.forward, predictor.predict_candidates)

    def predict_all(*args: Any) -> Any:
        pooler.forward = watch.watch("pooling of all proposals", originals[0])
        heads.box_head.forward = watch.watch("box head of all proposals", originals[1])
        try:
            return own_predict_all(*args)
        finally:
            pooler.forward = watch.watch("pooling of the chosen, reused", originals[0])
            heads.box_head.forward = originals[1]

    roi_heads.predict_all = predict_all
    predictor.predict_candidates = watch.watch("losses, scores and boxes", originals[2])
    heads.negative_sampler = watch.watch("choosing negatives", sampler)
    heads.negative_sampler.ranks = sampler.ranks
    try:
        step(model, batch)
    finally:
        roi_heads.predict_all = own_predict_all
        pooler.forward, heads.box_head.forward, predictor.predict_candidates = originals
        heads.negative_sampler = sampler
    return dict(watch.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split()))
    parser.add_argument("--config-file", default=str(CONFIG), help="%(default)s")
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1066), metavar=("H", "W"))
    parser.add_argument("--proposals", type=int, default=1000, help="an image (%(default)s)")
    parser.add_argument("--objects", type=int, default=10, help="an image (%(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="%(default)s by default")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config keys and values")
    args = parser.parse_args()

    proposals = ["MODEL.RPN.POST_NMS_TOPK_TRAIN", args.proposals]
    cfg = setup(args.config_file, [*proposals, *args.opts], args.device)
    batch = make_batch(cfg, args.images, tuple(args.size), args.objects)
    models = {name: build(cfg, name) for name in (STOCK, *STRATEGIES)}
    optimizers = {
        model: torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
        for model in models.values()
    }

    def step(model: nn.Module, batch: list[dict]) -> None:
        losses = model(batch)
        optimizers[model].zero_grad()
        sum(losses.values()).backward()
        optimizers[model].step()

    watch = Stopwatch(args.device)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with EventStorage(), tqdm(total=(args.rounds + 1) * len(models), desc="steps") as progress:
        for i in range(args.rounds + 1):  # the first warms up
            # Shuffled, so that none comes after the same one each time.
            for name in random.Random(i).sample(list(models), len(models)):
                start = watch.now()
                step(models[name], batch)
                if i > 0:
                    seconds[name].append(watch.now() - start)
                progress.update()
        parts = {
            name: measure_parts(models[name], batch, step, Stopwatch(args.device))
            for name in ("hard negatives", "Score-HLR negatives")
        }

    print(
        f"{args.images} images of {args.size[0]} x {args.size[1]}, {args.proposals} proposals and "
        f"{args.objects} objects each, {args.device}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, median of {args.rounds} steps"
    )
    print("| sampling | step, ms | quartiles | ratio to random |\n|---|---|---|---|")
    for name, values in seconds.items():
        low, median, high = statistics.quantiles(values, n=4)
        # Of each round by itself, so that what slows the machine down for a while cancels.
        ratio = statistics.median(
            value / random for value, random in zip(values, seconds["random"], strict=True)
        )
        print(
            f"| {name} | {1e3 * median:.0f} | {1e3 * low:.0f} to {1e3 * high:.0f} | {ratio:.3f} |"
        )
    print(f"\n| part of one step, ms | {' | '.join(parts)} |\n|---|{'---|' * len(parts)}")
    for part in next(iter(parts.values())):
        print(f"| {part} | {' | '.join(f'{1e3 * of[part]:.0f}' for of in parts.values())} |")


if __name__ == "__main__":
    main()
