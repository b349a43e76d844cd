"""
Hierarchical Local Rank (HLR) of Prime Sample Attention (https://arxiv.org/abs/1904.04821).

Shape shorthand in this module:

    N: number of samples
    *: any number of leading dimensions, for example images

Nothing here loops over samples, groups or partitions, and nothing is copied to the host when the
tensors are on a GPU.
"""

import torch
from torch import Tensor

# Greedy NMS is the fixed point of an iteration in which a box settles once all boxes that decide
# about it have. On a GPU the iteration cannot be stopped early without a copy to the host, hence
# this bound on the length of such a chain; NMS of real proposals has chains of about ten.
_MAX_CHAIN_ON_GPU = 32
# Pairs of boxes that are compared at a time, if at least a few boxes with all. On the CPU what
# stays in the cache is several times faster than all at once (512 boxes: 2 ms, in one part 8 ms);
# a GPU is kept busy by more: two images of 2,800 boxes, in half a GB.
_MAX_PAIRS = 2**17
_MAX_PAIRS_ON_GPU = 2**24
_FEWEST_BOXES = 32


def descending_order(values: Tensor) -> Tensor:
    """Indices (*, N) that sort values from the highest down; NaN last, ties by index."""
    # The sign of a NaN survives negation and would decide its place in some sorts.
    keys = (-values.detach()).masked_fill(values.isnan(), float("nan"))
    return keys.sort(stable=True).indices


