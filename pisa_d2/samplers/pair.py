"""A sampler of batches that takes positives from one sampler and negatives from another."""

import torch
from detectron2.layers import nonzero_tuple
from torch import Tensor

from ..ordering import gather_rows
from ..ranking import ImageLayout
from ..reweighting import importance
from ..settings import check_positive
from .candidates import Candidates, Choice, Joined, Quota, is_positive, needed_predictions
from .sampler import NEGATIVE, POSITIVE, BatchSampler, ProposalSampler
from .together import Images, TogetherSampler, chooses_together


class PairSampler(BatchSampler):
    """
    Sample each image by itself, as Detectron2 does: positives up to their fraction with one
    sampler, then negatives up to the number of samples with another.
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
            max_negatives_per_positive: the largest number of negatives per chosen positive in an
                image; without a positive, as many as for one. Above 0, None for no limit.

        Raises:
            ValueError: a sampler does not choose the kind that it is given for, or needs
                predictions that do not exist; or the limit is not above 0.
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
        self.needs_predictions = needed_predictions(
            {
                *needed_predictions(positive.needs_predictions),
                *needed_predictions(negative.needs_predictions),
            }
        )

    def __str__(self) -> str:
        positive, negative = type(self.positive).__name__, type(self.negative).__name__
        return f"{positive} (positives) and {negative} (negatives)"

    def __call__(self, batch: list[Candidates], quota: Quota) -> list[Choice]:
        if not batch:
            return []
        joined = Joined(batch)
        layout = ImageLayout([len(candidates) for candidates in batch], joined.device)
        masks = is_positive(joined.classes, quota.num_classes), joined.classes == quota.num_classes
        counts = torch.stack([layout.counts(mask) for mask in masks]).tolist()
        positives, negatives = (
            _turn_of(sampler, batch, joined, nonzero_tuple(mask)[0], layout.positions, nums)
            for sampler, mask, nums in zip(
                (self.positive, self.negative), masks, counts, strict=True
            )
        )
        # In the order in which Detectron2 draws its random numbers.
        for image in range(len(batch)):
            num = positives.take(image, int(quota.num_per_image * quota.positive_fraction))
            negatives.take(image, self._most_negatives(quota.num_per_image - num, num))
        of_images = zip(positives.rows(), negatives.rows(), negatives.importance(), strict=True)
        return [Choice(*of_image) for of_image in of_images]

    def _most_negatives(self, num: int, num_positives: int) -> int:
        if self.max_negatives_per_positive is None:
            return num
        return min(num, int(self.max_negatives_per_positive * max(num_positives, 1)))


class _OneByOne:
    """A sampler that chooses among the positives or the negatives of one image after another."""

    def __init__(self, sampler: ProposalSampler, of_images: list[Candidates], rows: list[Tensor]):
        self._sampler, self._of_images, self._rows = sampler, of_images, rows
        self._chosen: list[Tensor] = []
        self._importance: list[Tensor | None] = []

    def take(self, image: int, num: int) -> int:
        """Choose up to ``num`` candidates of the next image, and return how many."""
        candidates = self._of_images[image]
        chosen = self._sampler(candidates, num)
        ranks = self._sampler.ranks(candidates, chosen, num)
        self._chosen.append(self._rows[image][chosen])
        self._importance.append(None if ranks is None else _importance(*ranks))
        return len(chosen)

    def rows(self) -> list[Tensor]:
        """Return the indices of the chosen in each image, int64."""
        return self._chosen

    def importance(self) -> list[Tensor | None]:
        """Return the importance of the chosen in each image, see :class:`Choice`."""
        return self._importance


class _Together:
    """The same as :class:`_OneByOne`, in all images at once."""

    def __init__(
        self, sampler: TogetherSampler, candidates: Candidates, images: Images, rows: Tensor
    ) -> None:
        self._sampler, self._candidates, self._images = sampler, candidates, images
        self._rows = rows
        self._draws: list[tuple[Tensor, ...]] = []

    def take(self, image: int, num: int) -> int:
        size = self._images.layout.num_samples[image]
        self._draws.append(self._sampler.draw(size, self._rows.device))
        self._images.nums.append(num)
        return min(size, num)

    def _of_images(self, values: Tensor) -> list[Tensor]:
        parts = values.split(self._images.layout.num_samples)
        return [part[:num] for part, num in zip(parts, self._images.nums, strict=True)]

    def rows(self) -> list[Tensor]:
        draws = (torch.cat(parts) for parts in zip(*self._draws, strict=True))
        order = self._sampler.order(self._candidates, self._images, *draws)
        return self._of_images(gather_rows(self._rows, order))

    def importance(self) -> list[Tensor] | list[None]:
        ranks = self._sampler.ranks_in_order(self._candidates, self._images)
        if ranks is None:
            return [None] * len(self._images.nums)
        n_max = ranks[1][self._images.layout.images]
        return self._of_images(_importance(ranks[0], n_max))


def _turn_of(
    sampler: ProposalSampler,
    batch: list[Candidates],
    joined: Joined,
    chosen_from: Tensor,
    positions: Tensor,
    counts: list[int],
) -> _OneByOne | _Together:
    """
    Set a sampler to work on one kind of candidates.

    Args:
        chosen_from: int64, the indices in ``joined`` of the candidates of this kind.
        positions: int64, the index in its image of each candidate of ``joined``.
        counts: the number of candidates of this kind in each image.
    """
    rows = gather_rows(positions, chosen_from)
    if isinstance(sampler, TogetherSampler) and chooses_together(sampler):
        ranges = [candidates.negative_range for candidates in batch]
        images = Images(ImageLayout(counts, rows.device), [], ranges)
        return _Together(sampler, joined.select(chosen_from), images, rows)
    of_images = list(rows.split(counts))
    candidates = [c.select(own) for c, own in zip(batch, of_images, strict=True)]
    return _OneByOne(sampler, candidates, of_images)


def _importance(ranks: Tensor, n_max: Tensor) -> Tensor:
    # n_max is 0 if no candidate is to be chosen.
    return importance(ranks, n_max.clamp(min=1))
