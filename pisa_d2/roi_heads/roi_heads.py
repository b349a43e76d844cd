"""Detectron2's ROI heads with the mixin."""

from detectron2.modeling import ROI_HEADS_REGISTRY, StandardROIHeads
from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads

from .mixin import PISAMixin


@ROI_HEADS_REGISTRY.register()
class PISAROIHeads(PISAMixin, StandardROIHeads):
    """:class:`StandardROIHeads` (box, mask and keypoint) with Prime Sample Attention."""


@ROI_HEADS_REGISTRY.register()
class PISARes5ROIHeads(PISAMixin, Res5ROIHeads):
    """:class:`Res5ROIHeads` (C4 models) with Prime Sample Attention."""


@ROI_HEADS_REGISTRY.register()
class PISACascadeROIHeads(PISAMixin, CascadeROIHeads):
    """:class:`CascadeROIHeads` with Prime Sample Attention in every stage."""
