"""Box losses before they are summed, Detectron2's and balanced L1."""

import math
from dataclasses import astuple

import torch
from detectron2.layers import ciou_loss, diou_loss
from detectron2.modeling.box_regression import Box2BoxTransform
from fvcore.nn import giou_loss, smooth_l1_loss
from torch import Tensor

from .ordering import at_least_float32
from .settings import BalancedL1

# The type of box loss that Detectron2 itself does not have.
BALANCED_L1 = "balanced_l1"

_IOU_LOSSES = {"giou": giou_loss, "diou": diou_loss, "ciou": ciou_loss}


def balanced_l1_loss(
    input: Tensor, target: Tensor, alpha: float, gamma: float, beta: float
) -> Tensor:
    """
    Compute balanced L1 of Libra R-CNN (https://arxiv.org/abs/1904.02701), elementwise. For the
    error ``x = |input - target|`` its gradient is::

        alpha ln(b x / beta + 1)  for x < beta,   gamma  from there on,

    with b such that the two meet: ``alpha ln(b + 1) = gamma``. So errors below beta weigh more than
    in smooth L1, and no error weighs more than gamma. The loss is 0 without an error; above 0 it is
    the integral of the gradient::

        alpha / b (b x + beta) ln(b x / beta + 1) - alpha x,   gamma x + gamma beta / b - alpha beta

    Args:
        input, target: floating, of the same shape.
        alpha: above 0, scales the gradient of small errors.
        gamma: above 0, the gradient of large errors.
        beta: above 0, in units of the input, the error from which the gradient is constant.

    Returns:
        The same shape, at least float32.
    """
    b = math.expm1(gamma / alpha)
    errors = at_least_float32(input - target).abs()
    # Clamped, or errors too large for the first form would spoil the gradient of the second.
    u = b * (errors / beta).clamp(max=1)
    inlier = alpha * beta / b * ((1 + u) * u.log1p() - u)
    outlier = gamma * errors + (gamma / b - alpha) * beta
    return torch.where(errors < beta, inlier, outlier)


def box_regression_losses(
    pred_deltas: Tensor,
    boxes: Tensor,
    gt_boxes: Tensor,
    box2box_transform: Box2BoxTransform,
    loss_type: str,
    smooth_l1_beta: float,
    balanced_l1: BalancedL1 | None = None,
) -> Tensor:
    """
    Compute Detectron2's box loss, or balanced L1, before the sum over boxes.

    Args:
        pred_deltas: floating (N, 4); if they are class-specific, for the ground-truth class.
        boxes: floating (N, 4), the proposals or anchors that the deltas move, XYXY in pixels.
        gt_boxes: floating (N, 4), the boxes of their objects.
        loss_type: "smooth_l1" or "balanced_l1" (on deltas, summed over the four), "giou", "diou"
            or "ciou" (on decoded boxes).
        smooth_l1_beta: the error in deltas from which smooth L1 or balanced L1 is linear; above 0
            for balanced L1.
        balanced_l1: settings of balanced L1, None for the published settings.

    Returns:
        (N,), one loss per box.

    Raises:
        ValueError: ``loss_type`` is none of these.
    """
    if loss_type == "smooth_l1":
        gt_deltas = box2box_transform.get_deltas(boxes, gt_boxes)
        return smooth_l1_loss(pred_deltas, gt_deltas, smooth_l1_beta, reduction="none").sum(dim=1)
    if loss_type == BALANCED_L1:
        gt_deltas = box2box_transform.get_deltas(boxes, gt_boxes)
        alpha, gamma = astuple(balanced_l1 or BalancedL1())
        return balanced_l1_loss(pred_deltas, gt_deltas, alpha, gamma, smooth_l1_beta).sum(dim=1)
    if loss_type not in _IOU_LOSSES:
        raise ValueError(
            f"BBOX_REG_LOSS_TYPE = {loss_type!r} is not known: choose one of "
            f"{['smooth_l1', BALANCED_L1, *_IOU_LOSSES]}."
        )
    pred_boxes = box2box_transform.apply_deltas(pred_deltas, boxes)
    # These losses assert that corners are in order. NaN is not: it becomes the loss, which the
    # trainer then reports with its name and the iteration.
    broken = pred_boxes.isnan().any(dim=1)
    pred_boxes = torch.where(broken[:, None], gt_boxes.to(pred_boxes.dtype), pred_boxes)
    losses = _IOU_LOSSES[loss_type](pred_boxes, gt_boxes, reduction="none")
    return losses.masked_fill(broken, float("nan"))
