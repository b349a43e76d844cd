"""Samplers of one kind, and what chooses for a whole batch."""

from typing import Any, ClassVar

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import nonzero_tuple
from fvcore.common.registry import Registry
from torch import Tensor

from ..reweighting import importance
from ..settings import check_positive
from .candidates import Candidates, Choice, Quota, is_positive

PROPOSAL_SAMPLER_REGISTRY = Registry("PROPOSAL_SAMPLER")
PROPOSAL_SAMPLER_REGISTRY.__doc__ = """
Samplers choose the proposals that are trained on. The NAME in a node such as
``MODEL.ROI_HEADS.POSITIVE_SAMPLER`` or ``NEGATIVE_SAMPLER`` picks one.

A registered class is one of

* a :class:`ProposalSampler`, for the positives or the negatives of each image;
* a :class:`BatchSampler`, for both kinds of all images together: both nodes name it.

It is called with ``cfg`` and the node that names it, and translates them in ``from_config``; or
with ``cfg`` alone, if its constructor takes that as a positional argument.
"""

POSITIVE, NEGATIVE = "positive", "negative"


class ProposalSampler:
    """
    Base class of samplers that choose among the positives, or the negatives, of one image.

    Attributes:
        kinds: the kinds that it serves, "positive" or "negative" or both.
        needs_predictions: whether ``candidates.predictions`` must be there. They cost one pass of
            the box head over all proposals per step, which all samplers share.
        settings: the node, in the one that names the sampler, that has its settings: each key is
            an argument of the constructor in capitals. Empty if it has none.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({POSITIVE, NEGATIVE})
    needs_predictions: ClassVar[bool] = False
    settings: ClassVar[str] = ""

    @configurable
    def __init__(self) -> None:
        pass

    @classmethod
    def from_config(cls, cfg: CfgNode, node: CfgNode | None = None) -> dict[str, Any]:
        """
        Args:
            cfg: the whole config.
            node: the node that names the sampler; ``MODEL.ROI_HEADS.NEGATIVE_SAMPLER`` by default.
        """
        if not cls.settings:
            return {}
        node = cfg.MODEL.ROI_HEADS.NEGATIVE_SAMPLER if node is None else node
        return {key.lower(): value for key, value in node[cls.settings].items()}

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
            int64, the rank of each of the chosen, and the number () that ranks are divided by.
            None if there are none: ISR-N then ranks the chosen among themselves.
        """
        return None


class BatchSampler:
    """
    Base class of samplers that choose for the whole batch.

    Attributes:
        needs_predictions: as in :class:`ProposalSampler`.
    """

    needs_predictions: bool = False

    def __call__(self, batch: list[Candidates], quota: Quota) -> list[Choice]:
        """
        Args:
            batch: all proposals of each image, of class -1 where they are ignored.
            quota: how many to choose.

        Returns:
            The choice of each image.
        """
        raise NotImplementedError

    def __str__(self) -> str:
        return type(self).__name__


@PROPOSAL_SAMPLER_REGISTRY.register()
class RandomSampler(ProposalSampler):
    """Each candidate is as likely as any other: stock Detectron2's sampling, draw for draw."""

    def __call__(self, candidates: Candidates, num: int) -> Tensor:
        return torch.randperm(len(candidates), device=candidates.device)[:num]


class PairSampler(BatchSampler):
    """
    Samples each image by itself, as Detectron2 does: positives up to their fraction by one sampler,
    then negatives up to the number of samples by another.
    """

    def __init__(
        self,
        *,
        positive: ProposalSampler,
        negative: ProposalSampler,
        max_negatives_per_positive: float | None = None,
    ) -> None:
        """
        Args:
            positive, negative: the samplers.
            max_negatives_per_positive: how many negatives are chosen at most, of an image, for each
                chosen positive, or for one where there is none; above 0, None for no limit.

        Raises:
            ValueError: a sampler does not serve the kind that it is given for, or the limit is not
                above 0.
        """
        if max_negatives_per_positive is not None:
            check_positive("max_negatives_per_positive", max_negatives_per_positive)
        for kind, sampler in ((POSITIVE, positive), (NEGATIVE, negative)):
            if kind not in sampler.kinds:
                raise ValueError(
                    f"{kind} = {type(sampler).__name__} is not allowed: it chooses "
                    f"{' and '.join(sorted(sampler.kinds))} samples."
                )
        self.positive = positive
        self.negative = negative
        self.max_negatives_per_positive = max_negatives_per_positive
        self.needs_predictions = positive.needs_predictions or negative.needs_predictions

    def __str__(self) -> str:
        positive, negative = type(self.positive).__name__, type(self.negative).__name__
        return f"{positive} (positives) and {negative} (negatives)"

    def __call__(self, batch: list[Candidates], quota: Quota) -> list[Choice]:
        return [self._choose(candidates, quota) for candidates in batch]

    def _choose(self, candidates: Candidates, quota: Quota) -> Choice:
        num = quota.num_per_image
        positives = nonzero_tuple(is_positive(candidates.classes, quota.num_classes))[0]
        negatives = nonzero_tuple(candidates.classes == quota.num_classes)[0]
        num_positives = int(num * quota.positive_fraction)
        positives = positives[self.positive(candidates.select(positives), num_positives)]

        num -= len(positives)
        if self.max_negatives_per_positive is not None:
            num = min(num, int(self.max_negatives_per_positive * max(len(positives), 1)))
        of_kind = candidates.select(negatives)
        chosen = self.negative(of_kind, num)
        ranks = self.negative.ranks(of_kind, chosen, num)
        return Choice(positives, negatives[chosen], None if ranks is None else importance(*ranks))


def lowest(ranks: Tensor, num: int) -> Tensor:
    """Indices of the ``num`` lowest ranks, from the lowest up, at random among equal ones."""
    # A fresh draw: reusing the ranks would favour leftovers of small groups. In float64, the
    # tie-breaker survives being added to a large rank.
    ties = torch.rand(len(ranks), dtype=torch.float64, device=ranks.device)
    return (ranks + ties).argsort()[:num]
