"""Correction for samples drawn by an older policy than the one that is being updated."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_ray.algorithms.masking import masked_mean, require_shape_of_mask


@torch.no_grad()
def importance_weights(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, *, cap: float
) -> tuple[Tensor, Tensor]:
    """``min(exp(old_logprob - rollout_logprob), cap)``, token by token: truncated importance sampling (Ionides 2008).

    The weight that decoupled PPO puts on its clipped surrogate (Fu et al. 2025, AReaL): it carries the behaviour
    policy, which sampled, to the proximal one, which the ratio is clipped around.

    Args:
        old_logprobs: [B, T] of the proximal policy, nats.
        rollout_logprobs: [B, T] of the policy that sampled each token, nats.
        mask: [B, T] bool, True on response tokens.
        cap: largest weight.

    Returns:
        weights [B, T], 1 where masked, without gradient; and the share of unmasked tokens that the cap cut, a scalar.
        A NaN log-probability stays NaN, so the step that meets it is seen and skipped.

    Raises:
        ValueError: the shapes differ.
    """
    require_shape_of_mask(mask, old_logprobs, rollout_logprobs)
    ratio = torch.where(mask, old_logprobs - rollout_logprobs, 0.0).exp()
    clipped_share = masked_mean((ratio > cap).to(ratio.dtype), mask)
    return ratio.clamp(max=cap), clipped_share
