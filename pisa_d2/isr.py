"""
Importance-based sample reweighting (ISR): the weights of a batch's classification losses.

Shape shorthand in this module:

    R: number of samples of all images
    P: number of positives among them
"""

import torch
from torch import Tensor

from .hlr import hierarchical_local_rank
from .reweighting import importance, preserve_total, weights_of_importance


def positive_weights(
    ious: Tensor,
    objects: Tensor,
    classes: Tensor,
    losses: Tensor,
    *,
    gamma: float = 2.0,
    beta: float = 0.0,
    n_max: str = "shared",
) -> Tensor:
    """
    Weight positives by their IoU-HLR in each class over all images of the batch (ISR-P).

    Args:
        ious: floating (P,), IoU of the regressed box with its ground truth.
        objects: int64 (P,), the matched object, unique over the batch.
        classes: int64 (P,), its class.
        losses: floating (P,), classification losses.
        gamma, beta: see :func:`pisa_d2.reweighting.weights_of_importance`.
        n_max: "shared" divides ranks by the number of positives of the largest class, so that
            equal ranks weigh the same in all classes; "class" by each class's own number.

    Returns:
        (P,), weights that keep the sum of the losses.
    """
    ranks = hierarchical_local_rank(ious, objects, classes)
    return weights_of_positive_ranks(ranks, classes, losses, gamma=gamma, beta=beta, n_max=n_max)


def weights_of_positive_ranks(
    ranks: Tensor, classes: Tensor, losses: Tensor, *, gamma: float, beta: float, n_max: str
) -> Tensor:
    """
    Weight positives that are already ranked (ISR-P).

    Args:
        ranks: int64 (P,), IoU-HLR in the class.
        classes, losses, gamma, beta, n_max: see :func:`positive_weights`.

    Returns:
        (P,), weights that keep the sum of the losses.
    """
    if len(ranks) == 0:
        return torch.ones_like(losses)
    # The largest class has the highest rank.
    of_class = n_max == "class"
    num = (classes[:, None] == classes).sum(dim=1) if of_class else ranks.max() + 1
    weights = weights_of_importance(importance(ranks, num), gamma, beta)
    return preserve_total(weights, losses)


def negative_weights(
    importance: Tensor, negative: Tensor, losses: Tensor, *, gamma: float = 0.5, beta: float = 0.0
) -> Tensor:
    """
    Weight negatives by their importance, which follows from their Score-HLR in each image (ISR-N).

    Args:
        importance: float (R,), see :func:`pisa_d2.reweighting.importance`.
        negative: bool (R,).
        losses: floating (R,), classification losses.
        gamma, beta: see :func:`pisa_d2.reweighting.weights_of_importance`.

    Returns:
        (R,), weights that keep the sum of the negatives' losses; meaningless for other samples.
    """
    weights = weights_of_importance(importance, gamma, beta)
    return preserve_total(weights, losses * negative)
