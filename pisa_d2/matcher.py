from typing import NamedTuple

from detectron2.config import CfgNode
from detectron2.modeling.matcher import Matcher
from fvcore.common.registry import Registry
from torch import Tensor

from .config import look_up

PROPOSAL_MATCHER_REGISTRY = Registry("PROPOSAL_MATCHER")
PROPOSAL_MATCHER_REGISTRY.__doc__ = """
What decides which object a proposal is matched to, and whether it is positive, negative or ignored.

The registered class is called with ``cfg`` and gives a :class:`ProposalMatcher`.
"""


class Match(NamedTuple):
    """
    Attributes:
        objects: int64 (N,), index of the matched object; 0 where the image has none.
        labels: int8 (N,), 1 for positive, 0 for negative, -1 for ignored.
        ious: floating (N,), IoU with the matched object; 0 where the image has none.
    """

    objects: Tensor
    labels: Tensor
    ious: Tensor


class ProposalMatcher(Matcher):
    """Detectron2's :class:`Matcher`, for which it stands in anywhere, that tells the IoU too."""

    def match(self, ious: Tensor) -> Match:
        """
        Args:
            ious: floating (M, N), of M objects with N proposals.
        """
        objects, labels = self(ious)
        matched = ious.gather(0, objects[None])[0] if len(ious) else ious.new_zeros(len(objects))
        return Match(objects, labels, matched)


@PROPOSAL_MATCHER_REGISTRY.register()
class IoUMatcher(ProposalMatcher):
    """
    Stock matching: each proposal goes to the object it overlaps most, and
    ``MODEL.ROI_HEADS.IOU_THRESHOLDS`` and ``IOU_LABELS`` say what that makes it.
    """

    def __init__(self, cfg: CfgNode) -> None:
        heads = cfg.MODEL.ROI_HEADS
        super().__init__(heads.IOU_THRESHOLDS, heads.IOU_LABELS, allow_low_quality_matches=False)


def build_proposal_matcher(cfg: CfgNode) -> ProposalMatcher:
    """
    Raises:
        ValueError: ``MODEL.ROI_HEADS.PROPOSAL_MATCHER`` is no registered name.
    """
    name = cfg.MODEL.ROI_HEADS.PROPOSAL_MATCHER
    return look_up(PROPOSAL_MATCHER_REGISTRY, "MODEL.ROI_HEADS.PROPOSAL_MATCHER", name)(cfg)
