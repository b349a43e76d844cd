#!/usr/bin/env python3
"""
Draw the weight of each positive of one test image: in plain training, under ISR-P and in CARL.
Reads the folder that a run of train_net.py with PISA wrote.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import pisa_d2  # noqa: F401  # isort: skip  (before detectron2: it patches 0.6)

import numpy as np
import torch
from box_drawing import draw_boxes, show_image
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.utils.events import EventStorage
from loading import dataset_of, labelled_test_images, rgb_image, setup
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from pisa_d2.attention import isr_p_weights
from pisa_d2.boxes import box_iou
from pisa_d2.reweighting import carl_weights

HIGHEST = 3.0  # weight at the end of the colour scale


@dataclass
class WeightedBoxes:
    """The positives of one image: (P, 4) regressed boxes in pixels; (P,) IoU and weights."""

    boxes: np.ndarray
    ious: np.ndarray
    isr_p: np.ndarray
    carl: np.ndarray


def load_model(output_dir: Path) -> tuple[CfgNode, GeneralizedRCNN]:
    cfg = setup(str(output_dir / "config.yaml"), ["MODEL.DEVICE", "cpu"])
    model = build_model(cfg)
    DetectionCheckpointer(model, save_dir=str(output_dir)).resume_or_load("", resume=True)
    return cfg, model


@torch.no_grad()
def weigh_positives(model: GeneralizedRCNN, inputs: dict) -> WeightedBoxes:
    """
    Args:
        model: a GeneralizedRCNN with PISA's heads.
        inputs: one image with instances, as the model is trained on.
    """
    model.train()
    heads = model.roi_heads
    predictor = heads.box_predictor
    with EventStorage():
        images = model.preprocess_image([inputs])
        features = model.backbone(images.tensor)
        targets = [inputs["instances"]]
        proposals, _ = model.proposal_generator(images, features, targets)
        sampled = heads.choose_samples(features, proposals, targets)[0]
        pooled = heads.box_pooler(
            [features[name] for name in heads.box_in_features], [sampled.proposal_boxes]
        )
        positives = predictor.positives(predictor(heads.box_head(pooled)), [sampled])
        transform, carl = predictor.box2box_transform, predictor.carl
        weights = isr_p_weights(predictor.isr_p, positives, transform)
    boxes = transform.apply_deltas(positives.deltas, positives.boxes)
    return WeightedBoxes(
        boxes.numpy(),
        box_iou(boxes, positives.gt_boxes).numpy(),
        weights.numpy(),
        carl_weights(positives.probs, carl.gamma, carl.beta).numpy(),
    )


def draw(image: np.ndarray, positives: WeightedBoxes, path: Path) -> None:
    panels = {
        "plain: all positives have weight 1": np.ones(len(positives.boxes)),
        "ISR-P: most weight for the best of each object": positives.isr_p,
        "CARL: most weight in the box loss for the surest": positives.carl,
    }
    figure = Figure(figsize=(15, 3.8), dpi=100, layout="constrained")
    scale = ScalarMappable(Normalize(0, HIGHEST), "plasma")
    axes_of_panels = figure.subplots(1, len(panels))
    for axes, (title, weights) in zip(axes_of_panels, panels.items(), strict=True):
        show_image(axes, image, alpha=0.6)
        axes.set_title(title)
        order = np.argsort(weights)
        widths = 0.6 + 1.2 * weights[order].clip(max=HIGHEST)
        draw_boxes(axes, positives.boxes[order], scale.to_rgba(weights[order]), widths)
    figure.colorbar(scale, ax=axes_of_panels, label="weight", extend="max", shrink=0.8)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split()))
    parser.add_argument("output_dir", type=Path, help="OUTPUT_DIR of a run with PISA")
    parser.add_argument("--image", type=int, default=0, help="index in the test dataset")
    parser.add_argument("--seed", type=int, default=0, help="of the sampler")
    args = parser.parse_args()

    cfg, model = load_model(args.output_dir)
    record = DatasetCatalog.get(dataset_of(cfg))[args.image]
    inputs = labelled_test_images(cfg)(record)
    torch.manual_seed(args.seed)
    positives = weigh_positives(model, inputs)
    path = args.output_dir / "weights.png"
    draw(rgb_image(inputs, cfg), positives, path)
    print(path)


if __name__ == "__main__":
    main()
