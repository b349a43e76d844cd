from .fast_rcnn import PISAFastRCNNOutputLayers
from .roi_heads import PISACascadeROIHeads, PISAMixin, PISARes5ROIHeads, PISAROIHeads

__all__ = [
    "PISACascadeROIHeads",
    "PISAFastRCNNOutputLayers",
    "PISAMixin",
    "PISAROIHeads",
    "PISARes5ROIHeads",
]
