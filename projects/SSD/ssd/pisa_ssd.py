from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor

from pisa_d2.attention import Positives, carl_loss, isr_p_weights
from pisa_d2.config import pisa_settings
from pisa_d2.settings import CARL, ISR

from .ssd import SSD


@META_ARCH_REGISTRY.register()
class PISASSD(SSD):
    """
    SSD with Prime Sample Attention over the positives: ISR-P in the classification loss, before
    negatives are mined, and CARL as a third loss. ``MODEL.PISA.ISR_N`` does not apply: the method
    weights the negatives of two-stage detectors only. Parameters and inference are SSD's, and so
    are the losses when both parts are switched off.
    """

    @configurable
    def __init__(self, *, isr_p: ISR | None = ISR(), carl: CARL | None = CARL(), **kwargs: Any):
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
        if self.isr_p is not None:
            weights = isr_p_weights(self.isr_p, positives, self.box2box_transform)
            losses["loss_cls"] = (weights * positives.cls_losses).sum()
        if self.carl is not None:
            losses["loss_carl"] = carl_loss(self.carl, positives)
        return losses
