"""
Prime Sample Attention over the positives of a batch, for every kind of detector: ISR-P and CARL
(https://arxiv.org/abs/1904.04821).

Shape shorthand in this module:

    P: number of positives of all images
"""

from dataclasses import dataclass

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from torch import Tensor

from .boxes import box_iou
from .isr import positive_weights
from .reweighting import carl_weights
from .scalars import log_positives
from .settings import CARL, ISR


@dataclass(frozen=True)
class Positives:
    """
    The positives of a batch; boxes are XYXY in pixels.

    Attributes:
        boxes: floating (P, 4), the proposals, anchors or default boxes.
        gt_boxes: floating (P, 4), the boxes of the matched objects.
        objects: int64 (P,), the matched object, unique over the batch; read by ISR-P alone.
        classes: int64 (P,), its class.
        deltas: floating (P, 4), predicted for that class.
        probs: floating (P,), predicted probability of that class, with gradient.
        cls_losses, box_losses: floating (P,), with gradient.
    """

    boxes: Tensor
    gt_boxes: Tensor
    objects: Tensor
    classes: Tensor
    deltas: Tensor
    probs: Tensor
    cls_losses: Tensor
    box_losses: Tensor


@torch.no_grad()
def isr_p_weights(isr: ISR, positives: Positives, box2box_transform: Box2BoxTransform) -> Tensor:
    """
    Weights of the positives' classification losses by the IoU of their regressed boxes.

    Returns:
        (P,), keeping the sum of the losses.
    """
    boxes = box2box_transform.apply_deltas(positives.deltas, positives.boxes)
    ious = box_iou(boxes, positives.gt_boxes)
    weights = positive_weights(
        ious,
        positives.objects,
        positives.classes,
        positives.cls_losses,
        gamma=isr.gamma,
        beta=isr.beta,
        n_max=isr.n_max,
    )
    log_positives(ious, positives.objects, positives.probs, weights)
    return weights


def carl_loss(carl: CARL, positives: Positives) -> Tensor:
    """
    Returns:
        (), the classification-aware regression loss summed over the positives.
    """
    weights = carl_weights(positives.probs, carl.gamma, carl.beta)
    return carl.loss_weight * (weights * positives.box_losses).sum()
