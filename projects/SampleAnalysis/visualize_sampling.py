#!/usr/bin/env python3
"""
Draw the proposals of an image that each sampling strategy trains on, side by side, and tabulate
the negatives over a dataset.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import pisa_d2  # noqa: F401  # isort: skip  (before detectron2: it patches 0.6)

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.modeling.roi_heads import build_roi_heads
from detectron2.structures import Instances, pairwise_iou
from detectron2.utils.events import EventStorage
from loading import (
    OVERLAP,
    STRATEGIES,
    dataset_of,
    labelled_test_images,
    rgb_image,
    setup,
    with_samplers,
)
from sampling_picture import Samples, draw_samples
from torch import Tensor
from tqdm import tqdm

from pisa_d2.pictures import picture_names
from pisa_d2.regions import TargetsWithRegions, inside_regions
from pisa_d2.roi_heads import PISAMixin


@dataclass
class Totals:
    """Sums over all images seen."""

    num_images: int = 0
    num_positives: int = 0
    num_objects: int = 0
    num_covered: int = 0
    num_regions: int = 0
    num_ignored: int = 0
    ious: list[np.ndarray] = field(default_factory=list)

    def add(self, samples: Samples, num_objects: int) -> None:
        self.num_images += 1
        self.num_positives += len(samples.positives)
        self.num_objects += num_objects
        self.num_covered += len(np.unique(samples.objects))
        self.num_regions += len(samples.regions)
        self.num_ignored += samples.num_ignored
        self.ious.append(samples.negative_ious)


def parse_strategy(text: str) -> tuple[str, tuple[str, str]]:
    """Parse a name in STRATEGIES, or a positive and a negative sampler with a + between them."""
    samplers = STRATEGIES.get(text) or tuple(text.split("+"))
    if len(samplers) != 2:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be one of {list(STRATEGIES)}, or POSITIVE+NEGATIVE sampler, such as "
            "RandomSampler+HardSampler"
        )
    return text, (samplers[0], samplers[1])


def heads_of_strategies(
    cfg: CfgNode, model: GeneralizedRCNN, strategies: dict[str, tuple[str, str]]
) -> dict[str, PISAMixin]:
    """Build the model's ROI heads with the samplers of each strategy."""
    heads = {}
    for name, samplers in strategies.items():
        of_strategy = with_samplers(cfg, *samplers)
        heads[name] = build_roi_heads(of_strategy, model.backbone.output_shape()).to(model.device)
        heads[name].load_state_dict(model.roi_heads.state_dict())
        heads[name].train()
    return heads


@torch.no_grad()
def sample(model: GeneralizedRCNN, heads: dict[str, PISAMixin], inputs: dict) -> dict[str, Samples]:
    """Choose samples by each strategy among the same proposals of one image with its instances."""
    images = model.preprocess_image([inputs])
    features = model.backbone(images.tensor)
    target = inputs["instances"].to(model.device)
    proposals, _ = model.proposal_generator(images, features, [target])
    chosen = {}
    for name, of_strategy in heads.items():
        samples = of_strategy.choose_samples(features, proposals, [target])[0]
        num_ignored = count_ignored(of_strategy, proposals, target)
        chosen[name] = describe(samples, target, of_strategy.num_classes, num_ignored)
    return chosen


def count_ignored(heads: PISAMixin, proposals: list[Instances], target: Instances) -> int:
    if heads.ignored_ioa_thresh is None:
        return 0
    [candidates] = heads.match(proposals, [target])
    regions = target.ignored_regions.tensor
    inside = inside_regions(candidates.boxes, regions, heads.ignored_ioa_thresh)
    return int((inside & (candidates.classes == -1)).sum())


def describe(
    samples: Instances, target: Instances, num_classes: int, num_ignored: int = 0
) -> Samples:
    boxes, positive = samples.proposal_boxes, samples.gt_classes < num_classes
    if len(target):
        ious, objects = pairwise_iou(target.gt_boxes, boxes).max(dim=0)
    else:
        ious, objects = (torch.zeros_like(samples.gt_classes) for _ in range(2))

    def numpy(values: Tensor, rows: Tensor) -> np.ndarray:
        return values[rows].cpu().numpy()

    return Samples(
        numpy(boxes.tensor, positive),
        numpy(objects, positive),
        numpy(ious, positive),
        numpy(boxes.tensor, ~positive),
        numpy(ious, ~positive),
        target.ignored_regions.tensor.cpu().numpy()
        if isinstance(target, TargetsWithRegions)
        else np.zeros((0, 4)),
        num_ignored,
    )


