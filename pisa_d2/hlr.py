"""
Hierarchical Local Rank (HLR) of Prime Sample Attention (https://arxiv.org/abs/1904.04821).

Shape shorthand in this module:

    N: number of samples

Nothing here loops over samples, groups or partitions, and nothing is copied to the host.
"""

import torch
from torch import Tensor

from .boxes import nms_groups
from .ordering import descending_order, gather_rows, refine_order

__all__ = ["hierarchical_local_rank", "local_rank", "nms_groups"]


def _run_starts(*sorted_keys: Tensor) -> Tensor:
    """True (N,) where a run of samples equal in all keys begins."""
    starts = torch.ones_like(sorted_keys[0], dtype=torch.bool)
    starts[1:] = torch.stack([keys[1:] != keys[:-1] for keys in sorted_keys]).any(dim=0)
    return starts


def _position_in_run(starts: Tensor) -> Tensor:
    """Position (N,), from 0, of each sample in its run."""
    index = torch.arange(len(starts), device=starts.device)
    return index - (index * starts).cummax(dim=0).values


def _inverse(order: Tensor, values: Tensor) -> Tensor:
    """Bring values, given in the sequence of ``order``, back to the original sequence."""
    return torch.empty_like(values).scatter_(0, order, values)


def _check_shapes(**tensors: Tensor | None) -> None:
    shapes = {name: tuple(t.shape) for name, t in tensors.items() if t is not None}
    if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
        raise ValueError(f"Expected vectors of the same length, got {shapes}")


def local_rank(values: Tensor, groups: Tensor) -> Tensor:
    """
    Rank of each sample in its group: 0 for the highest value, then 1, and so on.

    Args:
        values: floating (N,). NaN ranks last.
        groups: integer (N,), any values.

    Returns:
        int64 (N,). Equal values are ranked by index.

    Raises:
        ValueError: the arguments are not vectors of the same length.
    """
    _check_shapes(values=values, groups=groups)
    if values.numel() == 0:
        return torch.zeros_like(groups, dtype=torch.int64)
    order = refine_order(descending_order(values), groups)
    return _inverse(order, _position_in_run(_run_starts(gather_rows(groups, order))))


def hierarchical_local_rank(
    values: Tensor, groups: Tensor, partitions: Tensor | None = None
) -> Tensor:
    """
    Rank of each sample in its partition when the best of all groups come first, then all second
    best, and so on; within each of these, the higher value first (the paper's section 4.2).

    With C > A > B in one group, D > E in another, D's value the highest and E's below A's, the
    sequence is D C A E B.

    Args:
        values: floating (N,): IoU after regression for positives, score for negatives.
            NaN ranks last.
        groups: integer (N,), any values: the object or the NMS cluster of a sample. The same
            value in two partitions means two groups.
        partitions: integer (N,), any values: what is ranked apart, such as classes or images.
            None ranks all samples together.

    Returns:
        int64 (N,), a permutation of 0, 1, ... in each partition. Samples of equal local rank and
        equal value are ranked by index.

    Raises:
        ValueError: the arguments are not vectors of the same length.
    """
    _check_shapes(values=values, groups=groups, partitions=partitions)
    if values.numel() == 0:
        return torch.zeros_like(groups, dtype=torch.int64)
    by_value = descending_order(values)
    order = refine_order(by_value, groups)
    if partitions is None:
        partition_ids = torch.zeros_like(order)
        in_group = _position_in_run(_run_starts(gather_rows(groups, order)))
    else:
        order = refine_order(order, partitions)
        starts = _run_starts(gather_rows(partitions, order))
        partition_ids = _inverse(order, starts.cumsum(dim=0) - 1)
        in_group = _position_in_run(
            _run_starts(gather_rows(partitions, order), gather_rows(groups, order))
        )
    # One integer key for (partition, local rank); the value decides between equal keys through
    # the stable sort, not by being added to the key, which would cost it its last digits.
    keys = partition_ids * len(order) + _inverse(order, in_group)
    order = refine_order(by_value, keys)
    return _inverse(order, _position_in_run(_run_starts(gather_rows(partition_ids, order))))
