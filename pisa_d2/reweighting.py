"""
From ranks to loss weights: importance-based sample reweighting (ISR) and the classification-aware
regression loss (CARL) of Prime Sample Attention (https://arxiv.org/abs/1904.04821).

N is the number of samples. Weights are float32, or float64 where the input is: sums and ratios
of half precision losses would underflow.
"""

import torch
from torch import Tensor

from .ordering import at_least_float32


def importance(ranks: Tensor, n_max: Tensor | int) -> Tensor:
    """
    Turn ranks into the importance of samples: ``u = (n_max - rank) / n_max``.

    Args:
        ranks: integer (N,), from 0.
        n_max: the divisor of ranks, at least 1 and at least the highest rank + 1; a number, or a
            tensor () or (N,).

    Returns:
        float32 (N,), in [0, 1]; 1 for rank 0.
    """
    return (n_max - ranks).clamp(min=0) / n_max


def weights_of_importance(importance: Tensor, gamma: float, beta: float) -> Tensor:
    """
    Turn the importance u of samples into loss weights, before normalisation:
    ``w = ((1 - beta) u + beta) ** gamma``.

    Args:
        importance: float (N,), in [0, 1].
        gamma: the exponent; the larger, the more the first samples weigh. 0 gives all samples the
            same weight.
        beta: the least importance, in [0, 1]; 1 gives all samples the same weight.

    Returns:
        float (N,), in [0, 1].
    """
    base = importance if beta == 0 else (1 - beta) * importance + beta
    return base**gamma


def importance_weights(ranks: Tensor, n_max: Tensor | int, gamma: float, beta: float) -> Tensor:
    """
    Turn ranks into loss weights, before normalisation::

        u = (n_max - rank) / n_max,   w = ((1 - beta) u + beta) ** gamma

    See :func:`importance` and :func:`weights_of_importance` for the arguments. An ``n_max`` of 0
    is replaced by 1.

    Returns:
        float32 (N,), in [0, 1]; 1 for rank 0.
    """
    n_max = torch.as_tensor(n_max, device=ranks.device).clamp(min=1)
    return weights_of_importance(importance(ranks, n_max), gamma, beta)


def preserve_total(weights: Tensor, losses: Tensor) -> Tensor:
    """
    Scale weights so that the weighted losses have the same sum as the plain ones::

        w' = w * sum(losses) / sum(w * losses)

    Args:
        weights: floating (N,), in [0, 1].
        losses: floating (N,), at least 0.

    Returns:
        (N,) without gradient. All ones if there is no such factor: if the weighted losses add up
        to 0 (for example, if all losses are 0), to infinity or to NaN.
    """
    weights, losses = at_least_float32(weights.detach()), at_least_float32(losses.detach())
    if len(weights) == 0:
        return weights
    scaled = weights * (losses.sum() / (weights * losses).sum())
    # The highest is NaN, infinite or 0 if there is no such factor, otherwise at least 1.
    highest = scaled.max()
    limits = torch.finfo(highest.dtype)
    return torch.where(highest == highest.clamp(limits.tiny, limits.max), scaled, 1.0)


def carl_weights(probs: Tensor, gamma: float, beta: float) -> Tensor:
    """
    Compute the weight of each positive's box loss in CARL::

        v = ((1 - beta) p + beta) ** gamma,   c = v * N / sum(v)

    The gradient flows through v and through the sum. So minimising ``(c * losses).sum()`` raises
    the scores of samples that are regressed better than the weighted mean and lowers the others.

    Args:
        probs: floating (N,), predicted probability of the ground-truth class.
        gamma: exponent, at least 0.
        beta: the least value of v before the exponent, in [0, 1].

    Returns:
        (N,), of mean 1.
    """
    base = (1 - beta) * at_least_float32(probs) + beta
    if base.numel() == 0:
        return base
    tiny = torch.finfo(base.dtype).tiny
    if beta < tiny:
        # Powers and sums of very small probabilities would underflow, and a gamma below 1 has no
        # finite gradient at 0.
        base = base.clamp(min=tiny)
    # Dividing by the highest changes no weight, but keeps small powers from underflow.
    base = base / base.detach().max()
    values = base if gamma == 1 else base**gamma
    return values * (values.numel() / values.sum())
