"""Matching of proposals to objects."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances, pairwise_iou
from fvcore.common.registry import Registry
from torch import Tensor

from .config import look_up
from .settings import SettingError, naming_keys

PROPOSAL_MATCHER_REGISTRY = Registry("PROPOSAL_MATCHER")
PROPOSAL_MATCHER_REGISTRY.__doc__ = """
Matchers decide which object a proposal belongs to, and whether it is positive, negative or ignored.

The registered class is called with ``cfg`` and returns a :class:`ProposalMatcher`.
"""


class Match(NamedTuple):
    """
    The result of matching N proposals or anchors.

    Attributes:
        objects: int64 (N,), index of the matched object; 0 in an image without objects.
        labels: int8 (N,), 1 for positive, 0 for negative, -1 for ignored.
        ious: floating (N,), IoU with the matched object; 0 in an image without objects.
        negative_range: the lowest and the highest IoU of negatives: numbers, or tensors ().
    """

    objects: Tensor
    labels: Tensor
    ious: Tensor
    negative_range: tuple[float, float] = (0.0, 1.0)


def _negative_range(matcher: Matcher) -> tuple[float, float]:
    ends = [max(0.0, min(1.0, end)) for end in matcher.thresholds]  # the ends are infinite
    levels = [
        level for level, label in zip(pairwise(ends), matcher.labels, strict=True) if label == 0
    ]
    if not levels:
        return 0.0, 1.0
    return min(low for low, _ in levels), max(high for _, high in levels)


def match_by_iou(matcher: Matcher, ious: Tensor) -> Match:
    """
    Match with any of Detectron2's matchers, and add the IoU and the range of the negatives' IoU.

    Args:
        ious: floating (M, N), of M objects with N proposals.
    """
    objects, labels = matcher(ious)
    matched = ious.gather(0, objects[None])[0] if len(ious) else ious.new_zeros(len(objects))
    return Match(objects, labels, matched, _negative_range(matcher))


class ProposalMatcher(Matcher):
    """
    Detectron2's :class:`Matcher`, which it can replace anywhere, with two methods to override:
    :meth:`match` for a rule that uses the IoU, :meth:`match_boxes` for a rule that uses the boxes
    or any field of the objects.
    """

    # TorchScript compiles only the methods of the class itself, not those of its bases.
    __init__ = Matcher.__init__
    __call__ = Matcher.__call__
    set_low_quality_matches_ = Matcher.set_low_quality_matches_

    @torch.jit.unused
    def match(self, ious: Tensor) -> Match:
        """
        Match by the IoU.

        Args:
            ious: floating (M, N), of M objects with N proposals.
        """
        return match_by_iou(self, ious)

    @torch.jit.unused
    def match_boxes(self, boxes: Boxes, targets: Instances) -> Match:
        """
        Match by boxes and targets.

        Args:
            boxes: N proposals or anchors.
            targets: the M objects of the image, with ``gt_boxes``, ``gt_classes`` and any other
                field that the dataset mapper adds.
        """
        return self.match(pairwise_iou(targets.gt_boxes, boxes))


def match_boxes(matcher: Matcher, boxes: Boxes, targets: Instances) -> Match:
    """Match with a :class:`ProposalMatcher`, or by the IoU alone with Detectron2's matcher."""
    if isinstance(matcher, ProposalMatcher):
        return matcher.match_boxes(boxes, targets)
    return match_by_iou(matcher, pairwise_iou(targets.gt_boxes, boxes))


def has_own_rule(matcher: Matcher) -> bool:
    """Return whether a matcher's class overrides a method of :class:`ProposalMatcher`."""
    return isinstance(matcher, ProposalMatcher) and (
        type(matcher).match is not ProposalMatcher.match
        or type(matcher).match_boxes is not ProposalMatcher.match_boxes
    )


def may_ignore(matcher: Matcher) -> bool:
    """Return whether a matcher might label proposals -1, without calling it."""
    own_rule = has_own_rule(matcher)
    return own_rule or type(matcher).__call__ is not Matcher.__call__ or -1 in matcher.labels


@PROPOSAL_MATCHER_REGISTRY.register()
class IoUMatcher(ProposalMatcher):
    """
    Detectron2's matching: each proposal belongs to the object that it overlaps most, and thresholds
    decide whether it is positive, negative or ignored.
    """

    @configurable
    def __init__(
        self,
        *,
        thresholds: Sequence[float] = (0.5,),
        labels: Sequence[int] = (0, 1),
        allow_low_quality_matches: bool = False,
    ) -> None:
        """
        Args:
            thresholds: IoUs above 0 in rising order, which cut [0, 1] into levels.
            labels: the label of each level, from the lowest: 1 positive, 0 negative, -1 ignored.
            allow_low_quality_matches: see :class:`Matcher`.

        Raises:
            SettingError: thresholds or labels are not as described.
        """
        rising = all(low <= high for low, high in pairwise(thresholds))
        if not rising or any(not threshold > 0 for threshold in thresholds):
            raise SettingError("thresholds", thresholds, "they must rise and be above 0")
        if len(labels) != len(thresholds) + 1 or not set(labels) <= {-1, 0, 1}:
            allowed = f"it must have {len(thresholds) + 1} of -1, 0 and 1, one per level of IoU"
            raise SettingError("labels", labels, allowed)
        super().__init__(list(thresholds), list(labels), allow_low_quality_matches)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        heads = cfg.MODEL.ROI_HEADS
        return {"thresholds": heads.IOU_THRESHOLDS, "labels": heads.IOU_LABELS}


def build_proposal_matcher(cfg: CfgNode, iou: float | None = None) -> ProposalMatcher:
    """
    Build the matcher that ``MODEL.ROI_HEADS.PROPOSAL_MATCHER`` names.

    Args:
        iou: the threshold of a stage of a cascade. In the config that the matcher sees, it is the
            only one of ``IOU_THRESHOLDS``, with the ``IOU_LABELS`` [0, 1].

    Raises:
        ValueError: the name is not registered, or a setting of the matcher is not allowed.
    """
    key = "MODEL.ROI_HEADS.PROPOSAL_MATCHER"
    cls = look_up(PROPOSAL_MATCHER_REGISTRY, key, cfg.MODEL.ROI_HEADS.PROPOSAL_MATCHER)
    if iou is not None:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS, cfg.MODEL.ROI_HEADS.IOU_LABELS = [iou], [0, 1]
    with naming_keys("MODEL.ROI_HEADS", thresholds="IOU_THRESHOLDS", labels="IOU_LABELS"):
        return cls(cfg)
