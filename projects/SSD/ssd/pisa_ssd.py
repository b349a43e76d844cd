from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor

from pisa_d2.config import CARL, ISR, pisa_settings
from pisa_d2.hlr import box_iou
from pisa_d2.isr import positive_weights
from pisa_d2.reweighting import carl_weights
from pisa_d2.statistics import log_positives

from .ssd import SSD, Positives


@META_ARCH_REGISTRY.register()
class PISASSD(SSD):
    """
    SSD with Prime Sample Attention over the positives: ISR-P in the classification loss, before
    negatives are mined, and CARL as a third loss. ``MODEL.PISA.ISR_N`` does not apply: the method
    weights the negatives of two-stage detectors only. Parameters and inference are SSD's, and so
    are the losses when both parts are switched off.
    """

    @configurable
    def __init__(self, *, isr_p: ISR | None = None, carl: CARL | None = None, **kwargs: Any):
        """
        Args:
            isr_p: reweighting of positives by IoU-HLR, None to leave it out.
            carl: the classification-aware regression loss, None to leave it out.
            kwargs: arguments of :class:`SSD`.
        """
        super().__init__(**kwargs)
        self.isr_p = isr_p
        self.carl = carl

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        settings = pisa_settings(cfg)
        ours = {name: settings[name] for name in ("isr_p", "carl")}
        return {**super().from_config(cfg), **ours}

    def positive_losses(self, positives: Positives) -> dict[str, Tensor]:
        """See :meth:`SSD.positive_losses`; with ``loss_carl`` where CARL is on."""
        losses = super().positive_losses(positives)
        classes = positives.classes
        probs = positives.logits.softmax(dim=1).gather(1, classes[:, None])[:, 0]
        if self.isr_p is not None:
            weights = self._isr_p_weights(positives, probs)
            losses["loss_cls"] = (weights * positives.cls_losses).sum()
        if self.carl is not None:
            weights = carl_weights(probs, self.carl.gamma, self.carl.beta)
            losses["loss_carl"] = self.carl.loss_weight * (weights * positives.box_losses).sum()
        return losses

    @torch.no_grad()
    def _isr_p_weights(self, positives: Positives, probs: Tensor) -> Tensor:
        boxes = self.box2box_transform.apply_deltas(positives.deltas, positives.boxes)
        ious = box_iou(boxes, positives.gt_boxes)
        objects, classes = positives.objects, positives.classes
        weights = positive_weights(self.isr_p, ious, objects, classes, positives.cls_losses)
        log_positives(ious, objects, probs, weights)
        return weights
