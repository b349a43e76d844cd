"""
Samplers, which choose the proposals that a detector trains on.

Shape shorthand in this package:

    N: number of candidates, the positives or the negatives of one image
"""

from .balanced import InstanceBalancedSampler, IoUBalancedSampler
from .build import build_batch_sampler, build_proposal_sampler
from .candidates import Candidates, Choice, Predictions, Quota
from .pair import PairSampler
from .predicted import HardSampler, IoUHLRSampler, OHEMSampler, ScoreHLRSampler
from .sampler import PROPOSAL_SAMPLER_REGISTRY, BatchSampler, ProposalSampler, RandomSampler

__all__ = [
    "PROPOSAL_SAMPLER_REGISTRY",
    "BatchSampler",
    "Candidates",
    "Choice",
    "HardSampler",
    "InstanceBalancedSampler",
    "IoUBalancedSampler",
    "IoUHLRSampler",
    "OHEMSampler",
    "PairSampler",
    "Predictions",
    "ProposalSampler",
    "Quota",
    "RandomSampler",
    "ScoreHLRSampler",
    "build_batch_sampler",
    "build_proposal_sampler",
]
