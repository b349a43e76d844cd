"""Samplers that choose by the box head's predictions under the current weights."""

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import nonzero_tuple
from torch import Tensor

from ..hlr import hierarchical_local_rank
from ..ordering import descending_order, gather_rows, refine_order
from ..ranking import ImageLayout, groups_in_images, rank_negatives
from ..settings import check_range
from .candidates import Candidates, Choice, Joined, Quota, is_positive
from .sampler import NEGATIVE, POSITIVE, PROPOSAL_SAMPLER_REGISTRY, BatchSampler
from .together import Images, TogetherSampler


@PROPOSAL_SAMPLER_REGISTRY.register()
class HardSampler(TogetherSampler):
    """
    Choose the positives or the negatives with the highest classification loss (online hard example
    mining, https://arxiv.org/abs/1604.03540). :class:`OHEMSampler` is the method as published.
    """

    needs_predictions = ("cls_losses",)

    def order(self, candidates: Candidates, images: Images, *draws: Tensor) -> Tensor:
        return images.order(descending_order(candidates.predictions.cls_losses))


@PROPOSAL_SAMPLER_REGISTRY.register()
class OHEMSampler(BatchSampler):
    """
    Choose the samples with the highest sum of classification and box loss in the whole batch,
    positive or negative, after NMS by that loss in each image and class (online hard example
    mining as published, https://arxiv.org/abs/1604.03540). NaN is the highest loss. The fraction of
    positives is ignored, and fewer samples are chosen if NMS leaves fewer.
    """

    needs_predictions = ("cls_losses", "box_losses")

    @configurable
    def __init__(self, *, nms_thresh: float = 0.7) -> None:
        """
        Args:
            nms_thresh: of proposals in the same image and class that overlap by more than this IoU,
                only the hardest can be chosen. In [0, 1].

        Raises:
            SettingError: ``nms_thresh`` is out of range.
        """
        check_range("nms_thresh", nms_thresh, 0, 1)
        self.nms_thresh = nms_thresh

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        return {"nms_thresh": cfg.MODEL.ROI_HEADS.HARD_SAMPLER.NMS_THRESH}

    def __call__(self, batch: list[Candidates], quota: Quota) -> list[Choice]:
        if not batch:
            return []
        joined = Joined(batch)
        layout = ImageLayout([len(candidates) for candidates in batch], joined.device)
        chosen = self._hardest(joined, layout, quota.num_per_image * len(batch))
        positive = is_positive(joined.classes, quota.num_classes)
        kinds = []
        for mask in (chosen & positive, chosen & ~positive):
            rows = gather_rows(layout.positions, nonzero_tuple(mask)[0])
            kinds.append(rows.split(layout.counts(mask).tolist()))
        return [Choice(*rows) for rows in zip(*kinds, strict=True)]

    def _hardest(self, candidates: Candidates, layout: ImageLayout, num: int) -> Tensor:
        """Return which candidates are chosen, bool (N,)."""
        predictions, classes = candidates.predictions, candidates.classes
        losses = predictions.cls_losses + predictions.box_losses
        # NaN is the highest loss: as the lowest it would leave out positives with broken deltas,
        # and hide the fault.
        losses = losses.masked_fill(losses.isnan(), float("inf"))
        heads = groups_in_images(candidates.boxes, losses, layout, self.nms_thresh, classes)
        eligible = (heads == layout.positions) & (classes >= 0)
        # Ineligible ones are sorted last in a second step: no value is lower than all losses.
        hardest = refine_order(descending_order(losses), (~eligible).long())[:num]
        return torch.zeros_like(eligible).index_fill(0, hardest, True) & eligible


@PROPOSAL_SAMPLER_REGISTRY.register()
class IoUHLRSampler(TogetherSampler):
    """
    Choose the prime positives (https://arxiv.org/abs/1904.04821): the lowest IoU-HLR in the image,
    ranked in each class as in ISR-P; at equal rank the higher IoU.
    """

    kinds = frozenset({POSITIVE})
    needs_predictions = ("ious",)

    def order(self, candidates: Candidates, images: Images, *draws: Tensor) -> Tensor:
        ious = candidates.predictions.ious
        classes = candidates.classes.add(images.layout.images, alpha=2**32)
        ranks = hierarchical_local_rank(ious, candidates.objects, classes)
        return images.order(refine_order(descending_order(ious), ranks))


@PROPOSAL_SAMPLER_REGISTRY.register()
class ScoreHLRSampler(TogetherSampler):
    """
    Choose the prime negatives (https://arxiv.org/abs/1904.04821): the lowest Score-HLR in the image
    among negatives scored above a threshold; the rest at random.
    """

    kinds = frozenset({NEGATIVE})
    needs_predictions = ("scores", "boxes")
    settings = "SCORE_HLR"

    @configurable
    def __init__(self, *, nms_thresh: float = 0.5, score_thresh: float = 0.05) -> None:
        """
        Args:
            nms_thresh: IoU above which regressed boxes form a group, in [0, 1].
            score_thresh: candidates scored above it are ranked, in [0, 1].

        Raises:
            SettingError: a value is out of range.
        """
        check_range("nms_thresh", nms_thresh, 0, 1)
        check_range("score_thresh", score_thresh, 0, 1)
        self.nms_thresh = nms_thresh
        self.score_thresh = score_thresh

    def draw(self, num: int, device: torch.device) -> tuple[Tensor, ...]:
        return (torch.rand(num, dtype=torch.float64, device=device),)

    def order(self, candidates: Candidates, images: Images, *draws: Tensor) -> Tensor:
        boxes, scores = candidates.predictions.boxes, candidates.predictions.scores
        layout = images.layout
        ranked = scores > self.score_thresh
        ranks = rank_negatives(boxes, scores, ranked, layout, self.nms_thresh)
        last = images.repeat(layout.num_samples)
        return images.lowest_first(torch.where(ranked, ranks, last), draws[0])

    def ranks_in_order(
        self, candidates: Candidates, images: Images
    ) -> tuple[Tensor, Tensor] | None:
        """
        Return the Score-HLR, and as its divisor the number to choose or the number of ranked
        candidates, whichever is larger. Candidates drawn at random have the last rank.
        """
        layout = images.layout
        # In each image, candidates are in the order of their ranks; the random ones come last.
        num_ranked = layout.counts(candidates.predictions.scores > self.score_thresh)
        last = (num_ranked - 1).clamp(min=0)
        n_max = num_ranked.maximum(images.nums_on_device)
        return layout.positions.minimum(last[layout.images]), n_max
