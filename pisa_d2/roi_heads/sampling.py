"""From the proposals of an image, matched to its objects, to those that are trained on."""

from typing import NamedTuple, TypeGuard

import torch
from detectron2.layers import nonzero_tuple
from detectron2.structures import Instances
from torch import Tensor

from ..samplers import Candidates, ProposalSampler
from ..samplers.predicted import HardSampler
from .fast_rcnn import MAX_RANK_FIELD, OBJECT_FIELD, RANK_FIELD


def with_object_ids(targets: list[Instances]) -> list[Instances]:
    """
    Copies of the targets, whose objects are numbered through the batch in ``OBJECT_FIELD``.
    Detectron2 hands every ``gt_`` field of a target to the proposals that match it.
    """
    numbered = []
    first = 0
    for target in targets:
        ids = torch.arange(first, first + len(target), device=target.gt_boxes.device)
        copy = Instances(target.image_size, **target.get_fields())
        copy.set(OBJECT_FIELD, ids)
        numbered.append(copy)
        first += len(target)
    return numbered


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


def take(
    choice: Choice, candidates: Candidates, proposals: Instances, targets: Instances
) -> Instances:
    """
    The chosen proposals of an image, labelled.

    Args:
        choice: among the proposals.
        candidates: the proposals, matched to ``targets``.
        proposals: those of an image, with any fields.
        targets: its objects, whose ``gt_`` fields are handed to the proposals.
    """
    indices = choice.indices
    samples = proposals[indices]
    samples.gt_classes = candidates.classes[indices]
    if choice.ranks is not None:
        ranks, n_max = choice.ranks
        samples.set(RANK_FIELD, torch.cat([torch.zeros_like(choice.positives), ranks]))
        samples.set(MAX_RANK_FIELD, n_max.expand(len(indices)))
    if len(targets) > 0:
        # Every gt_ field of the target goes along, such as masks.
        objects = candidates.objects[indices]
        for name, value in targets.get_fields().items():
            if name.startswith("gt_") and not samples.has(name):
                samples.set(name, value[objects])
    return samples
