import math

import torch
from detectron2.config import CfgNode
from torch import Tensor

from ..config import check_count, check_range
from ..hlr import local_rank
from .sampler import PROPOSAL_SAMPLER_REGISTRY, Candidates, ProposalSampler, lowest


def _random_ranks(groups: Tensor) -> Tensor:
    """Rank (N,) of each candidate in its group, in random order."""
    return local_rank(torch.rand(len(groups), device=groups.device), groups)


@PROPOSAL_SAMPLER_REGISTRY.register()
class InstanceBalancedSampler(ProposalSampler):
    """
    For positives: the same number for each object that has any, and what objects are short of at
    random from the rest (Libra R-CNN, https://arxiv.org/abs/1904.02701).
    """

    def __call__(self, candidates: Candidates, num: int) -> Tensor:
        ranks = _random_ranks(candidates.objects)
        num_objects = (ranks == 0).sum().clamp(min=1)
        share = (num + num_objects - 1) // num_objects
        return lowest(ranks.clamp(max=share), num)


@PROPOSAL_SAMPLER_REGISTRY.register()
class IoUBalancedSampler(ProposalSampler):
    """
    For negatives: the IoU from 0, or from a floor, to the background threshold is cut into equal
    bins, and each gives the same number (Libra R-CNN, https://arxiv.org/abs/1904.02701, section
    3.1). A fraction of the negatives can be set aside for those below the floor, as in the
    authors' code. What bins are short of is drawn at random from the rest.

    Raises:
        ValueError: a setting is out of its range.
    """

    def __init__(self, cfg: CfgNode) -> None:
        settings = cfg.MODEL.ROI_HEADS.NEGATIVE_SAMPLER.IOU_BALANCED
        key = "MODEL.ROI_HEADS.NEGATIVE_SAMPLER.IOU_BALANCED"
        labels, thresholds = cfg.MODEL.ROI_HEADS.IOU_LABELS, cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS
        # Level i of the matcher ends at threshold i, the last one at 1.
        ends = [end for label, end in zip(labels, [*thresholds, 1.0], strict=True) if label == 0]
        self.highest = max(ends, default=1.0)
        check_count(f"{key}.NUM_BINS", settings.NUM_BINS, 1)
        check_range(f"{key}.FLOOR_THRESH", settings.FLOOR_THRESH, -1, self.highest)
        if self.highest == settings.FLOOR_THRESH:
            raise ValueError(
                f"{key}.FLOOR_THRESH = {settings.FLOOR_THRESH!r} is not allowed: it must be below "
                "the highest IoU of negatives, which it leaves no bins to."
            )
        check_range(f"{key}.FLOOR_FRACTION", settings.FLOOR_FRACTION, 0, 1)
        self.num_bins = settings.NUM_BINS
        self.floor = settings.FLOOR_THRESH
        self.floor_fraction = settings.FLOOR_FRACTION

    def __call__(self, candidates: Candidates, num: int) -> Tensor:
        ious = candidates.ious
        num_low = num - int(num * (1 - self.floor_fraction)) if self.floor >= 0 else 0
        start = max(self.floor, 0.0)
        is_low = ious < start if start > 0 else (ious <= 0) & (self.floor == 0)
        bins = ((ious - start) / (self.highest - start) * self.num_bins).long()
        bins = torch.where(is_low, -1, bins.clamp(0, self.num_bins - 1))
        ranks = _random_ranks(bins)
        share = math.ceil((num - num_low) / self.num_bins)
        waits = torch.where(is_low, ranks >= num_low, ranks >= share)
        return lowest(ranks.masked_fill(is_low, 0).masked_fill(waits, num), num)
