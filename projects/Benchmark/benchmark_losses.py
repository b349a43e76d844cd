#!/usr/bin/env python3
"""
Measure the cost of PISA's losses: one batch through the losses of the box predictor and back, in
turn with Detectron2's own losses, with PISA's and with PISA's written as loops over classes and
objects.
"""

import argparse
from functools import partial
from typing import NamedTuple

import loops
from timing import Timing, in_turn

import pisa_d2  # isort: skip  (before detectron2: it patches 0.6)

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou

from pisa_d2.roi_heads.fast_rcnn import PISAFastRCNNOutputLayers
from pisa_d2.roi_heads.sample_fields import OBJECT_FIELD

IMAGE_SIZE = (800, 1333)
CHANNELS = 1024


class LoopedPISA(PISAFastRCNNOutputLayers):
    """The same weights, one class, one object and one box at a time."""

    def losses(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> dict[str, Tensor]:
        scores, deltas = predictions
        gt_classes = torch.cat([p.gt_classes for p in proposals])
        losses = FastRCNNOutputLayers.losses(self, predictions, proposals)
        cls_losses = F.cross_entropy(scores, gt_classes, reduction="none")
        weights = torch.ones_like(cls_losses)
        with torch.no_grad():
            self._weigh_positives(deltas, proposals, cls_losses, weights)
            self._weigh_negatives(scores, deltas, proposals, cls_losses, weights)
        losses["loss_cls"] = (weights * cls_losses).mean()
        losses["loss_carl"] = self._carl(scores, deltas, proposals)
        return losses

    def _weigh_positives(
        self,
        deltas: Tensor,
        proposals: list[Instances],
        cls_losses: Tensor,
        weights: Tensor,
    ) -> None:
        assert self.isr_p is not None
        gt_classes = torch.cat([p.gt_classes for p in proposals])
        gt_boxes = torch.cat([p.gt_boxes.tensor for p in proposals])
        objects = torch.cat([p.get(OBJECT_FIELD) for p in proposals])
        positives = (gt_classes < self.num_classes).nonzero()[:, 0]
        boxes = self._boxes(deltas, proposals, positives, gt_classes[positives])
        pairs = zip(boxes, gt_boxes[positives], strict=True)
        ious = torch.cat([box_iou(box[None], gt_box[None])[0] for box, gt_box in pairs])
        classes, kept = gt_classes[positives], cls_losses[positives]
        ranks = loops.hierarchical_local_rank(ious, objects[positives], classes)
        weights[positives] = loops.importance_weights(
            ranks, classes, self.isr_p.gamma, self.isr_p.beta, kept
        )

    def _weigh_negatives(
        self,
        scores: Tensor,
        deltas: Tensor,
        proposals: list[Instances],
        cls_losses: Tensor,
        weights: Tensor,
    ) -> None:
        assert self.isr_n is not None
        gt_classes = torch.cat([p.gt_classes for p in proposals])
        negatives = (gt_classes == self.num_classes).nonzero()[:, 0]
        probs, top = scores.softmax(dim=1)[:, :-1].max(dim=1)
        n_max = max(int((p.gt_classes == self.num_classes).sum()) for p in proposals)
        first = 0
        for p in proposals:
            inside = (negatives >= first) & (negatives < first + len(p))
            first += len(p)
            of_image = negatives[inside]
            ranked = of_image[probs[of_image] > self.isr_n.score_thresh]
            boxes = self._boxes(deltas, proposals, ranked, top[ranked])
            groups = loops.nms_groups(boxes, probs[ranked], self.isr_n.nms_thresh)
            everything = torch.zeros_like(groups)
            ranks = loops.hierarchical_local_rank(probs[ranked], groups, everything)
            last = max(len(ranked) - 1, 0)
            weights[of_image] = ((n_max - last) / n_max) ** self.isr_n.gamma
            for i, rank in zip(ranked.tolist(), ranks.tolist(), strict=True):
                weights[i] = ((n_max - rank) / n_max) ** self.isr_n.gamma
        kept_losses = cls_losses[negatives]
        weights[negatives] *= kept_losses.sum() / (weights[negatives] * kept_losses).sum()

    def _carl(self, scores: Tensor, deltas: Tensor, proposals: list[Instances]) -> Tensor:
        assert self.carl is not None
        gt_classes = torch.cat([p.gt_classes for p in proposals])
        gt_boxes = torch.cat([p.gt_boxes.tensor for p in proposals])
        boxes = torch.cat([p.proposal_boxes.tensor for p in proposals])
        probs, box_losses = [], []
        for i in (gt_classes < self.num_classes).nonzero()[:, 0].tolist():
            own = deltas[i].view(-1, 4)[gt_classes[i]]
            target = self.box2box_transform.get_deltas(boxes[i : i + 1], gt_boxes[i : i + 1])[0]
            box_losses.append(
                F.smooth_l1_loss(own, target, beta=self.smooth_l1_beta, reduction="sum")
            )
            probs.append(scores[i].softmax(dim=0)[gt_classes[i]])
        total = loops.carl(probs, box_losses, self.carl.gamma, self.carl.beta)
        return total / len(scores)

    def _boxes(
        self, deltas: Tensor, proposals: list[Instances], rows: Tensor, classes: Tensor
    ) -> Tensor:
        boxes = torch.cat([p.proposal_boxes.tensor for p in proposals])[rows]
        own = deltas.view(len(deltas), -1, 4)[rows, classes]
        return self.box2box_transform.apply_deltas(own, boxes)


class Shape(NamedTuple):
    """The size of a batch: images, samples and objects per image, and classes."""

    images: int
    samples: int
    objects: int
    classes: int


def make_batch(shape: Shape, device: str) -> tuple[list[Instances], Tensor, Tensor]:
    """Sampled proposals, a quarter positive, with logits and deltas as in the midst of training."""
    num_images, num_samples, num_objects, num_classes = shape
    generator = torch.Generator().manual_seed(0)
    height, width = IMAGE_SIZE
    num_positives = num_samples // 4
    proposals = []
    for image in range(num_images):
        size = 20 + 300 * torch.rand(num_objects, 2, generator=generator)
        corner = torch.rand(num_objects, 2, generator=generator)
        corner = corner * (torch.tensor([width, height]) - size)
        objects = torch.cat([corner, corner + size], dim=1)
        matched = torch.randint(num_objects, (num_samples,), generator=generator)
        # Negatives lie around objects too, only further off.
        shift = torch.where(torch.arange(num_samples) < num_positives, 0.1, 0.6)[:, None]
        noise = 2 * torch.rand(num_samples, 4, generator=generator) - 1
        boxes = objects[matched] + shift * noise * size[matched].repeat(1, 2)
        boxes = torch.cat(
            [torch.minimum(boxes[:, :2], boxes[:, 2:] - 1), boxes[:, 2:].clamp(min=1)], dim=1
        )
        p = Instances(IMAGE_SIZE)
        p.proposal_boxes = Boxes(boxes)
        p.gt_boxes = Boxes(objects[matched])
        classes = torch.randint(num_classes, (num_objects,), generator=generator)
        p.gt_classes = classes[matched]
        p.gt_classes[num_positives:] = num_classes
        p.set(OBJECT_FIELD, matched + image * num_objects)
        proposals.append(p.to(device))
    rows = num_images * num_samples
    scores = torch.randn(rows, num_classes + 1, generator=generator)
    scores[:, -1] += 4  # most negatives are seen as background: about a tenth score above 0.05
    deltas = 0.3 * torch.randn(rows, 4 * num_classes, generator=generator)
    return proposals, scores.to(device), deltas.to(device)


def build_cfg(num_classes: int) -> CfgNode:
    cfg = get_cfg()
    pisa_d2.add_pisa_config(cfg)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = num_classes
    cfg.MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA = 1.0
    return cfg


def run(shape: Shape, rounds: int, device: str) -> dict[str, Timing]:
    """The losses of one batch, forward and backward, after it was checked that they are equal."""
    cfg = build_cfg(shape.classes)
    proposals, scores, deltas = make_batch(shape, device)
    channels = ShapeSpec(channels=CHANNELS)
    predictors = {
        "Detectron2": FastRCNNOutputLayers(cfg, channels),
        "PISA": PISAFastRCNNOutputLayers(cfg, channels),
        "PISA by loops": LoopedPISA(cfg, channels),
    }

    def step(name: str) -> dict[str, Tensor]:
        predictions = scores.requires_grad_(), deltas.requires_grad_()
        losses = predictors[name].losses(predictions, proposals)
        torch.autograd.grad(sum(losses.values()), predictions)
        return losses

    with EventStorage():
        ours = step("PISA")
        for name, loss in step("PISA by loops").items():
            torch.testing.assert_close(ours[name], loss, rtol=1e-4, atol=1e-5)
        functions = {name: partial(step, name) for name in predictors}
        return in_turn(functions, "Detectron2", rounds, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split()))
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--samples", type=int, default=512, help="per image (%(default)s)")
    parser.add_argument("--objects", type=int, default=10, help="per image (%(default)s)")
    parser.add_argument("--classes", type=int, default=80, help="%(default)s by default")
    parser.add_argument("--rounds", type=int, default=30, help="%(default)s by default")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()

    shape = Shape(args.images, args.samples, args.objects, args.classes)
    timings = run(shape, args.rounds, args.device)
    print(
        f"{args.images} x {args.samples} samples, {args.objects} objects per image, {args.classes} "
        f"classes, forward and backward, {args.device}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, median of {args.rounds}"
    )
    print("| losses | ms | quartiles | ratio to Detectron2 |\n|---|---|---|---|")
    for name, (low, median, high, ratio) in timings.items():
        print(
            f"| {name} | {1e3 * median:.2f} | {1e3 * low:.2f} to {1e3 * high:.2f} | {ratio:.2f} |"
        )


if __name__ == "__main__":
    main()
