import torch
from torch import Tensor

from pisa_d2.ordering import descending_order


def hard_negatives(losses: Tensor, positive: Tensor, per_positive: float) -> Tensor:
    """
    The negatives of highest loss, ``per_positive`` for each positive of their image, or all of
    them where there are fewer.

    Args:
        losses: floating (N, R), classification losses.
        positive: bool (N, R).
        per_positive: at least 0.

    Returns:
        bool (N, R). Of equal losses, the first are taken.
    """
    order = descending_order(losses.masked_fill(positive, -float("inf")))
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    ranks = torch.empty_like(order).scatter_(1, order, places)
    return (ranks < per_positive * positive.sum(dim=1, keepdim=True)) & ~positive
