"""Prime Sample Attention and other ways to choose and weight a detector's training samples."""

from . import compat  # noqa: F401  # isort: skip  (must come before anything of Detectron2)
from . import data, model_zoo
from ._version import __version__
from .config import add_pisa_config
from .matcher import PROPOSAL_MATCHER_REGISTRY, IoUMatcher, Match, ProposalMatcher
from .meta_arch import PISARetinaNet
from .proposal_generator import PISARPN
from .roi_heads import (
    PISACascadeROIHeads,
    PISAFastRCNNOutputLayers,
    PISAMixin,
    PISARes5ROIHeads,
    PISAROIHeads,
)
from .samplers import (
    PROPOSAL_SAMPLER_REGISTRY,
    BatchSampler,
    Candidates,
    Choice,
    HardSampler,
    InstanceBalancedSampler,
    IoUBalancedSampler,
    IoUHLRSampler,
    OHEMSampler,
    PairSampler,
    Predictions,
    ProposalSampler,
    Quota,
    RandomSampler,
    ScoreHLRSampler,
)
from .settings import CARL, ISR, BalancedL1, NegativeISR

__all__ = [
    "CARL",
    "ISR",
    "PROPOSAL_MATCHER_REGISTRY",
    "PISARPN",
    "PROPOSAL_SAMPLER_REGISTRY",
    "BalancedL1",
    "BatchSampler",
    "Candidates",
    "Choice",
    "HardSampler",
    "InstanceBalancedSampler",
    "IoUBalancedSampler",
    "IoUHLRSampler",
    "IoUMatcher",
    "Match",
    "NegativeISR",
    "OHEMSampler",
    "PISACascadeROIHeads",
    "PISAFastRCNNOutputLayers",
    "PISAMixin",
    "PISAROIHeads",
    "PISARes5ROIHeads",
    "PISARetinaNet",
    "PairSampler",
    "Predictions",
    "ProposalMatcher",
    "ProposalSampler",
    "Quota",
    "RandomSampler",
    "ScoreHLRSampler",
    "__version__",
    "add_pisa_config",
    "data",
    "model_zoo",
]
