"""Samplers that put the candidates of all images in order in one go."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ordering import refine_order
from ..ranking import ImageLayout, repeated
from .candidates import Candidates
from .sampler import ProposalSampler


class Images(NamedTuple):
    """
    The images whose candidates are put in order.

    Attributes:
        layout: of their candidates.
        nums: how many to choose in each image.
        negative_ranges: of each image, see :class:`Candidates`.
    """

    layout: ImageLayout
    nums: list[int]
    negative_ranges: list[tuple[Any, Any]]

    @property
    def nums_on_device(self) -> Tensor:
        """``nums``, int64 (B,)."""
        return repeated(self.nums, [1] * len(self.nums), self.layout.device)

    def repeat(self, numbers: list[int]) -> Tensor:
        """int64 (N,), for each candidate the number, at least 0, of its image."""
        return repeated(numbers, self.layout.num_samples, self.layout.device)

    def spread(self, values: Sequence[float | Tensor]) -> float | Tensor:
        """For each candidate (N,) the value of its image; the value itself if all are the same."""
        if not any(isinstance(value, Tensor) for value in values) and len(set(values)) == 1:
            return values[0]
        of_images = [torch.as_tensor(value, device=self.layout.device) for value in values]
        return torch.stack(of_images)[self.layout.images]

    def order(self, order: Tensor) -> Tensor:
        """An order (N,) of all candidates, brought into the sequence of the images."""
        return refine_order(order, self.layout.images)

    def lowest_first(self, ranks: Tensor, ties: Tensor) -> Tensor:
        """
        The order (N,) of rising rank in each image.

        Args:
            ties: float64 (N,), in [0, 1), which decide between equal ranks; a draw of their own,
                since reusing others would favour leftovers of small groups. In float64 they
                survive being added to a large rank.
        """
        return self.order((ranks + ties).argsort())


class TogetherSampler(ProposalSampler):
    """
    Base class of samplers that put the candidates of all images in order in one go, which takes a
    GPU a fraction of the operators. What they choose in an image does not depend on the others.
    """

    def draw(self, num: int, device: torch.device) -> tuple[Tensor, ...]:
        """Random numbers (num,) for the candidates of an image, drawn image after image."""
        return ()

    def order(self, candidates: Candidates, images: Images, *draws: Tensor) -> Tensor:
        """
        Args:
            candidates: N in all, the positives or the negatives of each image, image after image.
            images: theirs.
            draws: (N,), what :meth:`draw` gave for each image, put together.

        Returns:
            int64 (N,), indices of all candidates, image after image; in each image, the first
            are chosen.
        """
        raise NotImplementedError

    def ranks_in_order(
        self, candidates: Candidates, images: Images
    ) -> tuple[Tensor, Tensor] | None:
        """
        As :meth:`ranks`, of all images: int64 (N,), ranks in the sequence of :meth:`order`, and
        int64 (B,), what those of each image are divided by.
        """
        return None

    def __call__(self, candidates: Candidates, num: int) -> Tensor:
        draws = self.draw(len(candidates), candidates.device)
        return self.order(candidates, _one_image(candidates, num), *draws)[:num]

    def ranks(
        self, candidates: Candidates, chosen: Tensor, num: int
    ) -> tuple[Tensor, Tensor] | None:
        """See :meth:`ProposalSampler.ranks`."""
        ranks = self.ranks_in_order(candidates, _one_image(candidates, num))
        return None if ranks is None else (ranks[0][: len(chosen)], ranks[1][0])


def _one_image(candidates: Candidates, num: int) -> Images:
    layout = ImageLayout([len(candidates)], candidates.device)
    return Images(layout, [num], [candidates.negative_range])


def chooses_together(sampler: ProposalSampler) -> bool:
    """Whether a sampler goes by its order alone, and no subclass by a call of its own."""
    return isinstance(sampler, TogetherSampler) and all(
        getattr(type(sampler), name) is getattr(TogetherSampler, name)
        for name in ("__call__", "ranks")
    )
