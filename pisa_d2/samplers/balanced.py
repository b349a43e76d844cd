import math
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor

from ..hlr import local_rank
from ..settings import SettingError, check_count, check_range
from .candidates import Candidates
from .sampler import NEGATIVE, POSITIVE, PROPOSAL_SAMPLER_REGISTRY, ProposalSampler, lowest


def _random_ranks(groups: Tensor) -> Tensor:
    """Rank (N,) of each candidate in its group, in random order."""
    return local_rank(torch.rand(len(groups), device=groups.device), groups)


@PROPOSAL_SAMPLER_REGISTRY.register()
class InstanceBalancedSampler(ProposalSampler):
    """
    For positives: an equal share per object that has positives; unfilled shares are drawn at
    random from the rest (Libra R-CNN, https://arxiv.org/abs/1904.02701).
    """

    kinds = frozenset({POSITIVE})

    def __call__(self, candidates: Candidates, num: int) -> Tensor:
        ranks = _random_ranks(candidates.objects)
        num_objects = (ranks == 0).sum().clamp(min=1)
        share = (num + num_objects - 1) // num_objects
        return lowest(ranks.clamp(max=share), num)


@PROPOSAL_SAMPLER_REGISTRY.register()
class IoUBalancedSampler(ProposalSampler):
    """
    For negatives: the IoU that negatives reach, as the matcher says at each call, is cut into equal
    bins, and each gives the same number (Libra R-CNN, https://arxiv.org/abs/1904.02701, section
    3.1). Bins that are short of candidates are made up for at random from the rest.

    As in the authors' code, a fraction of the negatives can be set aside for those of an IoU below
    a floor, where the bins then begin.
    """

    kinds = frozenset({NEGATIVE})
    settings = "IOU_BALANCED"

    @configurable
    def __init__(
        self, *, num_bins: int = 3, floor_thresh: float = -1.0, floor_fraction: float = 0.0
    ) -> None:
        """
        Args:
            num_bins: at least 1.
            floor_thresh: the IoU below which ``floor_fraction`` of the negatives are drawn; at 0,
                from those that overlap nothing. Negative for no floor.
            floor_fraction: in [0, 1].

        Raises:
            SettingError: a value is out of its range.
        """
        check_count("num_bins", num_bins, 1)
        check_range("floor_thresh", floor_thresh, -1, 1)
        check_range("floor_fraction", floor_fraction, 0, 1)
        self.num_bins = num_bins
        self.floor_thresh = floor_thresh
        self.floor_fraction = floor_fraction

    @classmethod
    def from_config(cls, cfg: CfgNode, node: CfgNode | None = None) -> dict[str, Any]:
        settings = super().from_config(cfg, node)
        of_rpn = node is not None and node is cfg.MODEL.RPN.get("NEGATIVE_SAMPLER")
        matched = cfg.MODEL.RPN if of_rpn else cfg.MODEL.ROI_HEADS
        labels, thresholds = matched.IOU_LABELS, matched.IOU_THRESHOLDS
        # Level i of the matcher ends at threshold i, the last one at 1.
        ends = [end for label, end in zip(labels, [*thresholds, 1.0], strict=True) if label == 0]
        check_range("floor_thresh", settings["floor_thresh"], -1, 1)
        cls._check_floor(settings["floor_thresh"], max(ends, default=1.0))
        return settings

    @staticmethod
    def _check_floor(floor: float, highest: float) -> None:
        if isinstance(highest, float) and floor >= highest:
            reason = f"it must be below the highest IoU of negatives, {highest:g}"
            raise SettingError("floor_thresh", floor, reason)

    def __call__(self, candidates: Candidates, num: int) -> Tensor:
        ious = candidates.ious
        start, end = candidates.negative_range
        if self.floor_thresh < 0:
            num_low, is_low = 0, torch.zeros_like(ious, dtype=torch.bool)
        else:
            self._check_floor(self.floor_thresh, end)
            num_low = num - int(num * (1 - self.floor_fraction))
            is_low = ious < self.floor_thresh if self.floor_thresh > 0 else ious <= 0
            start = max(start, self.floor_thresh)
        bins = ((ious - start) / (end - start) * self.num_bins).long()
        bins = torch.where(is_low, -1, bins.clamp(0, self.num_bins - 1))
        ranks = _random_ranks(bins)
        share = math.ceil((num - num_low) / self.num_bins)
        waits = torch.where(is_low, ranks >= num_low, ranks >= share)
        return lowest(ranks.masked_fill(is_low, 0).masked_fill(waits, num), num)
