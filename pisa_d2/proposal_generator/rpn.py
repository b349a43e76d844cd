from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.memory import retry_if_cuda_oom
from torch import Tensor

from ..config import ignored_ioa_thresh, look_up
from ..matcher import match_by_iou
from ..regions import ignore_inside, warn_of_gaps
from ..samplers import (
    PROPOSAL_SAMPLER_REGISTRY,
    Candidates,
    PairSampler,
    ProposalSampler,
    Quota,
    RandomSampler,
    build_proposal_sampler,
)
from ..scalars import log_ignored
from ..settings import SettingError, check_count, check_ioa_thresh

_KINDS = ("positive_sampler", "negative_sampler")


@PROPOSAL_GENERATOR_REGISTRY.register()
class PISARPN(RPN):
    """
    :class:`RPN` with samplers and regions to ignore.

    Everything else is that of the stock one: parameters, losses and inference; with the random
    samplers, no limit and no regions, so are the random draws.

    Attributes:
        sampler: the :class:`pisa_d2.samplers.PairSampler` that chooses the anchors.
        ignored_ioa_thresh: see :meth:`__init__`.
    """

    ignores_regions = True

    @configurable
    def __init__(
        self,
        *,
        positive_sampler: ProposalSampler | None = None,
        negative_sampler: ProposalSampler | None = None,
        max_negatives_per_positive: float | None = None,
        ignored_ioa_thresh: float | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            positive_sampler, negative_sampler: choose among the positive, and the negative,
                anchors of each image; at random by default.
            max_negatives_per_positive: see :class:`pisa_d2.samplers.PairSampler`.
            ignored_ioa_thresh: negatives with at least this share of their area inside a region to
                ignore are ignored, in (0, 1]; None to ignore no regions.
            kwargs: arguments of :class:`RPN`.

        Raises:
            ValueError: a sampler needs predictions or does not serve its kind, or a number is out
                of its range.
        """
        super().__init__(**kwargs)
        for name, sampler in zip(_KINDS, (positive_sampler, negative_sampler), strict=True):
            if sampler is not None and sampler.needs_predictions:
                raise _needs_predictions(name, type(sampler).__name__)
        if ignored_ioa_thresh is not None:
            check_ioa_thresh("ignored_ioa_thresh", ignored_ioa_thresh)
        self.sampler = PairSampler(
            positive=positive_sampler or RandomSampler(),
            negative=negative_sampler or RandomSampler(),
            max_negatives_per_positive=max_negatives_per_positive,
        )
        self.ignored_ioa_thresh = ignored_ioa_thresh

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        for name in _KINDS:
            key = f"MODEL.RPN.{name.upper()}.NAME"
            named = cfg.MODEL.RPN[name.upper()].NAME
            sampler = look_up(PROPOSAL_SAMPLER_REGISTRY, key, named)
            if sampler.needs_predictions:
                raise _needs_predictions(key, named)
        warn_of_gaps(cfg)
        limit = cfg.MODEL.RPN.MAX_NEGATIVES_PER_POSITIVE
        if limit != -1:
            check_count("MODEL.RPN.MAX_NEGATIVES_PER_POSITIVE", limit, 1)
        return {
            **super().from_config(cfg, input_shape),
            **{name: build_proposal_sampler(cfg, name.upper(), "MODEL.RPN") for name in _KINDS},
            "max_negatives_per_positive": None if limit == -1 else limit,
            "ignored_ioa_thresh": ignored_ioa_thresh(cfg),
        }

    @torch.jit.unused
    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """As in :class:`RPN`, but the samplers choose the anchors."""
        boxes = Boxes.cat(anchors)
        batch = [self._match(boxes, targets) for targets in gt_instances]
        if self.ignored_ioa_thresh is not None:
            classes = [candidates.classes for candidates in batch]
            every_box = [boxes.tensor] * len(batch)
            log_ignored("anchors", classes, every_box, gt_instances, self.ignored_ioa_thresh)
        choices = self.sampler(batch, Quota(self.batch_size_per_image, self.positive_fraction, 1))
        labels, gt_boxes = [], []
        for candidates, targets, choice in zip(batch, gt_instances, choices, strict=True):
            chosen = torch.full_like(candidates.classes, -1, dtype=torch.int8)
            chosen.scatter_(0, choice.positives, 1).scatter_(0, choice.negatives, 0)
            labels.append(chosen)
            own = targets.gt_boxes.tensor
            gt_boxes.append(
                own[candidates.objects] if len(targets) else torch.zeros_like(boxes.tensor)
            )
        return labels, gt_boxes

    def _match(self, anchors: Boxes, targets: Instances) -> Candidates:
        """The anchors of an image; as with one class, positives are 0 and negatives 1."""
        # Matching takes much memory: as in the stock RPN, the CPU may have to lend its own.
        ious = retry_if_cuda_oom(pairwise_iou)(targets.gt_boxes, anchors)
        match = retry_if_cuda_oom(match_by_iou)(self.anchor_matcher, ious)
        labels = match.labels.to(anchors.device)
        if self.anchor_boundary_thresh >= 0:
            inside = anchors.inside_box(targets.image_size, self.anchor_boundary_thresh)
            labels = labels.masked_fill(~inside, -1)
        labels = ignore_inside(labels, 0, anchors.tensor, targets, self.ignored_ioa_thresh)
        return Candidates(
            anchors.tensor,
            match.ious.to(anchors.device),
            match.objects.to(anchors.device),
            (1 - labels.long()).masked_fill(labels == -1, -1),
            negative_range=match.negative_range,
        )


def _needs_predictions(name: str, sampler: str) -> SettingError:
    served = sorted(known for known, cls in PROPOSAL_SAMPLER_REGISTRY if not cls.needs_predictions)
    return SettingError(
        name,
        sampler,
        "it goes by predictions of the box head, which come after the RPN; those that do not are "
        f"{served}",
    )
