"""Samplers that go by what the box head makes of the candidates under the current weights."""

import torch
from detectron2.config import CfgNode
from torch import Tensor

from ..config import check_flag, check_range
from ..hlr import descending_order, hierarchical_local_rank, refine_order
from ..ranking import groups_in_images, rank_negatives
from .sampler import PROPOSAL_SAMPLER_REGISTRY, Candidates, ProposalSampler, lowest


@PROPOSAL_SAMPLER_REGISTRY.register()
class HardSampler(ProposalSampler):
    """
    Online hard example mining (https://arxiv.org/abs/1604.03540), for positives or negatives: those
    of the highest classification loss.

    With ``HARD_SAMPLER.JOINT`` as in the paper, for both kinds together: see
    :meth:`choose_jointly`.

    Raises:
        ValueError: a setting is out of its range, or JOINT is on and the other kind has another
            sampler.
    """

    needs_predictions = True

    def __init__(self, cfg: CfgNode) -> None:
        heads = cfg.MODEL.ROI_HEADS
        self.joint = heads.HARD_SAMPLER.JOINT
        self.nms_thresh = heads.HARD_SAMPLER.NMS_THRESH
        check_flag("MODEL.ROI_HEADS.HARD_SAMPLER.JOINT", self.joint)
        check_range("MODEL.ROI_HEADS.HARD_SAMPLER.NMS_THRESH", self.nms_thresh, 0, 1)
        names = {heads.POSITIVE_SAMPLER.NAME, heads.NEGATIVE_SAMPLER.NAME}
        if self.joint and len(names) > 1:
            raise ValueError(
                "MODEL.ROI_HEADS.HARD_SAMPLER.JOINT = True is not allowed: POSITIVE_SAMPLER.NAME "
                f"and NEGATIVE_SAMPLER.NAME must both be 'HardSampler', not {sorted(names)}."
            )

    def __call__(self, candidates: Candidates, num: int) -> Tensor:
        return descending_order(candidates.predictions.cls_losses)[:num]

    def choose_jointly(self, batch: list[Candidates], num: int) -> list[Tensor]:
        """
        Those of the highest classification and box loss in the whole batch, whether positive or
        negative, after NMS by that loss in each image and class. NaN is the highest loss.

        Args:
            batch: all proposals of each image, of class -1 where they are ignored.
            num: how many to choose in all.

        Returns:
            For each image bool (N,), true for the chosen; fewer than ``num`` in all where NMS
            leaves fewer.
        """
        sizes = [len(candidates.ious) for candidates in batch]
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

    Raises:
        ValueError: a setting is out of its range.
    """

    needs_predictions = True

    def __init__(self, cfg: CfgNode) -> None:
        settings = cfg.MODEL.ROI_HEADS.NEGATIVE_SAMPLER.SCORE_HLR
        key = "MODEL.ROI_HEADS.NEGATIVE_SAMPLER.SCORE_HLR"
        check_range(f"{key}.NMS_THRESH", settings.NMS_THRESH, 0, 1)
        check_range(f"{key}.SCORE_THRESH", settings.SCORE_THRESH, 0, 1)
        self.nms_thresh = settings.NMS_THRESH
        self.score_thresh = settings.SCORE_THRESH

    def __call__(self, candidates: Candidates, num: int) -> Tensor:
        boxes, scores = candidates.predictions.boxes, candidates.predictions.scores
        ranked = scores > self.score_thresh
        ranks = rank_negatives(boxes, scores, ranked, [len(scores)], self.nms_thresh)
        return lowest(torch.where(ranked, ranks, len(ranks)), num)

    def ranks(
        self, candidates: Candidates, chosen: Tensor, num: int
    ) -> tuple[Tensor, Tensor] | None:
        """
        The Score-HLR of the chosen, measured by the larger of ``num`` and the number of ranked
        candidates; those drawn at random have the last rank.
        """
        # The chosen come in the sequence of their ranks, then the random ones.
        num_ranked = (candidates.predictions.scores > self.score_thresh).sum()
        ranks = torch.arange(len(chosen), device=chosen.device)
        return ranks.minimum((num_ranked - 1).clamp(min=0)), num_ranked.clamp(min=num)
