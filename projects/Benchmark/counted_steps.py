"""
The parts of a training step whose operators and waits are counted: losses and sampling of two-stage
detectors, and labels and losses of RetinaNet, on inputs from fixed seeds.
"""

from collections.abc import Callable
from pathlib import Path

import benchmark_losses
from benchmark_losses import Shape, make_batch
from benchmark_steps import NEGATIVE, POSITIVE, switch
from counting import uncounted

import pisa_d2  # noqa: F401  # isort: skip  (before detectron2: it patches 0.6)

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model, build_roi_heads
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from pisa_d2.config import read_config
from pisa_d2.roi_heads.fast_rcnn import PISAFastRCNNOutputLayers
from pisa_d2.roi_heads.sample_fields import OBJECT_FIELD

RETINANET = Path(__file__).resolve().parents[2] / "configs/BCCD/pisa_retinanet_R_18_FPN.yaml"
NUM_PROPOSALS = 2000
HARD = "MODEL.ROI_HEADS.HARD_SAMPLER.JOINT"
STOCK = "Detectron2"

# Overrides of each row; None for Detectron2's own.
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
    cfg = read_config(str(RETINANET))
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
