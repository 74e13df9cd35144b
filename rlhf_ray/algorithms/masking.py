"""Means, moments and whitening over the tokens that count.

Masks are bool, True on tokens that count. A masked token never touches a result or a gradient, not even when it holds
NaN or infinity.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_mean(x: Tensor, mask: Tensor, *, count: Tensor | float | None = None) -> Tensor:
    """Sum of ``x`` over the mask, divided by ``count``.

    With ``count`` = the tokens of the whole batch (all micro-batches, all ranks) the micro-batches add up to the global
    token mean, and so do their gradients; a mean of micro-batch means would weigh tokens of short responses more.

    Args:
        x: [...] values.
        mask: [...] bool, of the shape of ``x``.
        count: divisor; the number of unmasked entries by default.

    Returns:
        A scalar; NaN where ``count`` is left out and nothing is unmasked, as ``torch.mean`` of nothing.

    Raises:
        ValueError: the shapes differ (broadcasting would count tokens more than once).
    """
    require_shape_of_mask(mask, x)
    total = torch.where(mask, x, 0.0).sum()
    return total / (mask.sum() if count is None else count)


def masked_moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance (divided by n, not n - 1) of the unmasked entries; two scalars.

    Raises:
        ValueError: the shapes differ.
    """
    mean = masked_mean(x, mask)
    # Masked entries are dropped before the square too: zero times the infinite slope there would be a NaN gradient.
    deviation = torch.where(mask, x - mean, 0.0)
    return mean, masked_mean(deviation**2, mask)


def masked_whiten(x: Tensor, mask: Tensor, *, eps: float = 1e-8) -> Tensor:
    """``(x - mean) / sqrt(var + eps)`` where unmasked, 0 where masked.

    Args:
        x: [...] values.
        mask: [...] bool, of the shape of ``x``.
        eps: added to the variance.

    Raises:
        ValueError: the shapes differ.
    """
    require_shape_of_mask(mask, x)
    mean, var = masked_moments(x, mask)
    return torch.where(mask, x - mean, 0.0) * torch.rsqrt(var + eps)


def require_shape_of_mask(mask: Tensor, *tensors: Tensor | None) -> None:
    """Refuses tensors that would be broadcast: a column or a row read once for each token is a mistake that trains.

    Args:
        mask: the shape that is wanted.
        tensors: what must have it; None passes.

    Raises:
        ValueError: one of them has another shape.
    """
    for x in tensors:
        if x is not None and x.shape != mask.shape:
            raise ValueError(f"values of shape {tuple(x.shape)} do not fit a mask of shape {tuple(mask.shape)}")
