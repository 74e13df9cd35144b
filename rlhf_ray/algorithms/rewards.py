"""From one score per response to one reward per token."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_ray.algorithms.kl import k1
from rlhf_ray.algorithms.masking import require_shape_of_mask


@torch.no_grad()
def token_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    truncated: Tensor | None,
    missing_eos_penalty: float = 0.0,
    score_clip: float | None = None,
) -> Tensor:
    """``-kl_coef · k1`` on every token, and the score on the last generated one (Ziegler et al. 2019, eq. 2).

    Args:
        scores: [B] reward model's scores, normalised.
        logprobs: [B, T] log-probabilities of the policy that is being updated, before the update, nats.
        ref_logprobs: [B, T] the reference's, nats.
        mask: [B, T] bool, True on response tokens.
        kl_coef: weight of the KL penalty.
        truncated: [B] bool, True where the response ended without EOS; None: none did.
        missing_eos_penalty: taken off the score of a truncated response, after the clip, so the clip never swallows it.
        score_clip: scores are clipped to ± this first; None: not at all.

    Returns:
        [B, T] rewards, 0 where masked, without gradient.

    Raises:
        ValueError: the shapes differ, or a row has no response token, so its score has nowhere to land.
    """
    require_shape_of_mask(mask, logprobs, ref_logprobs)
    if not mask.any(dim=1).all():
        raise ValueError("a response has no tokens, so there is no last token for its score to land on")
    if score_clip is not None:
        scores = scores.clamp(-score_clip, score_clip)
    if truncated is not None:
        scores = torch.where(truncated, scores - missing_eos_penalty, scores)
    rewards = torch.where(mask, -kl_coef * k1(logprobs, ref_logprobs), 0.0)
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, -1).amax(dim=1, keepdim=True)
    return rewards.scatter_add(1, last, scores.to(rewards.dtype).unsqueeze(1))
