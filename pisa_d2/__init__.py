"""Prime Sample Attention and other ways to choose and weight a detector's training samples."""

from . import compat  # noqa: F401  # isort: skip  (must come before anything of Detectron2)
from . import data  # noqa: F401
from .config import add_pisa_config
from .matcher import PROPOSAL_MATCHER_REGISTRY
from .meta_arch import PISARetinaNet
from .proposal_generator import PISARPN
from .roi_heads import (
    PISACascadeROIHeads,
    PISAFastRCNNOutputLayers,
    PISAMixin,
    PISARes5ROIHeads,
    PISAROIHeads,
)
from .samplers import PROPOSAL_SAMPLER_REGISTRY, Candidates, ProposalSampler

__all__ = [
    "PROPOSAL_MATCHER_REGISTRY",
    "PISARPN",
    "PROPOSAL_SAMPLER_REGISTRY",
    "Candidates",
    "PISACascadeROIHeads",
    "PISAFastRCNNOutputLayers",
    "PISAMixin",
    "PISAROIHeads",
    "PISARes5ROIHeads",
    "PISARetinaNet",
    "ProposalSampler",
    "add_pisa_config",
]
