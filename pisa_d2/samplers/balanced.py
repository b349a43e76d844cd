"""Samplers that take equal shares from objects or from ranges of IoU, as in Libra R-CNN."""

import math
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor

from ..hlr import local_rank
from ..settings import SettingError, check_count, check_range
from .candidates import Candidates
from .sampler import NEGATIVE, POSITIVE, PROPOSAL_SAMPLER_REGISTRY
from .together import Images, TogetherSampler


def _draw_twice(num: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draw numbers (num,) that rank candidates in their groups, and numbers that break ties."""
    return torch.rand(num, device=device), torch.rand(num, dtype=torch.float64, device=device)


@PROPOSAL_SAMPLER_REGISTRY.register()
class InstanceBalancedSampler(TogetherSampler):
    """
    Take an equal share of positives per object that has any; unfilled shares are drawn at random
    from the rest (Libra R-CNN, https://arxiv.org/abs/1904.02701).
    """

    kinds = frozenset({POSITIVE})

    def draw(self, num: int, device: torch.device) -> tuple[Tensor, ...]:
        return _draw_twice(num, device)

    def order(self, candidates: Candidates, images: Images, *draws: Tensor) -> Tensor:
        layout = images.layout
        # Objects are numbered in their image: make the numbers unique in the batch.
        objects = candidates.objects.add(layout.images, alpha=2**32)
        ranks = local_rank(draws[0], objects)
        num_objects = layout.counts(ranks == 0).clamp(min=1)
        shares = (images.nums_on_device + num_objects - 1) // num_objects
        return images.lowest_first(ranks.minimum(shares[layout.images]), draws[1])


@PROPOSAL_SAMPLER_REGISTRY.register()
class IoUBalancedSampler(TogetherSampler):
    """
    Cut the negatives' range of IoU, which the matcher gives at each call, into equal bins, and take
    the same number from each (Libra R-CNN, https://arxiv.org/abs/1904.02701, section 3.1). If a bin
    has too few candidates, the others are drawn at random from the rest.

    As in the authors' code, a fraction of the negatives can come from below a floor of IoU, where
    the bins then begin.
    """

    kinds = frozenset({NEGATIVE})
    settings = "IOU_BALANCED"

    @configurable
    def __init__(
        self, *, num_bins: int = 3, floor_thresh: float = -1.0, floor_fraction: float = 0.0
    ) -> None:
        """
        Args:
            num_bins: number of bins, at least 1.
            floor_thresh: the IoU below which ``floor_fraction`` of the negatives are drawn; 0 draws
                them from boxes that overlap nothing. Negative for no floor.
            floor_fraction: in [0, 1].

        Raises:
            SettingError: a value is out of range.
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

    def draw(self, num: int, device: torch.device) -> tuple[Tensor, ...]:
        return _draw_twice(num, device)

    def order(self, candidates: Candidates, images: Images, *draws: Tensor) -> Tensor:
        ious = candidates.ious
        start, end = self._range(images)
        bins = ((ious - start) / (end - start) * self.num_bins).long().clamp(0, self.num_bins - 1)
        num_low = [self._num_low(num) for num in images.nums]
        limits = images.repeat(
            [
                math.ceil((num - low) / self.num_bins)
                for num, low in zip(images.nums, num_low, strict=True)
            ]
        )
        if self.floor_thresh >= 0:
            is_low = ious < self.floor_thresh if self.floor_thresh > 0 else ious <= 0
            bins = bins.masked_fill(is_low, -1)
            limits = torch.where(is_low, images.repeat(num_low), limits)
        ranks = local_rank(draws[0], bins.add(images.layout.images, alpha=self.num_bins + 1))
        waits = ranks >= limits
        if self.floor_thresh >= 0:
            ranks = ranks.masked_fill(is_low, 0)
        return images.lowest_first(torch.where(waits, images.repeat(images.nums), ranks), draws[1])

    def _num_low(self, num: int) -> int:
        return 0 if self.floor_thresh < 0 else num - int(num * (1 - self.floor_fraction))

    def _range(self, images: Images) -> tuple[Any, Any]:
        """Return the lowest and the highest IoU of the bins: numbers, or tensors (N,)."""
        starts, ends = zip(*images.negative_ranges, strict=True)
        if self.floor_thresh >= 0:
            for end in ends:
                self._check_floor(self.floor_thresh, end)
            starts = tuple(max(start, self.floor_thresh) for start in starts)
        return images.spread(starts), images.spread(ends)
