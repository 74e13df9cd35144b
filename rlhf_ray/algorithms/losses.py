"""PPO's losses. All are token means; with ``count`` = the tokens of the whole batch they add up over micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_ray.algorithms.kl import k3
from rlhf_ray.algorithms.masking import masked_mean, require_shape_of_mask

_LOG_RATIO_LIMIT = 20.0


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyStats:
    """What a policy loss saw: detached scalars over the same ``count`` as the loss, so they add up as it does."""

    approx_kl: Tensor
    """KL(old ‖ current), k3 estimate, nats per token."""
    clipfrac: Tensor
    """Share of tokens whose ratio lies outside [1 - clip, 1 + clip_high]."""
    dual_clipfrac: Tensor
    """Share of tokens that the dual clip holds; 0 where it is off."""


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
    count: Tensor | float | None = None,
) -> tuple[Tensor, PolicyStats]:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7); with ``weights``, decoupled PPO (Fu et al. 2025, AReaL).

        ratio = exp(logprob - old_logprob)
        surrogate = min(ratio · A, clip(ratio, 1 - clip, 1 + clip_high) · A)
        surrogate = max(surrogate, dual_clip · A) where A < 0
        loss = -mean( weight · surrogate )

    The clip is around the proximal policy (``old_logprobs``); the weight carries the sampler's policy to it.

    A ``clip_high`` above ``clip`` lets an unlikely token that did well gain probability faster (DAPO's clip-higher, Yu
    et al. 2025; 0.28 beside 0.2 there). ``dual_clip`` bounds what PPO leaves unbounded, the loss of a token that did
    badly and became far more likely: beyond that ratio it teaches nothing (Ye et al. 2020, who take 3).

    Args:
        logprobs: [B, T] of the current policy, nats; the only argument that gets a gradient.
        old_logprobs: [B, T] of the proximal policy, before the update, nats.
        advantages: [B, T].
        mask: [B, T] bool, True on response tokens.
        clip: how far below 1 the ratio may fall, and above 1 rise, and still gain by it.
        clip_high: how far above 1, where that differs; None: as far as below.
        dual_clip: largest ratio that a token of negative advantage is punished by, above 1; None: no bound.
        weights: [B, T] from ``offpolicy.importance_weights``; None: on-policy.
        count: divisor of the sums; the unmasked tokens by default.

    Returns:
        the loss, a scalar, and its ``PolicyStats``.

    Raises:
        ValueError: the shapes differ, or ``dual_clip`` is not above 1.
    """
    if dual_clip is not None and dual_clip <= 1.0:
        raise ValueError(f"dual_clip = {dual_clip:g} would hold even a ratio of 1; choose a bound above 1, such as 3")
    require_shape_of_mask(mask, logprobs, old_logprobs, advantages, weights)
    low, high = 1.0 - clip, 1.0 + (clip if clip_high is None else clip_high)
    # Masked entries become a ratio of 1 before the exponential: a zero gradient times an infinite one would be NaN.
    log_ratio = torch.where(mask, logprobs - old_logprobs.detach(), 0.0)
    # Beyond ±20 nats this clamp drops the token's gradient on purpose: such a ratio is an accident, not a lesson, and
    # e^20 of it would drown the batch. approx_kl below is not clamped and shows it.
    ratio = torch.exp(log_ratio.clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT))
    advantages = advantages.detach()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    held = torch.zeros_like(mask)
    if dual_clip is not None:
        held = (advantages < 0) & (ratio > dual_clip)
        surrogate = torch.where(held, dual_clip * advantages, surrogate)
    if weights is not None:
        surrogate = weights.detach() * surrogate
    with torch.no_grad():
        outside = ((ratio < low) | (ratio > high)).to(ratio.dtype)
        stats = PolicyStats(
            approx_kl=masked_mean(k3(torch.zeros_like(log_ratio), log_ratio), mask, count=count),
            clipfrac=masked_mean(outside, mask, count=count),
            dual_clipfrac=masked_mean(held.to(ratio.dtype), mask, count=count),
        )
    return -masked_mean(surrogate, mask, count=count), stats


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float,
    count: Tensor | float | None = None,
) -> Tensor:
    """Half the squared error, clipped (Huang et al. 2024, details of PPO's value loss).

        clipped = old_value + clip(value - old_value, -clip, clip)
        loss = 0.5 · mean( max((value - return)², (clipped - return)²) )

    Args:
        values: [B, T] of the current critic; the only argument that gets a gradient.
        old_values: [B, T] before the update.
        returns: [B, T] from ``advantages.gae``.
        mask: [B, T] bool, True on response tokens.
        clip: how far a value may move from the old one and still gain by it.
        count: divisor of the sum; the unmasked tokens by default.

    Returns:
        a scalar.

    Raises:
        ValueError: the shapes differ.
    """
    require_shape_of_mask(mask, values, old_values, returns)
    old_values, returns = old_values.detach(), returns.detach()
    values = torch.where(mask, values, 0.0)
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    error = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * masked_mean(error, mask, count=count)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy of the softmax over the last dimension, nats: [..., V] → [...].

    16-bit logits are raised to float32 first; divide by the sampling temperature before the call.
    """
    logprobs = torch.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return -(logprobs.exp() * logprobs).sum(dim=-1)


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """``1 - var(returns - values) / var(returns)`` over the unmasked tokens.

    1 is a perfect critic, 0 one that is as good as a constant; 0.0 also where the returns do not vary, since there is
    nothing to explain.
    """
    explained, actual = values[mask], returns[mask]
    if actual.min() == actual.max():
        return 0.0
    return float(1.0 - (actual - explained).var(correction=0) / actual.var(correction=0))