def markdown_table(totals: dict[str, Totals]) -> str:
    has_regions = any(total.num_regions for total in totals.values())
    lines = [
        f"| strategy | negatives per image | IoU above {OVERLAP} | mean IoU "
        "| positives per image | objects with a positive |"
        + " ignored in regions, per image |"
        * has_regions,
        "|---|---|---|---|---|---|" + "---|" * has_regions,
    ]
    for name, total in totals.items():
        ious = np.concatenate(total.ious)
        covered = total.num_covered / max(total.num_objects, 1)
        lines.append(
            f"| {name} | {len(ious) / total.num_images:.0f} | {np.mean(ious > OVERLAP):.1%} "
            f"| {ious.mean():.3f} | {total.num_positives / total.num_images:.1f} | {covered:.1%} |"
            + f" {total.num_ignored / total.num_images:.0f} |"
            * has_regions
        )
    return "\n".join(lines)


def find_image(name: str, paths: list[str]) -> int:
    """
    Return the index of the image of a file name, alone or with folders before it; or the index.

    Raises:
        ValueError: there is none, or several images have the name.
    """
    found = [i for i, path in enumerate(paths) if f"/{path}".endswith(f"/{name.lstrip('/')}")]
    if len(found) > 1:
        raise ValueError(
            f"several images named {name!r}. Add the folder, as in {paths[found[0]]!r} and "
            f"{paths[found[1]]!r}, or give the index, such as {found[0]}."
        )
    if found:
        return found[0]
    if not name.isdecimal():
        raise ValueError(f"no image of the file name {name!r}, such as {Path(paths[0]).name}")
    if int(name) >= len(paths):
        raise ValueError(f"{len(paths)} images: there is no index {name}")
    return int(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split()))
    parser.add_argument("--config-file", required=True, help="of a two-stage detector")
    parser.add_argument("--dataset", help="registered name (the first of DATASETS.TEST)")
    parser.add_argument(
        "--images",
        nargs="+",
        metavar="INDEX_OR_FILE_NAME",
        help="images of the dataset to draw (its first)",
    )
    parser.add_argument("--all", action="store_true", help="tabulate all images of the dataset")
    parser.add_argument(
        "--strategies",
        nargs="+",
        type=parse_strategy,
        default=list(STRATEGIES.items()),
        metavar="STRATEGY",
        help=f"of {', '.join(STRATEGIES)}, or POSITIVE+NEGATIVE sampler",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the samplers")
    parser.add_argument("--output", type=Path, help="folder for the pictures (OUTPUT_DIR/sampling)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config keys and values")
    args = parser.parse_args()

    cfg = setup(args.config_file, args.opts)
    output = args.output or Path(cfg.OUTPUT_DIR) / "sampling"
    output.mkdir(parents=True, exist_ok=True)
    model = build_model(cfg).train()
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    heads = heads_of_strategies(cfg, model, dict(args.strategies))

    dataset = dataset_of(cfg, args.dataset)
    records = get_detection_dataset_dicts([dataset], filter_empty=False)
    paths = [record["file_name"] for record in records]
    try:
        drawn = {find_image(name, paths) for name in args.images or ["0"]}
    except ValueError as error:
        parser.error(f"{dataset} has {error}")
    pictures = [f"{name}.png" for name in picture_names(paths)]
    mapper = labelled_test_images(cfg)

    torch.manual_seed(args.seed)
    totals = {name: Totals() for name in heads}
    with EventStorage():
        for i in tqdm(range(len(records)) if args.all else sorted(drawn), desc="images"):
            inputs = mapper(records[i])
            samples = sample(model, heads, inputs)
            for name, of_strategy in samples.items():
                totals[name].add(of_strategy, len(inputs["instances"]))
            if i in drawn:
                path = output / pictures[i]
                image = rgb_image(inputs, cfg)
                highest = cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS[0]
                draw_samples(image, samples, highest).savefig(path)
    print(markdown_table(totals))
    print(f"{output}: {', '.join(pictures[i] for i in sorted(drawn))}")


if __name__ == "__main__":
    main()
