#!/usr/bin/env python3
"""
How many operators and waits each part of the package adds to a step, on the path of a GPU, at 2 and
at 16 images. The numbers are exact and the same on every machine: they are counted on a CPU.
"""

import argparse
import csv
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import benchmark_losses
import yaml
from benchmark_losses import Shape, make_batch
from benchmark_steps import NEGATIVE, POSITIVE, build, setup, switch
from benchmark_steps import make_batch as make_images
from counting import Counts, count, uncounted
from timing import peak_memory

import pisa_d2  # isort: skip  (before Detectron2, which it readies)

import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model, build_roi_heads
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from pisa_d2.roi_heads.fast_rcnn import PISAFastRCNNOutputLayers
from pisa_d2.roi_heads.sample_fields import OBJECT_FIELD

HERE = Path(__file__).resolve().parent
BOUNDS, WAITS = HERE / "bounds.yaml", HERE / "waits.yaml"
CONFIGS = HERE.parents[1] / "configs"
NUM_IMAGES = (2, 16)
NUM_PROPOSALS = 2000
FASTER_RCNN = CONFIGS / "BCCD/pisa_faster_rcnn_R_18_FPN.yaml"
RETINANET = CONFIGS / "BCCD/pisa_retinanet_R_18_FPN.yaml"
HARD = "MODEL.ROI_HEADS.HARD_SAMPLER.JOINT"
STOCK = "Detectron2"

LOSSES: dict[str, list | None] = {
    STOCK: None,
    "ISR-P": switch("ISR_P"),
    "ISR-N": switch("ISR_N"),
    "CARL": switch("CARL"),
    "PISA": switch("ISR_P", "ISR_N", "CARL"),
}
SAMPLING: dict[str, list | None] = {
    STOCK: None,
    "random": [],
    "IoU-balanced negatives": [NEGATIVE, "IoUBalancedSampler"],
    "instance-balanced positives": [POSITIVE, "InstanceBalancedSampler"],
    "hard negatives": [NEGATIVE, "HardSampler"],
    "Score-HLR negatives": [NEGATIVE, "ScoreHLRSampler"],
    "IoU-HLR positives": [POSITIVE, "IoUHLRSampler"],
    "OHEM": [POSITIVE, "HardSampler", NEGATIVE, "HardSampler", HARD, True],
}
RETINANET_LOSSES: dict[str, list | None] = {
    STOCK: None,
    "ISR-P": switch("ISR_P"),
    "PISA": switch("ISR_P", "CARL"),
}


class Row(NamedTuple):
    """What is counted of ``what``; ``added`` are operators beyond Detectron2's own."""

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


