"""
Losses of single samples, and predictions for samplers.

Shape shorthand in this module:

    R: number of samples
    T: number of candidates
    K: number of foreground classes
"""

from collections.abc import Collection

import torch
from detectron2.layers import nonzero_tuple
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from torch import Tensor
from torch.nn import functional as F

from ..box_losses import box_regression_losses
from ..boxes import box_iou
from ..ordering import at_least_float32
from ..samplers import Predictions
from ..samplers.candidates import is_positive
from ..settings import BalancedL1


class PredictingOutputLayers(FastRCNNOutputLayers):
    """
    The stock box predictor with losses of single samples and predictions for samplers.

    Attributes:
        focal_gamma: exponent of softmax focal loss, None for cross entropy.
        balanced_l1: settings of the ``box_reg_loss_type`` "balanced_l1", None for the published
            settings.
    """

    focal_gamma: float | None = None
    balanced_l1: BalancedL1 | None = None

    def _box_losses(self, deltas: Tensor, boxes: Tensor, gt_boxes: Tensor) -> Tensor:
        return box_regression_losses(
            deltas,
            boxes,
            gt_boxes,
            self.box2box_transform,
            self.box_reg_loss_type,
            self.smooth_l1_beta,
            self.balanced_l1,
        )

    def classification_losses(self, scores: Tensor, gt_classes: Tensor) -> Tensor:
        """
        Compute the stock classification loss (softmax, or sigmoid with or without federated loss
        on Detectron2 main) or focal loss (https://arxiv.org/abs/1708.02002, over the softmax),
        before it is averaged.

        Args:
            scores: logits (R, K + 1).
            gt_classes: int64 (R,), in [0, K].

        Returns:
            (R,), at least float32.
        """
        scores = at_least_float32(scores)
        if not getattr(self, "use_sigmoid_ce", False):
            losses = F.cross_entropy(scores, gt_classes, reduction="none")
            if self.focal_gamma is None:
                return losses
            # 1 - p of the true class. The power of an exact 0 may have no finite gradient.
            miss = (-torch.expm1(-losses)).clamp(min=torch.finfo(losses.dtype).tiny)
            return miss**self.focal_gamma * losses
        targets = F.one_hot(gt_classes, self.num_classes + 1)[:, :-1].to(scores.dtype)
        losses = F.binary_cross_entropy_with_logits(scores[:, :-1], targets, reduction="none")
        if self.use_fed_loss:
            classes = self.get_fed_loss_classes(
                gt_classes,
                num_fed_loss_classes=self.fed_loss_num_classes,
                num_classes=self.num_classes,
                weight=self.fed_loss_cls_weights,
            )
            in_loss = losses.new_zeros(self.num_classes + 1).index_fill(0, classes, 1)
            losses = losses * in_loss[:-1]
        return losses.sum(dim=1)

    def _probs(self, scores: Tensor) -> Tensor:
        scores = at_least_float32(scores)
        if getattr(self, "use_sigmoid_ce", False):
            return scores.sigmoid()
        return scores.softmax(dim=1)

    @torch.no_grad()
    def predict_candidates(
        self,
        predictions: tuple[Tensor, Tensor],
        proposal_boxes: Tensor,
        gt_boxes: Tensor,
        gt_classes: Tensor,
        needs: Collection[str] = Predictions.FIELDS,
    ) -> Predictions:
        """
        Make the predictions for T candidates that samplers need.

        Args:
            predictions: logits (T, K + 1) and deltas (T, K * 4) or (T, 4).
            proposal_boxes, gt_boxes: floating (T, 4), the second of the matched objects, XYXY in
                pixels.
            gt_classes: int64 (T,), in [0, K], or -1 for candidates that are ignored.
            needs: names of the predictions to make.
        """
        logits, deltas = predictions
        positive = is_positive(gt_classes, self.num_classes)
        found: dict[str, Tensor] = {}
        if "cls_losses" in needs:
            labels = torch.where(gt_classes < 0, self.num_classes, gt_classes)
            found["cls_losses"] = self.classification_losses(logits, labels)
        if "box_losses" in needs:
            # A copy to the host: most candidates are negative, and their boxes may be anything.
            rows = nonzero_tuple(positive)[0]
            own = self._deltas_of_classes(deltas, rows, gt_classes[rows])
            losses = self._box_losses(own, proposal_boxes[rows], gt_boxes[rows])
            losses = losses * self.loss_weight.get("loss_box_reg", 1.0)
            none = torch.zeros_like(gt_classes, dtype=losses.dtype)
            found["box_losses"] = none.index_copy(0, rows, losses)
        if not {"scores", "boxes", "ious"}.isdisjoint(needs):
            probs = self._probs(logits)
            found["scores"], top_classes = probs[:, : self.num_classes].max(dim=1)
        if not {"boxes", "ious"}.isdisjoint(needs):
            classes = torch.where(positive, gt_classes, top_classes)
            rows = torch.arange(len(classes), device=classes.device)
            own = self._deltas_of_classes(deltas, rows, classes)
            found["boxes"] = self.box2box_transform.apply_deltas(own, proposal_boxes)
        if "ious" in needs:
            found["ious"] = box_iou(found["boxes"], gt_boxes)
        return Predictions(**{name: found[name] for name in Predictions.FIELDS if name in needs})

    def _deltas_of_classes(self, deltas: Tensor, rows: Tensor, classes: Tensor) -> Tensor:
        """Select the deltas (len(rows), 4) of some rows, each for its class."""
        if deltas.shape[1] == 4:  # class-agnostic
            return deltas[rows]
        return deltas.view(-1, self.num_classes, 4)[rows, classes]
