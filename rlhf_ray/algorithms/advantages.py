"""Generalised advantage estimation over response tokens."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), over the unmasked tokens of each row.

        δ_t = r_t + γ V_{t+1} - V_t
        A_t = δ_t + γ λ A_{t+1}
        return_t = A_t + V_t

    "t + 1" is the next *unmasked* token of the row: a masked token, at the end or in the middle, is skipped as if it
    were not there, and its reward and value are never read. After the last one V and A are 0.

    Args:
        rewards: [B, T] per-token rewards.
        values: [B, T] value before each token.
        mask: [B, T] bool, True on tokens that count.
        gamma: discount γ per token.
        lam: λ; 0 is one-step temporal difference, 1 the whole return minus the value.

    Returns:
        advantages and returns, each [B, T], 0 where masked, without gradient.

    Raises:
        ValueError: the shapes differ.
    """
    if not rewards.shape == values.shape == mask.shape:
        raise ValueError(
            "rewards, values and mask must share one shape; "
            f"they have {tuple(rewards.shape)}, {tuple(values.shape)} and {tuple(mask.shape)}"
        )
    advantages = torch.zeros_like(values)
    next_value = torch.zeros_like(values[:, 0])
    next_advantage = torch.zeros_like(next_value)
    for t in reversed(range(values.shape[1])):
        counts = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = torch.where(counts, advantage, 0.0)
        next_value = torch.where(counts, values[:, t], next_value)
        next_advantage = torch.where(counts, advantage, next_advantage)
    return advantages, torch.where(mask, advantages + values, 0.0)
