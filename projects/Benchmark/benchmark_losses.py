#!/usr/bin/env python3
"""
What PISA's losses cost: one batch through the losses of the box predictor and back, in turn with
Detectron2's own losses, with PISA's and with PISA's written as loops over classes and objects.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import pisa_d2  # isort: skip  (before Detectron2, which it readies)

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou, nms
from tqdm import trange

from pisa_d2.roi_heads.fast_rcnn import OBJECT_FIELD, PISAFastRCNNOutputLayers

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
            self._weigh_positives(scores, deltas, proposals, cls_losses, weights)
            self._weigh_negatives(scores, deltas, proposals, cls_losses, weights)
        losses["loss_cls"] = (weights * cls_losses).mean()
        losses["loss_carl"] = self._carl(scores, deltas, proposals)
        return losses

    def _weigh_positives(self, scores, deltas, proposals, cls_losses, weights) -> None:
        gt_classes = torch.cat([p.gt_classes for p in proposals])
        gt_boxes = torch.cat([p.gt_boxes.tensor for p in proposals])
        objects = torch.cat([p.get(OBJECT_FIELD) for p in proposals])
        positives = (gt_classes < self.num_classes).nonzero()[:, 0]
        boxes = self._boxes(deltas, proposals, positives, gt_classes[positives])
        ious = {
            i: box_iou(box[None], gt_boxes[i : i + 1]).item()
            for i, box in zip(positives.tolist(), boxes, strict=True)
        }
        orders = []
        for class_ in gt_classes[positives].unique():
            order = []
            of_class = positives[gt_classes[positives] == class_]
            for object_ in objects[of_class].unique():
                members = of_class[objects[of_class] == object_].tolist()
                members.sort(key=lambda i: -ious[i])
                order += [(rank, -ious[i], i) for rank, i in enumerate(members)]
            orders.append([i for _, _, i in sorted(order)])
        n_max = max(len(order) for order in orders)
        for order in orders:
            for rank, i in enumerate(order):
                weights[i] = ((n_max - rank) / n_max) ** self.isr_p.gamma
        kept = cls_losses[positives]
        weights[positives] *= kept.sum() / (weights[positives] * kept).sum()

    def _weigh_negatives(self, scores, deltas, proposals, cls_losses, weights) -> None:
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
            kept = nms(boxes, probs[ranked], self.isr_n.nms_thresh)
            groups: dict[int, list[tuple[float, int]]] = {}
            for k, i in enumerate(ranked.tolist()):
                ious = box_iou(boxes[k : k + 1], boxes[kept])[0]
                head = k if k in kept else int(kept[ious > self.isr_n.nms_thresh][0])
                groups.setdefault(head, []).append((-probs[i].item(), i))
            order = []
            for members in groups.values():
                order += [(rank, score, i) for rank, (score, i) in enumerate(sorted(members))]
            last = max(len(order) - 1, 0)
            weights[of_image] = ((n_max - last) / n_max) ** self.isr_n.gamma
            for rank, (_, _, i) in enumerate(sorted(order)):
                weights[i] = ((n_max - rank) / n_max) ** self.isr_n.gamma
        kept_losses = cls_losses[negatives]
        weights[negatives] *= kept_losses.sum() / (weights[negatives] * kept_losses).sum()

    def _carl(self, scores, deltas, proposals) -> Tensor:
        gt_classes = torch.cat([p.gt_classes for p in proposals])
        gt_boxes = torch.cat([p.gt_boxes.tensor for p in proposals])
        boxes = torch.cat([p.proposal_boxes.tensor for p in proposals])
        values, box_losses = [], []
        for i in (gt_classes < self.num_classes).nonzero()[:, 0].tolist():
            own = deltas[i].view(-1, 4)[gt_classes[i]]
            target = self.box2box_transform.get_deltas(boxes[i : i + 1], gt_boxes[i : i + 1])[0]
            box_losses.append(
                F.smooth_l1_loss(own, target, beta=self.smooth_l1_beta, reduction="sum")
            )
            prob = scores[i].softmax(dim=0)[gt_classes[i]]
            values.append(((1 - self.carl.beta) * prob + self.carl.beta) ** self.carl.gamma)
        mean = sum(values) / len(values)
        total = sum(v / mean * loss for v, loss in zip(values, box_losses, strict=True))
        return total / len(scores)

    def _boxes(self, deltas, proposals, rows, classes) -> Tensor:
        boxes = torch.cat([p.proposal_boxes.tensor for p in proposals])[rows]
        own = deltas.view(len(deltas), -1, 4)[rows, classes]
        return self.box2box_transform.apply_deltas(own, boxes)


def make_batch(
    num_images: int, num_samples: int, num_objects: int, num_classes: int, device: str
) -> tuple[list[Instances], Tensor, Tensor]:
    """Sampled proposals, a quarter positive, with logits and deltas as in the midst of training."""
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


def timed(function: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def build_cfg(num_classes: int) -> CfgNode:
    cfg = get_cfg()
    pisa_d2.add_pisa_config(cfg)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = num_classes
    cfg.MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA = 1.0
    return cfg


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split()))
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--samples", type=int, default=512, help="of each image (%(default)s)")
    parser.add_argument("--objects", type=int, default=10, help="in each image (%(default)s)")
    parser.add_argument("--classes", type=int, default=80, help="%(default)s by default")
    parser.add_argument("--rounds", type=int, default=30, help="%(default)s by default")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()

    cfg = build_cfg(args.classes)
    proposals, scores, deltas = make_batch(
        args.images, args.samples, args.objects, args.classes, args.device
    )
    shape = ShapeSpec(channels=CHANNELS)
    predictors = {
        "Detectron2": FastRCNNOutputLayers(cfg, shape),
        "PISA": PISAFastRCNNOutputLayers(cfg, shape),
        "PISA by loops": LoopedPISA(cfg, shape),
    }

    def step(name: str) -> dict[str, Tensor]:
        predictions = scores.requires_grad_(), deltas.requires_grad_()
        losses = predictors[name].losses(predictions, proposals)
        torch.autograd.grad(sum(losses.values()), predictions)
        return losses

    seconds: dict[str, list[float]] = {name: [] for name in predictors}
    with EventStorage():
        by_loops, ours = step("PISA by loops"), step("PISA")
        for name, loss in by_loops.items():
            torch.testing.assert_close(ours[name], loss, rtol=1e-4, atol=1e-5)
        for name in predictors:
            step(name)
        for _ in trange(args.rounds, desc="rounds"):
            for name in predictors:
                seconds[name].append(timed(lambda name=name: step(name), args.device))

    print(
        f"{args.images} x {args.samples} samples, {args.objects} objects an image, {args.classes} "
        f"classes, forward and backward, {args.device}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, median of {args.rounds}"
    )
    plain = statistics.median(seconds["Detectron2"])
    print("| losses | ms | quartiles | ratio to Detectron2 |\n|---|---|---|---|")
    for name, values in seconds.items():
        low, median, high = statistics.quantiles(values, n=4)
        print(
            f"| {name} | {1e3 * median:.2f} | {1e3 * low:.2f} to {1e3 * high:.2f} "
            f"| {median / plain:.2f} |"
        )


if __name__ == "__main__":
    main()
