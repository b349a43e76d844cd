"""Prime Sample Attention and other ways to choose and weight a detector's training samples."""

from . import compat  # noqa: F401  # isort: skip  (must come before anything of Detectron2)
from . import data  # noqa: F401
from .config import add_pisa_config
from .roi_heads import PISAFastRCNNOutputLayers, PISAMixin, PISAROIHeads

__all__ = ["PISAFastRCNNOutputLayers", "PISAMixin", "PISAROIHeads", "add_pisa_config"]
