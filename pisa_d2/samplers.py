"""
Which proposals a detector trains on.

Shape shorthand in this module:

    N: number of candidates, the positives or the negatives of one image
"""

import math
from typing import NamedTuple

import torch
from detectron2.config import CfgNode
from fvcore.common.registry import Registry
from torch import Tensor

from .config import check_range, look_up
from .hlr import local_rank

PROPOSAL_SAMPLER_REGISTRY = Registry("PROPOSAL_SAMPLER")
PROPOSAL_SAMPLER_REGISTRY.__doc__ = """
What chooses the positives, or the negatives, that an image contributes to the training batch.

The registered class is called with ``cfg`` and gives a :class:`ProposalSampler`, by the names
``MODEL.ROI_HEADS.POSITIVE_SAMPLER.NAME`` and ``NEGATIVE_SAMPLER.NAME``.
"""


class Candidates(NamedTuple):
    """
    The positives, or the negatives, of one image. Ignored proposals are among neither.

    Attributes:
        boxes: floating (N, 4), XYXY in pixels.
        ious: floating (N,), IoU with the matched object; 0 where the image has none.
        objects: int64 (N,), index in the image of the matched object; 0 where the image has none.
        classes: int64 (N,), its class; the number of classes for negatives.
    """

    boxes: Tensor
    ious: Tensor
    objects: Tensor
    classes: Tensor


class ProposalSampler:
    """Base class. A sampler reads its settings from ``cfg`` and never changes them later."""

    def __init__(self, cfg: CfgNode) -> None:
        pass

    def __call__(self, candidates: Candidates, num: int) -> Tensor:
        """
        Args:
            candidates: N of them, any number.
            num: how many to choose.

        Returns:
            int64, min(N, num) different indices in [0, N), in any sequence.
        """
        raise NotImplementedError


@PROPOSAL_SAMPLER_REGISTRY.register()
class RandomSampler(ProposalSampler):
    """Each candidate is as likely as any other: stock Detectron2's sampling, draw for draw."""

    def __call__(self, candidates: Candidates, num: int) -> Tensor:
        return torch.randperm(len(candidates.ious), device=candidates.ious.device)[:num]


def _random_ranks(groups: Tensor) -> Tensor:
    """Rank (N,) of each candidate in its group, in random order."""
    return local_rank(torch.rand(len(groups), device=groups.device), groups)


def _lowest(ranks: Tensor, num: int) -> Tensor:
    """Indices of the ``num`` lowest ranks, at random among equal ones."""
    # Drawn anew: who waits after the shares are dealt out has a low number in a small group. In
    # double precision it still orders candidates when it is added to a rank.
    ties = torch.rand(len(ranks), dtype=torch.float64, device=ranks.device)
    return (ranks + ties).argsort()[:num]


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
        return _lowest(ranks.clamp(max=share), num)


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
        check_range(f"{key}.NUM_BINS", settings.NUM_BINS, 1)
        check_range(f"{key}.FLOOR_THRESH", settings.FLOOR_THRESH, -1, self.highest)
        check_range(f"{key}.FLOOR_FRACTION", settings.FLOOR_FRACTION, 0, 1)
        self.num_bins = settings.NUM_BINS
        self.floor = settings.FLOOR_THRESH
        self.floor_fraction = settings.FLOOR_FRACTION

    def __call__(self, candidates: Candidates, num: int) -> Tensor:
        ious = candidates.ious
        num_low = num - int(num * (1 - self.floor_fraction)) if self.floor >= 0 else 0
        lowest = max(self.floor, 0.0)
        is_low = ious < lowest if lowest > 0 else (ious <= 0) & (self.floor == 0)
        bins = ((ious - lowest) / (self.highest - lowest) * self.num_bins).long()
        bins = torch.where(is_low, -1, bins.clamp(0, self.num_bins - 1))
        ranks = _random_ranks(bins)
        share = math.ceil((num - num_low) / self.num_bins)
        waits = torch.where(is_low, ranks >= num_low, ranks >= share)
        return _lowest(ranks.masked_fill(is_low, 0).masked_fill(waits, num), num)


def build_proposal_sampler(cfg: CfgNode, kind: str) -> ProposalSampler:
    """
    Args:
        kind: "POSITIVE_SAMPLER" or "NEGATIVE_SAMPLER".

    Raises:
        ValueError: its NAME is no registered one.
    """
    name = cfg.MODEL.ROI_HEADS[kind].NAME
    return look_up(PROPOSAL_SAMPLER_REGISTRY, f"MODEL.ROI_HEADS.{kind}.NAME", name)(cfg)
