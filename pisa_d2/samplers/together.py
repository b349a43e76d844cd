"""Samplers that sort the candidates of all images at once."""

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
    The images whose candidates are sorted.

    Attributes:
        layout: the layout of their candidates.
        nums: the number to choose in each image.
        negative_ranges: the ranges of the images, see :class:`Candidates`.
    """

    layout: ImageLayout
    nums: list[int]
    negative_ranges: list[tuple[Any, Any]]

    @property
    def nums_on_device(self) -> Tensor:
        """Return ``nums`` as a tensor, int64 (B,)."""
        return repeated(self.nums, [1] * len(self.nums), self.layout.device)

    def repeat(self, numbers: list[int]) -> Tensor:
        """Give each candidate the number of its image, at least 0: int64 (N,)."""
        return repeated(numbers, self.layout.num_samples, self.layout.device)

    def spread(self, values: Sequence[float | Tensor]) -> float | Tensor:
        """Give each candidate the value of its image, (N,); one number if all are the same."""
        if not any(isinstance(value, Tensor) for value in values) and len(set(values)) == 1:
            return values[0]
        of_images = [torch.as_tensor(value, device=self.layout.device) for value in values]
        return torch.stack(of_images)[self.layout.images]

    def order(self, order: Tensor) -> Tensor:
        """Sort an order (N,) of all candidates by image, and keep the order within each image."""
        return refine_order(order, self.layout.images)

    def lowest_first(self, ranks: Tensor, ties: Tensor) -> Tensor:
        """
        Sort candidates by rising rank in each image.

        Args:
            ranks: integer (N,).
            ties: float64 (N,), in [0, 1), which decide between equal ranks. They must be a fresh
                draw: reusing the draw of the ranks would favour leftovers of small groups. In
                float64 they survive being added to a large rank.

        Returns:
            int64 (N,), the indices of the candidates in this order.
        """
        return self.order((ranks + ties).argsort())


class TogetherSampler(ProposalSampler):
    """
    Base class of samplers that sort the candidates of all images at once, which takes a fraction of
    the operators on a GPU. The choice in an image does not depend on the other images.
    """

    def draw(self, num: int, device: torch.device) -> tuple[Tensor, ...]:
        """Draw random numbers (num,) for the candidates of one image; called image after image."""
        return ()

    def order(self, candidates: Candidates, images: Images, *draws: Tensor) -> Tensor:
        """
        Sort candidates, so that the first ones of each image are chosen.

        Args:
            candidates: N in all, the positives or the negatives of each image, image after image.
            images: the images of the candidates.
            draws: (N,), the results of :meth:`draw` for each image, concatenated.

        Returns:
            int64 (N,), indices of all candidates, image after image.
        """
        raise NotImplementedError

    def ranks_in_order(
        self, candidates: Candidates, images: Images
    ) -> tuple[Tensor, Tensor] | None:
        """
        Return what :meth:`ranks` returns, for all images: int64 (N,), ranks in the order of
        :meth:`order`, and int64 (B,), the number that ranks in each image are divided by.
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
    """Return whether a sampler chooses by its order, and no subclass overrides the call."""
    return isinstance(sampler, TogetherSampler) and all(
        getattr(type(sampler), name) is getattr(TogetherSampler, name)
        for name in ("__call__", "ranks")
    )
