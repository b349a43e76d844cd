"""An RPN with samplers and regions to ignore."""

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
    BatchSampler,
    Candidates,
    PairSampler,
    Quota,
    RandomSampler,
    build_proposal_sampler,
)
from ..scalars import log_ignored
from ..settings import SettingError, check_count, check_ioa_thresh


@PROPOSAL_GENERATOR_REGISTRY.register()
class PISARPN(RPN):
    """
    :class:`RPN` with samplers and regions to ignore.

    Parameters, losses and inference do not change. With the random samplers, no limit and no
    regions, the random draws are the same too.

    Attributes:
        sampler, ignored_ioa_thresh: see :meth:`__init__`.
    """

    ignores_regions = True

    @configurable
    def __init__(
        self,
        *,
        sampler: BatchSampler | None = None,
        ignored_ioa_thresh: float | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            sampler: chooses the anchors of the batch; by default at random. It sees one foreground
                class, 0.
            ignored_ioa_thresh: negatives with at least this share of their area inside a region to
                ignore are ignored, in (0, 1]; None to ignore no regions.
            kwargs: arguments of :class:`RPN`.

        Raises:
            ValueError: the sampler needs predictions, or ``ignored_ioa_thresh`` is out of range.
        """
        super().__init__(**kwargs)
        if sampler is None:
            sampler = PairSampler(positive=RandomSampler(), negative=RandomSampler())
        if sampler.needs_predictions:
            raise _needs_predictions("sampler", str(sampler))
        if ignored_ioa_thresh is not None:
            check_ioa_thresh("ignored_ioa_thresh", ignored_ioa_thresh)
        self.sampler = sampler
        self.ignored_ioa_thresh = ignored_ioa_thresh

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        warn_of_gaps(cfg)
        return {
            **super().from_config(cfg, input_shape),
            "sampler": build_anchor_sampler(cfg),
            "ignored_ioa_thresh": ignored_ioa_thresh(cfg),
        }

    @torch.jit.unused
    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Label anchors as :class:`RPN` does, but choose them with the sampler."""
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
        """Match the anchors of an image: positives have class 0, negatives 1, as with one class."""
        # Matching takes much memory: as in the stock RPN, it moves to the CPU if a GPU runs out.
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


def build_anchor_sampler(cfg: CfgNode) -> PairSampler:
    """
    Build the sampler of :class:`PISARPN` from ``MODEL.RPN.POSITIVE_SAMPLER``, ``NEGATIVE_SAMPLER``
    and ``MAX_NEGATIVES_PER_POSITIVE``.

    Raises:
        ValueError: a sampler needs predictions; a number is out of range; or see
            :func:`pisa_d2.samplers.build_proposal_sampler`.
    """
    samplers = {}
    for kind in ("positive", "negative"):
        node = f"{kind.upper()}_SAMPLER"
        key, name = f"MODEL.RPN.{node}.NAME", cfg.MODEL.RPN[node].NAME
        if look_up(PROPOSAL_SAMPLER_REGISTRY, key, name).needs_predictions:
            raise _needs_predictions(key, name)
        samplers[kind] = build_proposal_sampler(cfg, node, "MODEL.RPN")
    limit = cfg.MODEL.RPN.MAX_NEGATIVES_PER_POSITIVE
    if limit != -1:
        check_count("MODEL.RPN.MAX_NEGATIVES_PER_POSITIVE", limit, 1)
    return PairSampler(
        positive=samplers["positive"],
        negative=samplers["negative"],
        max_negatives_per_positive=None if limit == -1 else limit,
    )


def _needs_predictions(name: str, sampler: str) -> SettingError:
    served = sorted(known for known, cls in PROPOSAL_SAMPLER_REGISTRY if not cls.needs_predictions)
    return SettingError(
        name,
        sampler,
        f"it needs the box head's predictions, which come after the RPN; choose one of {served}",
    )
