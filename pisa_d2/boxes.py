"""
IoU of boxes, and groups of boxes by non-maximum suppression.

Shape shorthand in this module:

    N: number of boxes
    *: any number of leading dimensions, for example images
"""

import torch
from torch import Tensor

from .ordering import at_least_float32, descending_order

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
