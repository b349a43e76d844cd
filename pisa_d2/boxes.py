"""
IoU of boxes, and groups of boxes by non-maximum suppression.

Shape shorthand in this module:

    N: number of boxes
    *: any number of leading dimensions, for example images
"""

from itertools import count

import torch
from torch import Tensor

from .devices import suits_gpu
from .ordering import at_least_float32, descending_order

# Greedy NMS is the fixed point of an iteration in which a box settles once all boxes that decide
# about it have. Whether it is reached is asked after each iteration; on a GPU, which the question
# keeps waiting, every few. Real proposals settle in 4 to 13, since chains of boxes are short.
_ITERATIONS_PER_QUESTION = 1
_ITERATIONS_PER_QUESTION_ON_GPU = 4
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
    boxes1 = boxes1[(None,) * (boxes2.ndim - boxes1.ndim)]
    boxes2 = boxes2[(None,) * (boxes1.ndim - boxes2.ndim)]
    boxes1, boxes2 = (at_least_float32(b).movedim(-1, 0) for b in (boxes1, boxes2))
    if boxes1.shape != boxes2.shape:
        # Coordinates apart in memory: all pairs of 512 boxes take a tenth of the time.
        boxes1, boxes2 = boxes1.contiguous(), boxes2.contiguous()
    width, height = (
        torch.minimum(boxes1[2:], boxes2[2:]) - torch.maximum(boxes1[:2], boxes2[:2])
    ).clamp(min=0)
    intersection = width * height
    (width1, height1), (width2, height2) = (b[2:] - b[:2] for b in (boxes1, boxes2))
    union = width1 * height1 + width2 * height2 - intersection
    return intersection / union.clamp(min=torch.finfo(union.dtype).tiny)


def _greedily_kept(suppresses: Tensor, iterations_per_question: int) -> Tensor:
    """
    Boxes that greedy NMS keeps.

    Args:
        suppresses: floating (*, N, N), boxes by descending score; 1 at [i, j] where i < j and box
            i, if kept, removes box j, otherwise 0.
        iterations_per_question: after how many iterations to ask whether all boxes have settled.

    Returns:
        (*, N), 1 for kept boxes, otherwise 0.
    """
    removed_by = suppresses.flatten(0, -3) if suppresses.ndim > 2 else suppresses[None]
    removed_by = removed_by.transpose(1, 2)
    ones = torch.ones_like(removed_by[..., :1])
    kept = ones
    # Autocast would turn the matrix into another type in each iteration.
    with torch.autocast(suppresses.device.type, enabled=False):
        for iteration in count(1):
            before = kept
            kept = torch.baddbmm(ones, removed_by, before, alpha=-1).clamp_(min=0)
            if iteration % iterations_per_question == 0 and torch.equal(kept, before):
                break
    return kept.view(suppresses.shape[:-1])


def nms_groups(
    boxes: Tensor, scores: Tensor, iou_threshold: float, partitions: Tensor | None = None
) -> Tensor:
    """
    Cluster boxes by greedy NMS: a kept box and the boxes that it suppresses form a group. A box
    that several kept boxes overlap belongs to the one of highest score.

    Time grows with N * N, memory with N: many boxes are gone through in parts, from the highest
    score down. On a GPU the host waits once per part, or a few times where chains of boxes that
    decide about one another are long.

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
    # Falls with the index; 0 stands for no box.
    priority = torch.arange(size, 0, -1, dtype=torch.float32, device=scores.device)
    kept: list[Tensor] = []  # the priority of each box if it is kept, otherwise 0
    heads: list[Tensor] = []  # the priority of the head of each box
    on_gpu = suits_gpu(boxes)
    iterations = _ITERATIONS_PER_QUESTION_ON_GPU if on_gpu else _ITERATIONS_PER_QUESTION
    step = max(_FEWEST_BOXES, (_MAX_PAIRS_ON_GPU if on_gpu else _MAX_PAIRS) // scores.numel())
    for start in range(0, size, step):
        end = min(start + step, size)
        # [i, j]: box i, of this part or before, comes before box j of this part and overlaps it.
        overlaps = box_iou(boxes[..., :end, None, :], boxes[..., None, start:end, :])
        overlaps = overlaps > iou_threshold
        if partitions is not None:
            overlaps &= partitions[..., :end, None] == partitions[..., None, start:end]
        suppresses = overlaps.triu(diagonal=1 - start).float()
        within = suppresses[..., start:, :]
        if start > 0:
            earlier = (suppresses[..., :start, :] * torch.cat(kept, dim=-1)[..., None]).amax(dim=-2)
            free = earlier == 0
            within = within * free[..., None]
        own = _greedily_kept(within, iterations) * priority[start:end]
        if start > 0:
            own = own * free
        kept.append(own)
        # Of the kept boxes that suppress a box, or are it, the first has the highest score.
        head = torch.maximum(own, (within * own[..., None]).amax(dim=-2))
        heads.append(head if start == 0 else torch.maximum(head, earlier))
    of_head = size - (heads[0] if len(heads) == 1 else torch.cat(heads, dim=-1)).long()
    return torch.empty_like(order).scatter_(-1, order, order.gather(-1, of_head))
