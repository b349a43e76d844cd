"""
Slow and obvious versions of the package's functions: one sample after the other, in Python. Numbers
are float32 where the package computes in float32, so that results, and decisions that depend on
them, are the same to the last bit.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np


def highest_first(value: float, index: int) -> tuple[bool, float, int]:
    return (True, 0.0, index) if math.isnan(value) else (False, -value, index)


def slow_local_rank(values: Sequence[float], groups: Sequence[Hashable]) -> list[int]:
    ranks = {}
    for group in set(groups):
        members = [i for i in range(len(values)) if groups[i] == group]
        members.sort(key=lambda i: highest_first(values[i], i))
        ranks.update({i: rank for rank, i in enumerate(members)})
    return [ranks[i] for i in range(len(values))]


def slow_hierarchical_local_rank(
    values: Sequence[float], groups: Sequence[int], partitions: Sequence[int]
) -> list[int]:
    in_group = slow_local_rank(values, list(zip(partitions, groups, strict=True)))
    ranks = {}
    for partition in set(partitions):
        members = [i for i in range(len(values)) if partitions[i] == partition]
        members.sort(key=lambda i: (in_group[i], highest_first(values[i], i)))
        ranks.update({i: rank for rank, i in enumerate(members)})
    return [ranks[i] for i in range(len(values))]


def slow_iou(
    box1: Sequence[float], box2: Sequence[float], number: type[np.floating] = np.float64
) -> float:
    """Compute an IoU; NaN for boxes with NaN or too large for ``number``."""
    with np.errstate(all="ignore"):
        (x1, y1, x2, y2), (a1, b1, a2, b2) = (map(number, box) for box in (box1, box2))
        width = np.maximum(np.minimum(x2, a2) - np.maximum(x1, a1), number(0))
        height = np.maximum(np.minimum(y2, b2) - np.maximum(y1, b1), number(0))
        union = (x2 - x1) * (y2 - y1) + (a2 - a1) * (b2 - b1) - width * height
        return float(width * height / np.maximum(union, np.finfo(number).tiny))


def slow_inside(
    boxes: Sequence[Sequence[float]], regions: Sequence[Sequence[float]], threshold: float
) -> list[bool]:
    """Return whether a box has an area, and at least this share of it inside one of the regions."""
    inside = []
    for box in boxes:
        x1, y1, x2, y2 = map(np.float32, box)
        shares = []
        for region in regions:
            a1, b1, a2, b2 = map(np.float32, region)
            width, height = min(x2, a2) - max(x1, a1), min(y2, b2) - max(y1, b1)
            if width > 0 and height > 0:
                shares.append(width * height / ((x2 - x1) * (y2 - y1)))
        inside.append(any(share >= threshold for share in shares))
    return inside


def slow_nms_groups(
    boxes: Sequence[Sequence[float]],
    scores: Sequence[float],
    threshold: float,
    partitions: Sequence[int],
    number: type[np.floating] = np.float64,
) -> list[int]:
    kept: list[int] = []
    heads = {}
    threshold = number(threshold)
    for i in sorted(range(len(scores)), key=lambda i: highest_first(scores[i], i)):
        for k in kept:
            if partitions[k] == partitions[i] and slow_iou(boxes[k], boxes[i], number) > threshold:
                heads[i] = k
                break
        else:
            heads[i] = i
            kept.append(i)
    return [heads[i] for i in range(len(scores))]


def slow_balanced_l1(error: float, alpha: float, gamma: float, beta: float) -> tuple[float, float]:
    """Compute the loss of an error and its derivative as in the paper."""
    x, sign = abs(error), math.copysign(1, error)
    b = math.exp(gamma / alpha) - 1
    if x < beta:
        log = math.log(b * x / beta + 1)
        return alpha / b * (b * x + beta) * log - alpha * x, sign * alpha * log
    return gamma * x + gamma * beta / b - alpha * beta, sign * gamma


def slow_importance(rank: int, n_max: int, gamma: float, beta: float) -> float:
    n_max = max(n_max, 1)
    return ((1 - beta) * max(n_max - rank, 0) / n_max + beta) ** gamma


def slow_preserve_total(weights: dict[int, float], losses: Sequence[float]) -> dict[int, float]:
    """Scale weights by sample index to keep the total; all are 1 if no factor does."""
    total = sum(losses[i] for i in weights)
    weighted = sum(weight * losses[i] for i, weight in weights.items())
    ratio = total / weighted if weighted else math.nan
    if not (math.isfinite(ratio) and ratio > 0):
        return dict.fromkeys(weights, 1.0)
    return {i: weight * ratio for i, weight in weights.items()}


def slow_carl_weights(probs: Sequence[float], gamma: float, beta: float) -> list[float]:
    base = [(1 - beta) * p + beta for p in probs]
    # Relative to the largest, which only keeps powers from vanishing.
    values = [(b / max(base)) ** gamma for b in base]
    return [v * len(values) / sum(values) for v in values]


def slow_positive_weights(
    ious: dict[int, float],
    objects: Sequence[int],
    classes: Sequence[int],
    losses: Sequence[float],
    gamma: float,
    beta: float,
) -> dict[int, float]:
    """Compute ISR-P of the samples in ``ious``."""
    rows = list(ious)
    ranks = slow_hierarchical_local_rank(
        [ious[i] for i in rows], [objects[i] for i in rows], [classes[i] for i in rows]
    )
    n_max = max(ranks, default=0) + 1
    weights = {
        i: slow_importance(rank, n_max, gamma, beta) for i, rank in zip(rows, ranks, strict=True)
    }
    return slow_preserve_total(weights, losses)


def slow_negative_weights(
    images: Sequence[Sequence[int]],
    boxes: Sequence[Sequence[float]],
    scores: Sequence[float],
    losses: Sequence[float],
    gamma: float,
    beta: float,
    score_thresh: float,
    nms_thresh: float,
) -> dict[int, float]:
    """Compute ISR-N of the negatives of each image, given by their indices."""
    n_max = max(map(len, images), default=0)
    weights = {}
    for negatives in images:
        ranked = [i for i in negatives if scores[i] > np.float32(score_thresh)]
        own_scores = [scores[i] for i in ranked]
        one = [0] * len(ranked)
        groups = slow_nms_groups(
            [boxes[i] for i in ranked], own_scores, nms_thresh, one, np.float32
        )
        ranks = slow_hierarchical_local_rank(own_scores, groups, one)
        of_sample = dict(zip(ranked, ranks, strict=True))
        for i in negatives:
            rank = of_sample.get(i, max(len(ranked) - 1, 0))
            weights[i] = slow_importance(rank, n_max, gamma, beta)
    return slow_preserve_total(weights, losses)


def slow_score_hlr(
    boxes: Sequence[Sequence[float]],
    scores: Sequence[float],
    score_thresh: float,
    nms_thresh: float,
) -> list[int]:
    """Sort the samples scored above the threshold by Score-HLR."""
    ranked = [i for i, score in enumerate(scores) if score > np.float32(score_thresh)]
    own_scores = [scores[i] for i in ranked]
    one = [0] * len(ranked)
    groups = slow_nms_groups([boxes[i] for i in ranked], own_scores, nms_thresh, one, np.float32)
    ranks = slow_hierarchical_local_rank(own_scores, groups, one)
    return [i for _, i in sorted(zip(ranks, ranked, strict=True))]


def slow_iou_hlr(
    ious: Sequence[float], objects: Sequence[int], classes: Sequence[int]
) -> list[int]:
    """Sort the positives of an image in the order in which prime sampling takes them."""
    ranks = slow_hierarchical_local_rank(ious, objects, classes)
    return sorted(range(len(ious)), key=lambda i: (ranks[i], *highest_first(ious[i], i)))


def slow_joint_choice(
    images: Sequence[tuple[Sequence[Sequence[float]], Sequence[float], Sequence[int]]],
    num: int,
    nms_thresh: float,
) -> set[tuple[int, int]]:
    """
    Choose the hardest samples of all images, each given by boxes, losses and classes, after NMS in
    each image and class; NaN is the highest loss. Return their (image, index).
    """
    left = []
    hardness = [
        [math.inf if math.isnan(loss) else loss for loss in losses] for _, losses, _ in images
    ]
    for image, (boxes, _, classes) in enumerate(images):
        members = defaultdict(list)
        for i, class_ in enumerate(classes):
            members[class_].append(i)
        for class_, rows in members.items():
            heads = slow_nms_groups(
                [boxes[i] for i in rows],
                [hardness[image][i] for i in rows],
                nms_thresh,
                [0] * len(rows),
                np.float32,
            )
            if class_ >= 0:
                left += [(image, i) for k, i in enumerate(rows) if heads[k] == k]
    left.sort(key=lambda key: (-hardness[key[0]][key[1]], key))
    return set(left[:num])
