"""From the proposals of an image, matched to its objects, to those that are trained on."""

from typing import NamedTuple, TypeGuard

import torch
from detectron2.layers import nonzero_tuple
from torch import Tensor

from ..samplers import Candidates, ProposalSampler
from ..samplers.predicted import HardSampler


class Choice(NamedTuple):
    """
    Attributes:
        positives, negatives: int64, indices of the chosen proposals of an image.
        ranks: of the chosen negatives, see :meth:`ProposalSampler.ranks`.
    """

    positives: Tensor
    negatives: Tensor
    ranks: tuple[Tensor, Tensor] | None = None

    @property
    def indices(self) -> Tensor:
        """Of both, the positives first."""
        return torch.cat([self.positives, self.negatives])


def is_positive(classes: Tensor, num_classes: int) -> Tensor:
    """Neither ignored (-1) nor background (``num_classes``)."""
    return (classes >= 0) & (classes < num_classes)


def is_joint(sampler: ProposalSampler) -> TypeGuard[HardSampler]:
    """Whether it chooses both kinds together."""
    return isinstance(sampler, HardSampler) and sampler.joint


def choose(
    proposals: Candidates,
    positive_sampler: ProposalSampler,
    negative_sampler: ProposalSampler,
    num: int,
    positive_fraction: float,
    num_classes: int,
) -> Choice:
    """
    Positives up to their fraction, and negatives up to ``num`` in all.

    Args:
        proposals: all proposals of an image, of class -1 where they are ignored.
        num: how many to choose.
        positive_fraction: of ``num``, at most.
        num_classes: number of foreground classes.
    """
    positives = nonzero_tuple(is_positive(proposals.classes, num_classes))[0]
    negatives = nonzero_tuple(proposals.classes == num_classes)[0]
    chosen = positive_sampler(proposals.take(positives), int(num * positive_fraction))
    positives = positives[chosen]

    num -= len(positives)
    candidates = proposals.take(negatives)
    chosen = negative_sampler(candidates, num)
    return Choice(positives, negatives[chosen], negative_sampler.ranks(candidates, chosen, num))


def choose_jointly(
    batch: list[Candidates], sampler: HardSampler, num: int, num_classes: int
) -> list[Choice]:
    """
    The hardest of both kinds in the batch.

    Args:
        batch: all proposals of each image, of class -1 where they are ignored.
        num: how many to choose in all.
        num_classes: number of foreground classes.
    """
    choices = []
    for proposals, chosen in zip(batch, sampler.choose_jointly(batch, num), strict=True):
        positive = is_positive(proposals.classes, num_classes)
        positives, negatives = (nonzero_tuple(chosen & kind)[0] for kind in (positive, ~positive))
        choices.append(Choice(positives, negatives))
    return choices
