from .fast_rcnn import PISAFastRCNNOutputLayers
from .roi_heads import PISAMixin, PISAROIHeads

__all__ = ["PISAFastRCNNOutputLayers", "PISAMixin", "PISAROIHeads"]
