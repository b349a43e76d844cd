"""
RetinaNet with Prime Sample Attention.

Shape shorthand in this module:

    B: number of images
    R: number of anchors per image, of all feature levels
    V: number of anchors of all images, without ignored ones
    P: number of positives among them
    K: number of foreground classes
"""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import cat, nonzero_tuple
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from fvcore.nn import sigmoid_focal_loss_jit
from torch import Tensor

from ..attention import Positives, carl_loss, isr_p_weights
from ..box_losses import BALANCED_L1, box_regression_losses
from ..config import balanced_l1_settings, ignored_ioa_thresh, pisa_settings
from ..ordering import at_least_float32
from ..regions import ignore_inside, warn_of_gaps
from ..scalars import log_ignored
from ..settings import CARL, ISR, BalancedL1, check_ioa_thresh, check_positive


@META_ARCH_REGISTRY.register()
class PISARetinaNet(RetinaNet):
    """
    :class:`RetinaNet` with ISR-P and CARL of Prime Sample Attention
    (https://arxiv.org/abs/1904.04821), and with balanced L1. One-stage detectors have no ISR-N, so
    ``MODEL.PISA.ISR_N`` is ignored.

    Parameters and inference do not change. With both parts off, the losses equal the stock model's.
    """

    ignores_regions = True

    @configurable
    def __init__(
        self,
        *,
        isr_p: ISR | None = ISR(),
        carl: CARL | None = CARL(),
        balanced_l1: BalancedL1 | None = None,
        ignored_ioa_thresh: float | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            isr_p: reweighting of positives by IoU-HLR, None for off.
            carl: the classification-aware regression loss, None for off.
            balanced_l1: settings of the ``box_reg_loss_type`` "balanced_l1", None for the
                published settings.
            ignored_ioa_thresh: negatives with at least this share of their area inside a region to
                ignore are ignored, in (0, 1]; None to ignore no regions.
            kwargs: arguments of :class:`RetinaNet`.

        Raises:
            ValueError: ``smooth_l1_beta`` is not above 0 with balanced L1, or
                ``ignored_ioa_thresh`` is out of range.
        """
        super().__init__(**kwargs)
        if self.box_reg_loss_type == BALANCED_L1:
            reason = f", since box_reg_loss_type is {BALANCED_L1!r}"
            check_positive("smooth_l1_beta", self.smooth_l1_beta, reason)
        if ignored_ioa_thresh is not None:
            check_ioa_thresh("ignored_ioa_thresh", ignored_ioa_thresh)
        self.isr_p = isr_p
        self.carl = carl
        self.balanced_l1 = balanced_l1
        self.ignored_ioa_thresh = ignored_ioa_thresh

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        settings = pisa_settings(cfg)
        warn_of_gaps(cfg)
        return {
            **super().from_config(cfg),
            "isr_p": settings["isr_p"],
            "carl": settings["carl"],
            "balanced_l1": balanced_l1_settings(cfg, "RETINANET", "SMOOTH_L1_LOSS_BETA"),
            "ignored_ioa_thresh": ignored_ioa_thresh(cfg),
        }

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: list[list[Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        parts = self.isr_p, self.carl
        if all(part is None for part in parts) and self.box_reg_loss_type != BALANCED_L1:
            return super().forward_training(images, features, predictions, gt_instances)
        logits, deltas = self._transpose_dense_predictions(predictions, [self.num_classes, 4])
        anchors = self.anchor_generator(features)
        targets = self.label_anchors_and_objects(anchors, gt_instances)
        return self.pisa_losses(anchors, logits, deltas, *targets)

    @torch.no_grad()
    def label_anchors(
        self, anchors: list[Boxes], instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Label anchors as :class:`RetinaNet` does, and ignore negatives inside regions."""
        labels, gt_boxes = super().label_anchors(anchors, instances)
        if self.ignored_ioa_thresh is None:
            return labels, gt_boxes
        boxes, thresh = Boxes.cat(anchors).tensor, self.ignored_ioa_thresh
        labels = [
            ignore_inside(label, self.num_classes, boxes, targets, thresh)
            for label, targets in zip(labels, instances, strict=True)
        ]
        log_ignored("anchors", labels, [boxes] * len(labels), instances, thresh)
        return labels, gt_boxes

    @torch.no_grad()
    def label_anchors_and_objects(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        Label anchors as :meth:`label_anchors` does, and also return the object that each anchor is
        matched to.

        Args:
            anchors: the anchors of each feature level, R in all.
            gt_instances: the objects of each of the B images.

        Returns:
            Labels int64 (B * R,) in [-1, K], boxes (B * R, 4) and numbers int64 (B * R,) of the
            matched objects, image after image. Objects are numbered throughout the batch. Boxes and
            numbers are meaningless for anchors that are not positive.
        """
        # Stock matching reads the class of an anchor's object. Let it read a number above K (which
        # stands for background), and look up the class in a table that ends in -1, for ignored.
        # With K = 2 and objects of classes 1, 0, 1, the objects are numbered 3, 4 and 5, and the
        # table is 0 1 2 | 1 0 1 | -1. So label 4 means the second object, of class 0.
        first = self.num_classes + 1
        classes = cat([target.gt_classes for target in gt_instances])
        others = torch.arange(first, device=classes.device)
        table = torch.cat([others, classes, classes.new_full((1,), -1)])
        numbers = torch.arange(first, first + len(classes), device=classes.device)
        numbered = [target[:] for target in gt_instances]  # keeps their type and their regions
        parts = numbers.split([len(target) for target in numbered])
        for target, own in zip(numbered, parts, strict=True):
            target.gt_classes = own
        of_images, gt_boxes = self.label_anchors(anchors, numbered)
        labels = torch.cat(of_images)
        return table[labels], torch.cat(gt_boxes), labels - first

    def pisa_losses(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        pred_deltas: list[Tensor],
        gt_labels: Tensor,
        gt_boxes: Tensor,
        gt_objects: Tensor,
    ) -> dict[str, Tensor]:
        """
        Compute the losses of a batch.

        Args:
            anchors: the anchors of each feature level, R in all.
            pred_logits, pred_deltas: for each level (B, its anchors, K) and (B, its anchors, 4).
            gt_labels, gt_boxes, gt_objects: see :meth:`label_anchors_and_objects`.

        Returns:
            ``loss_cls``, ``loss_box_reg`` and, if CARL is on, ``loss_carl``: scalars under
            RetinaNet's running normaliser; 0, with a graph, if there is nothing to learn from.
        """
        # These two lines copy to the host, less often than the stock losses; no line below does.
        valid = nonzero_tuple(gt_labels >= 0)[0]
        classes = gt_labels[valid]
        pos = nonzero_tuple(classes != self.num_classes)[0]  # indices in [0, V)
        pos_classes = classes[pos]

        get_event_storage().put_scalar("num_pos_anchors", len(pos) / len(pred_logits[0]))
        normalizer = self._ema_update("loss_normalizer", max(len(pos), 1), 100)

        logits = cat(pred_logits, dim=1).flatten(0, 1)[valid]
        cls_losses = self._focal_losses(logits, pos, pos_classes)
        pos_probs = at_least_float32(logits[pos, pos_classes]).sigmoid()

        rows = valid[pos]  # indices in [0, B * R)
        pos_deltas = cat(pred_deltas, dim=1).flatten(0, 1)[rows]
        pos_gt_boxes = gt_boxes[rows]
        all_anchors = Boxes.cat(anchors).tensor
        pos_anchors = all_anchors[rows % len(all_anchors)]
        box_losses = box_regression_losses(
            pos_deltas,
            pos_anchors,
            pos_gt_boxes,
            self.box2box_transform,
            self.box_reg_loss_type,
            self.smooth_l1_beta,
            self.balanced_l1,
        )

        positives = Positives(
            boxes=pos_anchors,
            gt_boxes=pos_gt_boxes,
            objects=gt_objects[rows],
            classes=pos_classes,
            deltas=pos_deltas,
            probs=pos_probs,
            cls_losses=cls_losses[pos],
            box_losses=box_losses,
        )
        if self.isr_p is not None:
            weights = self.isr_p_weights(self.isr_p, positives)
            cls_losses = cls_losses * torch.ones_like(cls_losses).index_copy(0, pos, weights)

        losses = {
            "loss_cls": cls_losses.sum() / normalizer,
            "loss_box_reg": box_losses.sum() / normalizer,
        }
        if self.carl is not None:
            losses["loss_carl"] = self.carl_loss(self.carl, positives) / normalizer
        return losses

    def isr_p_weights(self, isr_p: ISR, positives: Positives) -> Tensor:
        """Return the weights (P,) of the positives' focal losses; for subclasses to override."""
        return isr_p_weights(isr_p, positives, self.box2box_transform)

    def carl_loss(self, carl: CARL, positives: Positives) -> Tensor:
        """Return CARL of a batch, not normalised; for subclasses to override."""
        return carl_loss(carl, positives)

    def _focal_losses(self, logits: Tensor, positives: Tensor, classes: Tensor) -> Tensor:
        """
        Compute sigmoid focal loss, summed over the classes.

        Args:
            logits: floating (V, K).
            positives: int64 (P,), indices in [0, V).
            classes: int64 (P,), their classes.

        Returns:
            float32 (V,).
        """
        targets = torch.zeros_like(logits)
        targets[positives, classes] = 1
        losses = sigmoid_focal_loss_jit(
            logits, targets, alpha=self.focal_loss_alpha, gamma=self.focal_loss_gamma
        )
        return losses.sum(dim=1)
