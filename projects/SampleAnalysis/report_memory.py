#!/usr/bin/env python3
"""Measure the memory that the evaluation in a report takes, on made-up objects and detections."""

import argparse
import resource

import pisa_d2  # noqa: F401  # isort: skip  (before detectron2: it patches 0.6)

import numpy as np
import torch
from coco_scores import evaluate
from dataset_detections import Detections
from detectron2.structures import Boxes, Instances
from mistakes import describe_images, most_different
from pycocotools.coco import COCO
from resampling import bootstrap

from pisa_d2.evaluation import index_coco

# Per image, as in COCO and LVIS.
NUM_OBJECTS = 7


def make_objects(num_images: int, num_classes: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Boxes (N, 4), XYWH in pixels, and classes (N,) of each image, the first class most often."""
    generator = np.random.default_rng(0)
    share = 1 / (20 + np.arange(1, num_classes + 1))
    boxes, classes = [], []
    for _ in range(num_images):
        num = generator.poisson(NUM_OBJECTS)
        corners, sizes = generator.uniform(0, 400, (num, 2)), generator.uniform(10, 200, (num, 2))
        boxes.append(np.concatenate([corners, sizes], axis=1))
        classes.append(generator.choice(num_classes, num, p=share / share.sum()))
    return boxes, classes


def truth_of(boxes: list[np.ndarray], classes: list[np.ndarray], num_classes: int) -> COCO:
    of_images = [
        {
            "image_id": image,
            "category_id": class_ + 1,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": 0,
        }
        for image, parts in enumerate(zip(boxes, classes, strict=True))
        for box, class_ in zip(*(part.tolist() for part in parts), strict=True)
    ]
    return index_coco(
        {
            "images": [{"id": image} for image in range(len(boxes))],
            "categories": [{"id": class_ + 1} for class_ in range(num_classes)],
            "annotations": [{**a, "id": i} for i, a in enumerate(of_images, start=1)],
        }
    )


def make_run(
    boxes: list[np.ndarray], classes: list[np.ndarray], num_classes: int, num: int, seed: int
) -> Detections:
    """``num`` detections per image, half of them near its objects."""
    generator = np.random.default_rng(seed)
    run = Detections()
    for image, (own_boxes, own_classes) in enumerate(zip(boxes, classes, strict=True)):
        near = generator.integers(0, max(len(own_boxes), 1), num // 2 if len(own_boxes) else 0)
        rest = num - len(near)
        corners, sizes = generator.uniform(0, 400, (rest, 2)), generator.uniform(10, 200, (rest, 2))
        moved = own_boxes[near] + generator.normal(0, 8, (len(near), 4))
        found = np.concatenate([moved, np.concatenate([corners, sizes], axis=1)])
        found[:, 2:] = found[:, :2] + np.abs(found[:, 2:]) + 1
        detections = Instances((600, 600))
        detections.pred_boxes = Boxes(torch.tensor(found, dtype=torch.float32))
        labels = np.concatenate([own_classes[near], generator.integers(0, num_classes, rest)])
        detections.pred_classes = torch.tensor(labels.astype(np.int64))
        detections.scores = torch.tensor(generator.random(num), dtype=torch.float32)
        run.add(detections, image)
    return run


def tell(what: str) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts KiB
    print(f"{what}: at most {peak:.2f} GB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=5000, help="(%(default)s)")
    parser.add_argument("--classes", type=int, default=80, help="(%(default)s)")
    parser.add_argument("--detections", type=int, default=100, help="per image (%(default)s)")
    args = parser.parse_args()
    tell("imports")
    boxes, classes = make_objects(args.images, args.classes)
    truth = truth_of(boxes, classes, args.classes)
    runs = [make_run(boxes, classes, args.classes, args.detections, seed) for seed in (1, 2)]
    tell("detections of two runs")
    ids = list(range(1, args.classes + 1))
    evaluations = [evaluate(truth, run, range(args.images), ids) for run in runs]
    tell("evaluations")
    most_different(describe_images(evaluations[0]), describe_images(evaluations[1]), 3)
    bootstrap(evaluations, 5, 0)
    tell("bootstrap")


if __name__ == "__main__":
    main()