class _Predicted(nn.Module):
    """A box head whose predictions are there already: only what is done with them is counted."""

    output_size = (7, 7)

    def __init__(self, scores: Tensor, deltas: Tensor) -> None:
        super().__init__()
        self.scores, self.deltas = scores, deltas
        self.start = 0

    def forward(self, features: list[Tensor], boxes: list[Boxes]) -> Tensor:
        with uncounted():
            self.start += (num := sum(len(b) for b in boxes))
            return torch.arange(self.start - num, self.start, device=self.scores.device)

    def predict(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        with uncounted():
            return self.scores[rows], self.deltas[rows]


def losses_of(options: list | None, num_images: int, device: str = "cpu") -> Callable[[], None]:
    """The losses of the box predictor, forward and backward."""
    cfg = benchmark_losses.build_cfg(80)
    cfg.merge_from_list(options or [])
    proposals, scores, deltas = make_batch(Shape(num_images, 512, 10, 80), device)
    cls = FastRCNNOutputLayers if options is None else PISAFastRCNNOutputLayers
    predictor = cls(cfg, ShapeSpec(channels=8))
    predictions = scores.requires_grad_(), deltas.requires_grad_()

    def step() -> None:
        losses = predictor.losses(predictions, proposals)
        torch.autograd.grad(sum(losses.values()), predictions)

    return step


def sampling_of(options: list | None, num_images: int, device: str = "cpu") -> Callable[[], None]:
    """``label_and_sample_proposals`` without the pass of the box head."""
    cfg = benchmark_losses.build_cfg(80)
    name = "StandardROIHeads" if options is None else "PISAROIHeads"
    cfg.merge_from_list(["MODEL.ROI_HEADS.NAME", name, *(options or [])])
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2"]
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC, cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 1, 8
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    samples, scores, deltas = make_batch(Shape(num_images, NUM_PROPOSALS + 10, 10, 80), device)
    proposals, targets = [], []
    for p in samples:
        target = Instances(p.image_size)
        positives = p[p.gt_classes < 80]
        ids = positives.get(OBJECT_FIELD)
        objects = torch.stack([(ids == i).nonzero()[0, 0] for i in ids.unique()])
        target.gt_boxes, target.gt_classes = (
            positives.gt_boxes[objects],
            positives.gt_classes[objects],
        )
        targets.append(target)
        proposed = Instances(p.image_size)
        proposed.proposal_boxes = p.proposal_boxes[: len(p) - len(target)]
        proposed.objectness_logits = torch.zeros(len(proposed), device=device)
        proposals.append(proposed)
    heads = build_roi_heads(cfg, {"p2": ShapeSpec(channels=256, stride=4)}).train()
    predicted = _Predicted(scores, deltas)
    heads.box_pooler, heads.box_head = predicted, nn.Identity()
    heads.box_predictor.forward = predicted.predict
    features = {"p2": torch.zeros(num_images, 256, 1, 1, device=device)}

    def step() -> None:
        predicted.start = 0
        torch.manual_seed(0)
        if options is None:
            heads.label_and_sample_proposals(proposals, targets)
        else:
            heads.choose_samples(features, proposals, targets)

    return step


def retinanet_of(options: list | None, num_images: int, device: str = "cpu") -> Callable[[], None]:
    """Labels of anchors, and losses, forward and backward."""
    cfg = get_cfg()
    pisa_d2.add_pisa_config(cfg)
    cfg.merge_from_file(str(RETINANET))
    stock = ["MODEL.META_ARCHITECTURE", "RetinaNet"]
    cfg.merge_from_list(["MODEL.DEVICE", device, *(stock if options is None else options)])
    model = build_model(cfg).train()
    generator = torch.Generator().manual_seed(0)
    size, strides = 128, (8, 16, 32, 64, 128)
    features = [torch.zeros(num_images, 1, size // s, size // s, device=device) for s in strides]
    predictions = [
        [
            (torch.randn(num_images, layer.out_channels, *f.shape[2:], generator=generator) / 4)
            .sub(shift)
            .to(device)
            .requires_grad_()
            for f in features
        ]
        for layer, shift in ((model.head.cls_score, 2), (model.head.bbox_pred, 0))
    ]
    targets = []
    for _ in range(num_images):
        corners = torch.rand(5, 2, generator=generator) * 64
        sizes = 16 + 48 * torch.rand(5, 2, generator=generator)
        target = Instances((size, size))
        target.gt_boxes = Boxes(torch.cat([corners, corners + sizes], dim=1))
        target.gt_classes = torch.randint(model.num_classes, (5,), generator=generator)
        targets.append(target.to(device))
    pixels = torch.zeros(num_images, 3, size, size, device=device)
    images = ImageList(pixels, [(size, size)] * num_images)

    def step() -> None:
        losses = model.forward_training(images, features, predictions, targets)
        torch.autograd.grad(sum(losses.values()), [x for level in predictions for x in level])

    return step


SECTIONS: dict[str, tuple[Callable[..., Callable[[], None]], dict[str, list | None]]] = {
    "losses": (losses_of, LOSSES),
    "sampling": (sampling_of, SAMPLING),
    "RetinaNet": (retinanet_of, RETINANET_LOSSES),
}
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
    """The row of these counts beside those of Detectron2's own."""
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
    """What exceeds its bound in bounds.yaml, a line each."""
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
        waits = (f"{times:5d} {place}" for place, times in counts.waits.items())
        print(counts.num_waits, "waits", *waits, sep="\n")
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
