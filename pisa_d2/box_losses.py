import torch
from detectron2.layers import ciou_loss, diou_loss
from detectron2.modeling.box_regression import Box2BoxTransform
from fvcore.nn import giou_loss, smooth_l1_loss
from torch import Tensor

_IOU_LOSSES = {"giou": giou_loss, "diou": diou_loss, "ciou": ciou_loss}


def box_regression_losses(
    pred_deltas: Tensor,
    boxes: Tensor,
    gt_boxes: Tensor,
    box2box_transform: Box2BoxTransform,
    loss_type: str,
    smooth_l1_beta: float,
) -> Tensor:
    """
    Detectron2's box loss before it is summed, one number a box.

    Args:
        pred_deltas: floating (N, 4); class-specific ones are those of the ground-truth class.
        boxes: floating (N, 4), the proposals or anchors that the deltas move, XYXY in pixels.
        gt_boxes: floating (N, 4), the boxes of their objects.
        loss_type: "smooth_l1" (on deltas, summed over the four), "giou", "diou" or "ciou" (on
            decoded boxes).
        smooth_l1_beta: where smooth L1 turns from quadratic to linear, in deltas.

    Returns:
        (N,)

    Raises:
        ValueError: ``loss_type`` is none of these.
    """
    if loss_type == "smooth_l1":
        gt_deltas = box2box_transform.get_deltas(boxes, gt_boxes)
        return smooth_l1_loss(pred_deltas, gt_deltas, smooth_l1_beta, reduction="none").sum(dim=1)
    if loss_type not in _IOU_LOSSES:
        raise ValueError(
            f"BBOX_REG_LOSS_TYPE = {loss_type!r} is not known: choose one of "
            f"{['smooth_l1', *_IOU_LOSSES]}."
        )
    pred_boxes = box2box_transform.apply_deltas(pred_deltas, boxes)
    # These losses assert that corners are in order. NaN is not: it becomes the loss, which the
    # trainer then reports with its name and the iteration.
    broken = pred_boxes.isnan().any(dim=1)
    pred_boxes = torch.where(broken[:, None], gt_boxes.to(pred_boxes.dtype), pred_boxes)
    losses = _IOU_LOSSES[loss_type](pred_boxes, gt_boxes, reduction="none")
    return losses.masked_fill(broken, float("nan"))
