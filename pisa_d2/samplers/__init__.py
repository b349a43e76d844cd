"""
Which proposals a detector trains on.

Shape shorthand in this package:

    N: number of candidates, the positives or the negatives of one image
"""

from . import balanced, predicted  # noqa: F401  (register their samplers)
from .sampler import (
    PROPOSAL_SAMPLER_REGISTRY,
    Candidates,
    Predictions,
    ProposalSampler,
    build_proposal_sampler,
)

__all__ = [
    "PROPOSAL_SAMPLER_REGISTRY",
    "Candidates",
    "Predictions",
    "ProposalSampler",
    "build_proposal_sampler",
]
