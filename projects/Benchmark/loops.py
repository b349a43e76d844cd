"""The method as one would write it down first: one class, one object, one box at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou, nms


def hierarchical_local_rank(values: Tensor, groups: Tensor, partitions: Tensor) -> Tensor:
    ranks = torch.zeros_like(groups)
    for partition in partitions.unique():
        order = []
        of_partition = (partitions == partition).nonzero()[:, 0]
        for group in groups[of_partition].unique():
            members = of_partition[groups[of_partition] == group].tolist()
            members.sort(key=lambda i: -values[i].item())
            order += [(rank, -values[i].item(), i) for rank, i in enumerate(members)]
        for rank, (_, _, i) in enumerate(sorted(order)):
            ranks[i] = rank
    return ranks


def nms_groups(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    kept = nms(boxes, scores, iou_threshold)
    heads = torch.empty(len(boxes), dtype=torch.int64, device=boxes.device)
    kept_set = set(kept.tolist())
    for i in range(len(boxes)):
        if i in kept_set:
            heads[i] = i
        else:
            ious = box_iou(boxes[i : i + 1], boxes[kept])[0]
            heads[i] = kept[ious > iou_threshold][0]
    return heads


def importance_weights(
    ranks: Tensor, partitions: Tensor, gamma: float, beta: float, losses: Tensor
) -> Tensor:
    n_max = max(int((partitions == p).sum()) for p in partitions.unique())
    weights = torch.empty(len(ranks), device=losses.device)
    for i, rank in enumerate(ranks.tolist()):
        weights[i] = ((1 - beta) * (n_max - rank) / n_max + beta) ** gamma
    return weights * losses.sum() / (weights * losses).sum()


def carl(probs: Sequence[Tensor], losses: Sequence[Tensor], gamma: float, beta: float) -> Tensor:
    values = [((1 - beta) * prob + beta) ** gamma for prob in probs]
    mean = sum(values) / len(values)
    weighted = [value / mean * loss for value, loss in zip(values, losses, strict=True)]
    return torch.stack(weighted).sum()
