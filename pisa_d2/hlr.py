"""
Hierarchical Local Rank (HLR) of Prime Sample Attention (https://arxiv.org/abs/1904.04821).

Shape shorthand in this module:

    N: number of samples

No function loops over samples, groups or partitions, or copies to the host.
"""

import torch
from torch import Tensor

from .boxes import nms_groups
from .ordering import descending_order, gather_rows, refine_order, sort_in_order

__all__ = ["hierarchical_local_rank", "local_rank", "nms_groups"]


def _run_starts(sorted_keys: Tensor, index: Tensor) -> Tensor:
    """
    Find the index (*, N) of the first sample in each sample's run of equal keys (*, N).

    Args:
        index: int64 (N,), 0, 1, 2, ...
    """
    # The first sample begins a run even if it equals the last, rolled before it: its index is 0.
    begins = sorted_keys != sorted_keys.roll(1, dims=-1)
    return (index * begins).cummax(dim=-1).values


def _inverse(order: Tensor, values: Tensor) -> Tensor:
    """Bring values, given in ``order``, back to the original order."""
    return torch.empty_like(values).scatter_(0, order, values)


def _check_shapes(**tensors: Tensor | None) -> None:
    shapes = {name: tuple(t.shape) for name, t in tensors.items() if t is not None}
    if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
        raise ValueError(f"Expected vectors of the same length, got {shapes}")


def local_rank(values: Tensor, groups: Tensor) -> Tensor:
    """
    Rank each sample in its group: 0 for the highest value, then 1, and so on.

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
    order, sorted_groups = sort_in_order(descending_order(values), groups)
    index = torch.arange(len(order), device=order.device)
    return _inverse(order, index - _run_starts(sorted_groups, index))


def hierarchical_local_rank(
    values: Tensor, groups: Tensor, partitions: Tensor | None = None
) -> Tensor:
    """
    Rank each sample in its partition: the best of all groups come first, then all second best, and
    so on; among each of these, the higher value first (the paper's section 4.2).

    With C > A > B in one group, D > E in another, D's value the highest and E's below A's, the
    order is D C A E B.

    Args:
        values: floating (N,): IoU after regression for positives, score for negatives.
            NaN ranks last.
        groups: integer (N,), any values: the object or the NMS cluster of a sample. The same
            value in two partitions means two groups.
        partitions: integer (N,), any values: samples with different values, such as classes or
            images, are ranked separately. None ranks all samples together.

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
    order, sorted_groups = sort_in_order(by_value, groups)
    index = torch.arange(len(order), device=order.device)
    if partitions is None:
        group_starts = _run_starts(sorted_groups, index)
        partition_starts = torch.zeros_like(group_starts)
    else:
        order, sorted_partitions = sort_in_order(order, partitions)
        keys = torch.stack([sorted_partitions, gather_rows(groups, order)])
        starts = _run_starts(keys, index)
        # A run of one group ends where its partition does.
        partition_starts, group_starts = starts[0], starts.amax(dim=0)
    # One integer key for (partition, local rank), since no local rank reaches the size of its
    # partition. The value decides between equal keys through the stable sort; added to the key, it
    # would lose its last digits.
    local_ranks = index - group_starts
    order_by_rank = refine_order(by_value, _inverse(order, partition_starts + local_ranks))
    # Partitions are in the same sequence in both orders.
    return _inverse(order_by_rank, index - partition_starts)
