"""
The layout of samples by image, and ranks and groups in each image.

Shape shorthand in this module:

    B: number of images
    R: number of samples of all images, image after image
    L: the largest number of samples of an image
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from .boxes import nms_groups
from .devices import suits_gpu
from .hlr import hierarchical_local_rank
from .ordering import gather_rows


def repeated(numbers: Sequence[int], times: Sequence[int], device: torch.device) -> Tensor:
    """
    Repeat numbers, each as often as ``times`` says, without a copy from the host.

    Args:
        numbers: at least 0.

    Returns:
        int64 (sum of times,).
    """
    if not numbers:
        return torch.zeros(0, dtype=torch.int64, device=device)
    every = torch.arange(max(numbers) + 1, device=device)
    return torch.cat([every[n].expand(k) for n, k in zip(numbers, times, strict=True)])


class ImageLayout:
    """
    The places of the samples of B images, image after image.

    Attributes:
        num_samples: number of samples of each image.
        device: the device of the samples.
    """

    def __init__(self, num_samples: Sequence[int], device: torch.device) -> None:
        self.num_samples = list(num_samples)
        self._shape = len(self.num_samples), max(self.num_samples, default=0)
        self.device = device

    @cached_property
    def images(self) -> Tensor:
        """Return the image of each sample, int64 (R,)."""
        return repeated(range(len(self.num_samples)), self.num_samples, self.device)

    @cached_property
    def positions(self) -> Tensor:
        """Return the index of each sample in its image, int64 (R,)."""
        every = torch.arange(self._shape[1], device=self.device)
        return torch.cat([every[:n] for n in self.num_samples] or [every])

    @cached_property
    def _places(self) -> Tensor | None:
        """Return the index of each sample in the padded layout; None if nothing is padded."""
        if len(set(self.num_samples)) <= 1:
            return None
        every = torch.arange(self._shape[0] * self._shape[1], device=self.device)
        rows = every.view(self._shape)
        return torch.cat([row[:n] for row, n in zip(rows, self.num_samples, strict=True)])

    def pad(self, values: Tensor) -> Tensor:
        """Bring (R, *) to (B, L, *), with 0 after the last sample of each image."""
        shape = (*self._shape, *values.shape[1:])
        if self._places is None:
            return values.reshape(shape)
        padded = values.new_zeros(self._shape[0] * self._shape[1], *values.shape[1:])
        return padded.index_copy_(0, self._places, values).view(shape)

    def unpad(self, values: Tensor) -> Tensor:
        """Bring (B, L) back to (R,)."""
        values = values.flatten()
        return values if self._places is None else gather_rows(values, self._places)

    def counts(self, selected: Tensor) -> Tensor:
        """Count the selected samples, bool (R,), of each image: int64 (B,)."""
        return self.pad(selected).sum(dim=1)


def rank_negatives(
    boxes: Tensor, scores: Tensor, eligible: Tensor, layout: ImageLayout, nms_thresh: float
) -> Tensor:
    """
    Rank negatives by Score-HLR in each image (the paper's section 4.2): NMS of their regressed
    boxes forms groups, and scores rank the samples. Samples that are not eligible get the last rank
    of their image.

    Args:
        boxes: floating (R, 4), regressed boxes, XYXY in pixels.
        scores: floating (R,), highest foreground probability.
        eligible: bool (R,), the samples to rank.
        layout: the layout of the B images.
        nms_thresh: IoU above which boxes join a group.

    Returns:
        int64 (R,); 0 for all samples of an image in which none is eligible.
    """
    if len(scores) == 0:
        return torch.zeros_like(scores, dtype=torch.int64)
    groups = groups_of_eligible(boxes, scores, eligible, layout, nms_thresh)
    ranks = hierarchical_local_rank(scores, groups, torch.where(eligible, layout.images, -1))
    return torch.where(eligible, ranks, last_ranks(eligible, layout))


def last_ranks(eligible: Tensor, layout: ImageLayout) -> Tensor:
    """
    Find the last rank of each sample's image.

    Args:
        eligible: bool (R,), the samples that are ranked.

    Returns:
        int64 (R,); 0 in an image without eligible samples.
    """
    return gather_rows((layout.counts(eligible) - 1).clamp(min=0), layout.images)


def groups_of_eligible(
    boxes: Tensor, scores: Tensor, eligible: Tensor, layout: ImageLayout, nms_thresh: float
) -> Tensor:
    """
    Group the eligible samples of each image by NMS.

    Args:
        boxes, scores, eligible, layout, nms_thresh: see :func:`rank_negatives`.

    Returns:
        int64 (R,), equal for the samples of a group in an image; meaningless for samples that are
        not eligible.
    """
    if suits_gpu(scores):
        # Selecting the eligible would copy to the host; boxes without area join no group.
        boxes = torch.where(eligible[:, None], boxes, 0.0)
        return groups_in_images(boxes, scores, layout, nms_thresh)
    groups = torch.zeros_like(scores, dtype=torch.int64)
    eligible_layout = ImageLayout(layout.counts(eligible).tolist(), scores.device)
    groups[eligible] = groups_in_images(
        boxes[eligible], scores[eligible], eligible_layout, nms_thresh
    )
    return groups


def groups_in_images(
    boxes: Tensor,
    scores: Tensor,
    layout: ImageLayout,
    nms_thresh: float,
    partitions: Tensor | None = None,
) -> Tensor:
    """
    Apply :func:`pisa_d2.hlr.nms_groups` to each image, in one pass over padded images.

    Args:
        boxes: floating (R, 4), XYXY in pixels.
        scores: floating (R,).
        layout: the layout of the B images.
        nms_thresh: IoU above which boxes join a group.
        partitions: integer (R,); samples with different values, such as classes, never share a
            group.

    Returns:
        int64 (R,), the index in its image of the kept box of each sample's group.
    """
    padded = None if partitions is None else layout.pad(partitions)
    groups = nms_groups(layout.pad(boxes), layout.pad(scores), nms_thresh, padded)
    return layout.unpad(groups)
