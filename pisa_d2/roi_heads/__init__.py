from .fast_rcnn import PISAFastRCNNOutputLayers
from .mixin import PISAMixin
from .roi_heads import PISACascadeROIHeads, PISARes5ROIHeads, PISAROIHeads

__all__ = [
    "PISACascadeROIHeads",
    "PISAFastRCNNOutputLayers",
    "PISAMixin",
    "PISAROIHeads",
    "PISARes5ROIHeads",
]