def at_least_float32(values: Tensor) -> Tensor:
    """``values`` in float32, or float64 where they are: half precision underflows in ratios."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _take(values: Tensor, order: Tensor) -> Tensor:
    # values[order] takes seven times as long for a million values on a CPU.
    return values.index_select(0, order)


def refine_order(order: Tensor, keys: Tensor) -> Tensor:
    """Sort by ``keys``; samples of equal key stay in the sequence of ``order``."""
    return _take(order, _take(keys, order).sort(stable=True).indices)


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
    return _inverse(order, _position_in_run(_run_starts(_take(groups, order))))


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
        in_group = _position_in_run(_run_starts(_take(groups, order)))
    else:
        order = refine_order(order, partitions)
        starts = _run_starts(_take(partitions, order))
        partition_ids = _inverse(order, starts.cumsum(dim=0) - 1)
        in_group = _position_in_run(_run_starts(_take(partitions, order), _take(groups, order)))
    # One integer key for (partition, local rank); the value decides between equal keys through
    # the stable sort, not by being added to the key, which would cost it its last digits.
    keys = partition_ids * len(order) + _inverse(order, in_group)
    order = refine_order(by_value, keys)
    return _inverse(order, _position_in_run(_run_starts(_take(partition_ids, order))))


def box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """
    IoU of boxes that broadcast against each other: ``box_iou(a, b)`` of paired boxes,
    ``box_iou(a[:, None], b[None])`` of all pairs.

    Args:
        boxes1, boxes2: floating (*, 4), XYXY in pixels.

    Returns:
        (*), in float32 at least; 0 where the union has no area, NaN where a coordinate is NaN.
    """
    # Coordinates apart in memory: all pairs of 512 boxes take a tenth of the time.
    x1, y1, x2, y2 = at_least_float32(boxes1).movedim(-1, 0).contiguous()
    a1, b1, a2, b2 = at_least_float32(boxes2).movedim(-1, 0).contiguous()
    width = (torch.minimum(x2, a2) - torch.maximum(x1, a1)).clamp(min=0)
    height = (torch.minimum(y2, b2) - torch.maximum(y1, b1)).clamp(min=0)
    intersection = width * height
    union = (x2 - x1) * (y2 - y1) + (a2 - a1) * (b2 - b1) - intersection
    return intersection / union.clamp(min=torch.finfo(union.dtype).tiny)


def _greedily_kept(suppresses: Tensor, max_chain: int | None) -> Tensor:
    """
    Boxes that greedy NMS keeps.

    Args:
        suppresses: floating (*, N, N), boxes by descending score; 1 at [i, j] where i < j and box
            i, if kept, removes box j, otherwise 0.
        max_chain: number of iterations; None goes on until nothing changes.

    Returns:
        (*, N), 1 for kept boxes. Exact for each box that ends a chain of at most ``max_chain``.
    """
    removed_by = suppresses.transpose(-1, -2)
    kept = torch.ones_like(suppresses[..., 0])
    for _ in range(max_chain if max_chain is not None else kept.shape[-1]):
        previous = kept
        kept = (torch.matmul(removed_by, previous[..., None])[..., 0] == 0).to(previous.dtype)
        if max_chain is None and torch.equal(kept, previous):
            break
    return kept


def nms_groups(
    boxes: Tensor, scores: Tensor, iou_threshold: float, partitions: Tensor | None = None
) -> Tensor:
    """
    Cluster boxes by greedy NMS: a kept box and the boxes that it suppresses form a group. A box
    that several kept boxes overlap belongs to the one of highest score.

    Time grows with N * N, memory with N: many boxes are gone through in parts, from the highest
    score down. On a GPU, suppression chains of up to 32 boxes are followed in each.

    Args:
        boxes: floating (*, N, 4), XYXY in pixels. Boxes in different leading dimensions never
            suppress each other, nor does a box without area, or with NaN, any other.
        scores: floating (*, N). NaN counts as the lowest.
        iou_threshold: boxes whose IoU is above it suppress each other.
        partitions: integer (*, N), any values; boxes of different partitions never suppress each
            other. None is one partition.

    Returns:
        int64 (*, N), the index in N of the kept box of each box's group.

    Raises:
        ValueError: shapes do not fit together.
    """
    if boxes.shape != (*scores.shape, 4) or (
        partitions is not None and partitions.shape != scores.shape
    ):
        raise ValueError(
            "Expected boxes (*, N, 4), scores (*, N) and partitions (*, N) or None, got "
            f"{tuple(boxes.shape)}, {tuple(scores.shape)} and "
            f"{None if partitions is None else tuple(partitions.shape)}"
        )
    if scores.numel() == 0:
        return torch.zeros_like(scores, dtype=torch.int64)
    order = descending_order(scores)
    boxes = boxes.detach().gather(-2, order[..., None].expand_as(boxes))
    if partitions is not None:
        partitions = partitions.gather(-1, order)

    size = scores.shape[-1]
    index = torch.arange(size, device=scores.device)
    kept = torch.zeros_like(order, dtype=torch.float32)
    heads = torch.empty_like(order)
    max_chain = _MAX_CHAIN_ON_GPU if boxes.is_cuda else None
    max_pairs = _MAX_PAIRS_ON_GPU if boxes.is_cuda else _MAX_PAIRS
    step = max(_FEWEST_BOXES, max_pairs // scores.numel())
    for start in range(0, size, step):
        end = min(start + step, size)
        # [i, j]: box i, of this part or before, comes before box j of this part and overlaps it.
        overlaps = box_iou(boxes[..., :end, None, :], boxes[..., None, start:end, :])
        overlaps = overlaps > iou_threshold
        if partitions is not None:
            overlaps &= partitions[..., :end, None] == partitions[..., None, start:end]
        suppresses = overlaps.triu(diagonal=1 - start).float()

        free = (suppresses * kept[..., :end, None]).amax(dim=-2) == 0
        within = suppresses[..., start:, :] * free[..., :, None]
        kept[..., start:end] = _greedily_kept(within, max_chain) * free
        # Of the kept boxes that suppress a box, the first has the highest score.
        order_of_kept = ((size - index[:end]) * kept[..., :end])[..., None]
        first = size - (suppresses * order_of_kept).amax(dim=-2).long()
        alone = (kept[..., start:end] > 0) | (first == size)
        heads[..., start:end] = torch.where(alone, index[start:end], first)
    return torch.empty_like(order).scatter_(-1, order, order.gather(-1, heads))
