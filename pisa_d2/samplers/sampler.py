from typing import NamedTuple

import torch
from detectron2.config import CfgNode
from fvcore.common.registry import Registry
from torch import Tensor

from ..config import look_up

PROPOSAL_SAMPLER_REGISTRY = Registry("PROPOSAL_SAMPLER")
PROPOSAL_SAMPLER_REGISTRY.__doc__ = """
What chooses the positives, or the negatives, that an image contributes to the training batch.

The registered class is called with ``cfg`` and gives a :class:`ProposalSampler`, by the names
``MODEL.ROI_HEADS.POSITIVE_SAMPLER.NAME`` and ``NEGATIVE_SAMPLER.NAME``.
"""


class Predictions(NamedTuple):
    """
    What the box head makes of the candidates under the current weights, without gradient.

    Attributes:
        cls_losses: floating (N,), classification losses.
        box_losses: floating (N,), box losses times their weight; 0 for negatives.
        scores: floating (N,), highest foreground probability.
        boxes: floating (N, 4), XYXY in pixels, regressed for the class of the matched object
            (positives) or for the highest-scored class (negatives).
        ious: floating (N,), IoU of these boxes with the matched object.
    """

    cls_losses: Tensor
    box_losses: Tensor
    scores: Tensor
    boxes: Tensor
    ious: Tensor

    def take(self, rows: Tensor) -> "Predictions":
        """Those of some candidates, by their indices."""
        return Predictions(*(values[rows] for values in self))


class Candidates(NamedTuple):
    """
    The positives, or the negatives, of one image. Ignored proposals are among neither.

    Attributes:
        boxes: floating (N, 4), XYXY in pixels.
        ious: floating (N,), IoU with the matched object; 0 where the image has none.
        objects: int64 (N,), index in the image of the matched object; 0 where the image has none.
        classes: int64 (N,), its class; the number of classes for negatives.
        predictions: made if the sampler of either kind ``needs_predictions``, otherwise None.
    """

    boxes: Tensor
    ious: Tensor
    objects: Tensor
    classes: Tensor
    predictions: Predictions = None  # type: ignore[assignment]  # there when asked for

    def take(self, rows: Tensor) -> "Candidates":
        """Some of them, by their indices."""
        return Candidates(
            self.boxes[rows],
            self.ious[rows],
            self.objects[rows],
            self.classes[rows],
            self.predictions and self.predictions.take(rows),
        )


class ProposalSampler:
    """
    Base class. A sampler reads its settings from ``cfg`` and never changes them later.

    Attributes:
        needs_predictions: whether ``candidates.predictions`` must be there. They cost a pass of
            the box head over all proposals, one for the positive and the negative sampler of all
            images together.
    """

    needs_predictions = False

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

    def ranks(
        self, candidates: Candidates, chosen: Tensor, num: int
    ) -> tuple[Tensor, Tensor] | None:
        """
        The ranks by which the sampler chose negatives, for ISR-N to weigh them by.

        Args:
            candidates, num: as in the call.
            chosen: what it returned.

        Returns:
            int64, the rank of each of the chosen, and the number () that ranks are measured by.
            None if there are none: ISR-N then ranks the chosen among themselves.
        """
        return None


@PROPOSAL_SAMPLER_REGISTRY.register()
class RandomSampler(ProposalSampler):
    """Each candidate is as likely as any other: stock Detectron2's sampling, draw for draw."""

    def __call__(self, candidates: Candidates, num: int) -> Tensor:
        return torch.randperm(len(candidates.ious), device=candidates.ious.device)[:num]


def lowest(ranks: Tensor, num: int) -> Tensor:
    """Indices of the ``num`` lowest ranks, from the lowest up, at random among equal ones."""
    # Drawn anew: who waits after the shares are dealt out has a low number in a small group. In
    # double precision it still orders candidates when it is added to a rank.
    ties = torch.rand(len(ranks), dtype=torch.float64, device=ranks.device)
    return (ranks + ties).argsort()[:num]


def build_proposal_sampler(cfg: CfgNode, kind: str) -> ProposalSampler:
    """
    Args:
        kind: "POSITIVE_SAMPLER" or "NEGATIVE_SAMPLER".

    Raises:
        ValueError: its NAME is no registered one.
    """
    name = cfg.MODEL.ROI_HEADS[kind].NAME
    return look_up(PROPOSAL_SAMPLER_REGISTRY, f"MODEL.ROI_HEADS.{kind}.NAME", name)(cfg)
