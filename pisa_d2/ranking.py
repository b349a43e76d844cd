"""
Ranks of the samples of a batch of images.

Shape shorthand in this module:

    B: number of images
    R: number of samples of all images, image after image
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .boxes import nms_groups
from .hlr import hierarchical_local_rank


def image_indices(num_samples: Sequence[int], device: torch.device) -> Tensor:
    """
    Args:
        num_samples: number of samples of each of the B images.

    Returns:
        int64 (R,), the image of each sample.
    """
    images = [torch.full((n,), i, device=device) for i, n in enumerate(num_samples)]
    return torch.cat(images) if images else torch.zeros(0, dtype=torch.int64, device=device)


def count(indices: Tensor, selected: Tensor, size: int) -> Tensor:
    """Number (size,) of selected samples of each index in [0, size), without a copy to the host."""
    return torch.zeros(size, dtype=torch.int64, device=indices.device).scatter_add_(
        0, indices, selected.long()
    )


def largest_count(selected: Tensor, num_samples: Sequence[int]) -> Tensor:
    """
    Args:
        selected: bool (R,).
        num_samples: number of samples of each of the B images.

    Returns:
        int64 (), the largest number of selected samples of an image; 0 where there are none.
    """
    counts = [part.sum() for part in selected.split(list(num_samples))]
    return torch.stack(counts).max() if counts else selected.sum()


def rank_negatives(
    boxes: Tensor,
    scores: Tensor,
    eligible: Tensor,
    num_samples: Sequence[int],
    nms_thresh: float,
) -> Tensor:
    """
    Score-HLR in each image (the paper's section 4.2): samples in groups by NMS of their
    regressed boxes, ranked by score. The others get the last rank of their image.

    Args:
        boxes: floating (R, 4), regressed boxes, XYXY in pixels.
        scores: floating (R,), highest foreground probability.
        eligible: bool (R,), the samples that are ranked.
        num_samples: number of samples of each of the B images.
        nms_thresh: IoU above which boxes join a group.

    Returns:
        int64 (R,); 0 for all samples of an image where none is eligible.
    """
    if len(scores) == 0:
        return torch.zeros_like(scores, dtype=torch.int64)
    images = image_indices(num_samples, scores.device)
    num_eligible = count(images, eligible, len(num_samples))
    if scores.is_cuda:
        # Leaving samples out would cost a copy to the host; a box without area joins no group.
        boxes = boxes.masked_fill(~eligible[:, None], 0)
        groups = groups_in_images(boxes, scores, num_samples, nms_thresh)
    else:
        groups = torch.zeros_like(images)
        groups[eligible] = groups_in_images(
            boxes[eligible], scores[eligible], num_eligible.tolist(), nms_thresh
        )
    ranks = hierarchical_local_rank(scores, groups, torch.where(eligible, images, -1))
    return torch.where(eligible, ranks, (num_eligible[images] - 1).clamp(min=0))


def groups_in_images(
    boxes: Tensor,
    scores: Tensor,
    num_samples: Sequence[int],
    nms_thresh: float,
    partitions: Tensor | None = None,
) -> Tensor:
    """
    :func:`pisa_d2.hlr.nms_groups` in each image: images are padded to one size for one pass.

    Args:
        boxes: floating (R, 4), XYXY in pixels.
        scores: floating (R,).
        num_samples: number of samples of each of the B images.
        nms_thresh: IoU above which boxes join a group.
        partitions: integer (R,), what never shares a group, such as classes.

    Returns:
        int64 (R,), the index in its image of the kept box of each sample's group.
    """

    def pad(values: Tensor) -> Tensor:
        return pad_sequence(values.split(list(num_samples)), batch_first=True)

    padded = None if partitions is None else pad(partitions)
    groups = nms_groups(pad(boxes), pad(scores), nms_thresh, padded)
    return torch.cat([g[:n] for g, n in zip(groups, num_samples, strict=True)])
