"""
Importance-based sample reweighting (ISR): the weights of a batch's classification losses.

Shape shorthand in this module:

    R: number of samples of all images
    P: number of positives among them
"""

import torch
from torch import Tensor

from .config import ISR
from .hlr import hierarchical_local_rank
from .reweighting import importance_weights, preserve_total


def positive_weights(
    isr: ISR, ious: Tensor, objects: Tensor, classes: Tensor, losses: Tensor
) -> Tensor:
    """
    ISR-P: positives weigh by their IoU-HLR in each class over all images of the batch.

    Args:
        isr: gamma and beta.
        ious: floating (P,), IoU of the regressed box with its ground truth.
        objects: int64 (P,), the matched object, unique over the batch.
        classes: int64 (P,), its class.
        losses: floating (P,), classification losses.

    Returns:
        (P,), keeping the sum of the losses.
    """
    if len(ious) == 0:
        return torch.ones_like(losses)
    ranks = hierarchical_local_rank(ious, objects, classes)
    # The largest class has the highest rank: equal ranks of all classes weigh the same.
    weights = importance_weights(ranks, ranks.max() + 1, isr.gamma, isr.beta)
    return preserve_total(weights, losses)


def negative_weights(
    isr: ISR, ranks: Tensor, n_max: Tensor, negative: Tensor, losses: Tensor
) -> Tensor:
    """
    ISR-N: negatives weigh by their Score-HLR in each image.

    Args:
        isr: gamma and beta.
        ranks: int64 (R,), Score-HLR of the negatives.
        n_max: integer, what the ranks are measured by: (R,), or one for all.
        negative: bool (R,).
        losses: floating (R,), classification losses.

    Returns:
        (R,), keeping the sum of the negatives' losses; those of other samples mean nothing.
    """
    weights = importance_weights(ranks, n_max, isr.gamma, isr.beta)
    return preserve_total(weights, losses * negative)
