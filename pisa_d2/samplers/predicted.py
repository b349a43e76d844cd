"""Samplers that go by the box head's predictions for the candidates under the current weights."""

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import nonzero_tuple
from torch import Tensor

from ..hlr import hierarchical_local_rank
from ..ordering import descending_order, refine_order
from ..ranking import groups_in_images, rank_negatives
from ..settings import check_range
from .candidates import Candidates, Choice, Quota, is_positive
from .sampler import (
    NEGATIVE,
    POSITIVE,
    PROPOSAL_SAMPLER_REGISTRY,
    BatchSampler,
    ProposalSampler,
    lowest,
)


@PROPOSAL_SAMPLER_REGISTRY.register()
class HardSampler(ProposalSampler):
    """
    Online hard example mining (https://arxiv.org/abs/1604.03540), for positives or negatives: those
    of the highest classification loss. See :class:`OHEMSampler` for the method as published.
    """

    needs_predictions = True

    def __call__(self, candidates: Candidates, num: int) -> Tensor:
        return descending_order(candidates.predictions.cls_losses)[:num]


@PROPOSAL_SAMPLER_REGISTRY.register()
class OHEMSampler(BatchSampler):
    """
    Online hard example mining as published (https://arxiv.org/abs/1604.03540): the samples of the
    highest classification and box loss in the whole batch, whether positive or negative, after NMS
    by that loss in each image and class. NaN is the highest loss. The fraction of positives is
    ignored, and fewer samples are chosen where NMS leaves fewer.
    """

    needs_predictions = True

    @configurable
    def __init__(self, *, nms_thresh: float = 0.7) -> None:
        """
        Args:
            nms_thresh: proposals of an image and class that overlap by more than this IoU give one
                sample, the hardest. In [0, 1].

        Raises:
            SettingError: it is out of its range.
        """
        check_range("nms_thresh", nms_thresh, 0, 1)
        self.nms_thresh = nms_thresh

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        return {"nms_thresh": cfg.MODEL.ROI_HEADS.HARD_SAMPLER.NMS_THRESH}

    def __call__(self, batch: list[Candidates], quota: Quota) -> list[Choice]:
        chosen = self._hardest(batch, quota.num_per_image * len(batch))
        choices = []
        for candidates, of_image in zip(batch, chosen, strict=True):
            positive = is_positive(candidates.classes, quota.num_classes)
            rows = (nonzero_tuple(of_image & kind)[0] for kind in (positive, ~positive))
            choices.append(Choice(*rows))
        return choices

    def _hardest(self, batch: list[Candidates], num: int) -> list[Tensor]:
        """For each image bool (N,), true for the chosen."""
        sizes = [len(candidates) for candidates in batch]
        boxes = torch.cat([candidates.boxes for candidates in batch])
        classes = torch.cat([candidates.classes for candidates in batch])
        losses = torch.cat([c.predictions.cls_losses + c.predictions.box_losses for c in batch])
        # NaN first: last, the positives of broken deltas would give way to negatives unnoticed.
        losses = losses.masked_fill(losses.isnan(), float("inf"))
        heads = groups_in_images(boxes, losses, sizes, self.nms_thresh, classes)
        indices = torch.cat([torch.arange(size, device=heads.device) for size in sizes])
        eligible = (heads == indices) & (classes >= 0)
        # A sort of its own: no value can be lower than all losses.
        hardest = refine_order(descending_order(losses), (~eligible).long())[:num]
        chosen = torch.zeros_like(eligible).index_fill(0, hardest, True)
        return list((chosen & eligible).split(sizes))


@PROPOSAL_SAMPLER_REGISTRY.register()
class IoUHLRSampler(ProposalSampler):
    """
    For positives: the prime samples (https://arxiv.org/abs/1904.04821), those of the lowest
    IoU-HLR in the image, ranked in each class as ISR-P does; at equal rank the higher IoU.
    """

    kinds = frozenset({POSITIVE})
    needs_predictions = True

    def __call__(self, candidates: Candidates, num: int) -> Tensor:
        ious = candidates.predictions.ious
        ranks = hierarchical_local_rank(ious, candidates.objects, candidates.classes)
        return refine_order(descending_order(ious), ranks)[:num]


@PROPOSAL_SAMPLER_REGISTRY.register()
class ScoreHLRSampler(ProposalSampler):
    """
    For negatives: those of the lowest Score-HLR in the image (https://arxiv.org/abs/1904.04821),
    among those scored above a threshold; the remainder at random.
    """

    kinds = frozenset({NEGATIVE})
    needs_predictions = True
    settings = "SCORE_HLR"

    @configurable
    def __init__(self, *, nms_thresh: float = 0.5, score_thresh: float = 0.05) -> None:
        """
        Args:
            nms_thresh: IoU above which regressed boxes form a group, in [0, 1].
            score_thresh: candidates scored above it are ranked, in [0, 1].

        Raises:
            SettingError: a value is out of its range.
        """
        check_range("nms_thresh", nms_thresh, 0, 1)
        check_range("score_thresh", score_thresh, 0, 1)
        self.nms_thresh = nms_thresh
        self.score_thresh = score_thresh

    def __call__(self, candidates: Candidates, num: int) -> Tensor:
        boxes, scores = candidates.predictions.boxes, candidates.predictions.scores
        ranked = scores > self.score_thresh
        ranks = rank_negatives(boxes, scores, ranked, [len(scores)], self.nms_thresh)
        return lowest(torch.where(ranked, ranks, len(ranks)), num)

    def ranks(
        self, candidates: Candidates, chosen: Tensor, num: int
    ) -> tuple[Tensor, Tensor] | None:
        """
        The Score-HLR of the chosen, divided by the larger of ``num`` and the number of ranked
        candidates; those drawn at random have the last rank.
        """
        # The chosen come in the sequence of their ranks, then the random ones.
        num_ranked = (candidates.predictions.scores > self.score_thresh).sum()
        ranks = torch.arange(len(chosen), device=chosen.device)
        return ranks.minimum((num_ranked - 1).clamp(min=0)), num_ranked.clamp(min=num)
