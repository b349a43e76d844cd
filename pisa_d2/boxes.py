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
# about it have settled. A CPU checks for the fixed point after each iteration, a GPU, which the
# check keeps waiting, every few. Real proposals settle in 4 to 13, since chains of boxes are short.
_ITERATIONS_PER_QUESTION = 1
_ITERATIONS_PER_QUESTION_ON_GPU = 4
# Box pairs compared per part (with at least _FEWEST_BOXES rows). On a CPU, parts that fit the cache
# are several times faster than a single one (512 boxes: 2 ms instead of 8 ms). A GPU needs larger
# parts to be busy: two images of 2,800 boxes, in half a GB.
_MAX_PAIRS = 2**17
_MAX_PAIRS_ON_GPU = 2**24
_FEWEST_BOXES = 32


def box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """
    Compute the IoU of boxes that broadcast against each other: ``box_iou(a, b)`` for paired boxes,
    ``box_iou(a[:, None], b[None])`` for all pairs.

    Args:
        boxes1, boxes2: floating (*, 4), XYXY in pixels.

    Returns:
        (*), at least float32; 0 if the union has no area, NaN if a coordinate is NaN.
    """
    boxes1 = boxes1[(None,) * (boxes2.ndim - boxes1.ndim)]
    boxes2 = boxes2[(None,) * (boxes1.ndim - boxes2.ndim)]
    boxes1, boxes2 = (at_least_float32(b).movedim(-1, 0) for b in (boxes1, boxes2))
    if boxes1.shape != boxes2.shape:
        # With each coordinate contiguous, all pairs of 512 boxes take a tenth of the time.
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
    Find the boxes that greedy NMS keeps.

    Args:
        suppresses: floating (*, N, N), boxes by descending score; 1 at [i, j] if i < j and box i,
            if kept, removes box j, otherwise 0.
        iterations_per_question: number of iterations between checks whether all boxes have settled.

    Returns:
        (*, N), 1 for kept boxes, otherwise 0.
    """
    removed_by = suppresses.flatten(0, -3) if suppresses.ndim > 2 else suppresses[None]
    removed_by = removed_by.transpose(1, 2)
    ones = torch.ones_like(removed_by[..., :1])
    kept = ones
    # Autocast would convert the matrix in each iteration.
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
    that several kept boxes overlap joins the highest-scored one.

    Time grows with N * N, memory with N: many boxes are processed in parts, from the highest score
    down. On a GPU the host waits once per part, or a few times if there are long chains of boxes
    that decide about one another.

    Args:
        boxes: floating (*, N, 4), XYXY in pixels. Boxes in different leading dimensions never
            suppress each other. A box without area, or with NaN, suppresses no other box.
        scores: floating (*, N). NaN is the lowest score.
        iou_threshold: boxes whose IoU is above it suppress each other.
        partitions: integer (*, N), any values; boxes in different partitions never suppress each
            other. None stands for one partition.

    Returns:
        int64 (*, N), the index in N of the kept box in each box's group.

    Raises:
        ValueError: the shapes do not fit together.
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
    # Falls with the index, so that it orders boxes by score; 0 stands for no box.
    priority = torch.arange(size, 0, -1, dtype=torch.float32, device=scores.device)
    kept: list[Tensor] = []  # the priority of each box if it is kept, otherwise 0
    heads: list[Tensor] = []  # the priority of the head of each box
    on_gpu = suits_gpu(boxes)
    iterations = _ITERATIONS_PER_QUESTION_ON_GPU if on_gpu else _ITERATIONS_PER_QUESTION
    step = max(_FEWEST_BOXES, (_MAX_PAIRS_ON_GPU if on_gpu else _MAX_PAIRS) // scores.numel())
    for start in range(0, size, step):
        end = min(start + step, size)
        # [i, j]: box i, of this part or an earlier one, comes before box j of this part and
        # overlaps it.
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
        # Of the kept boxes that suppress a box, and the box itself if kept, the first is its head.
        head = torch.maximum(own, (within * own[..., None]).amax(dim=-2))
        heads.append(head if start == 0 else torch.maximum(head, earlier))
    of_head = size - (heads[0] if len(heads) == 1 else torch.cat(heads, dim=-1)).long()
    return torch.empty_like(order).scatter_(-1, order, order.gather(-1, of_head))
