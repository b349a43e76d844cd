#!/usr/bin/env python3
"""Write weights of torchvision, downloaded or from a file, as a checkpoint for SSD."""

import argparse
from pathlib import Path

import pisa_d2  # noqa: F401  # isort: skip  (before detectron2: it patches 0.6)

import torch
from detectron2.config import get_cfg
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from ssd import DefaultBoxes, add_ssd_config, convert_torchvision
from torchvision.models import get_model_weights

WEIGHTS = {"vgg16": "IMAGENET1K_FEATURES", "vgg16_bn": "IMAGENET1K_V1", "ssd300_vgg16": "COCO_V1"}
# The labels, of COCO's 90, that have objects.
COCO_LABELS = [category["id"] for category in COCO_CATEGORIES if category["isthing"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=WEIGHTS, help="the model of the weights")
    parser.add_argument("output", type=Path, help="the checkpoint, a .pth file")
    parser.add_argument("--file", type=Path, help="torchvision's file; downloaded if not given")
    args = parser.parse_args()
    if args.file is None:
        state_dict = get_model_weights(args.name)[WEIGHTS[args.name]].get_state_dict()
    else:
        state_dict = torch.load(args.file, map_location="cpu", weights_only=True)
    cfg = get_cfg()
    add_ssd_config(cfg)
    ssd = cfg.MODEL.SSD
    boxes = DefaultBoxes(ssd.IMAGE_SIZE, ssd.SCALES, ssd.STEPS, ssd.ASPECT_RATIOS)
    weights = convert_torchvision(state_dict, boxes.num_boxes(), COCO_LABELS)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": weights}, args.output)
    print(f"{len(weights)} tensors in {args.output}")


if __name__ == "__main__":
    main()
