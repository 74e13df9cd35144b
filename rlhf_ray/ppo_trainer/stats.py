"""What a step returns, under the names that TRL gave its statistics.

A name means what it meant there, with four differences: ``ppo/policy/approxkl`` is the k3 estimate (k2 there),
``ppo/policy/clipfrac`` counts every ratio outside the range (there only those that the clip stopped),
``ppo/val/var_explained`` is of the values before the update (there of those within it), and scores are shown as they
were given, before ``score_clip``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rlhf_ray.algorithms.kl import k1
from rlhf_ray.algorithms.masking import masked_mean
from rlhf_ray.types import Batch


def step_stats(
    batch: Batch, metrics: Mapping[str, float], old_logprobs: Tensor, *, kl_coef: float, vf_coef: float
) -> dict[str, Any]:
    """Numbers by name; ``…_dist`` are numpy arrays over the batch.

    Args:
        metrics, old_logprobs: what ``PPOUpdate.run`` returned.
        kl_coef: in force during the step.
    """
    kl = k1(old_logprobs, batch.ref_logprobs)
    queries = batch.prompt_len.float()
    responses = batch.response_mask.sum(dim=1).float()
    return {
        "objective/kl": metrics["kl"],
        "objective/kl_dist": kl.sum(dim=1).cpu().numpy(),
        "objective/kl_coef": kl_coef,
        "objective/entropy": float(-old_logprobs.sum(dim=1).mean()),
        "ppo/mean_non_score_reward": float(-kl_coef * masked_mean(kl, batch.response_mask)),
        "ppo/mean_scores": float(batch.scores.mean()),
        "ppo/std_scores": spread(batch.scores),
        "ppo/loss/policy": metrics["loss_policy"],
        "ppo/loss/value": metrics["loss_value"],
        "ppo/loss/total": metrics["loss_policy"] + vf_coef * metrics["loss_value"],
        "ppo/policy/entropy": metrics["entropy"],
        "ppo/policy/approxkl": metrics["approx_kl"],
        "ppo/policy/clipfrac": metrics["clipfrac"],
        "ppo/policy/grad_norm": metrics["grad_norm"],
        "ppo/returns/mean": metrics["return_mean"],
        "ppo/val/mean": metrics["value_mean"],
        "ppo/val/var_explained": metrics["explained_variance"],
        "tokens/queries_len_mean": float(queries.mean()),
        "tokens/queries_len_std": spread(queries),
        "tokens/queries_dist": queries.cpu().numpy(),
        "tokens/responses_len_mean": float(responses.mean()),
        "tokens/responses_len_std": spread(responses),
        "tokens/responses_dist": responses.cpu().numpy(),
    }


def spread(values: Tensor) -> float:
    """Standard deviation of a sample; 0 of a single value."""
    return float(values.std()) if len(values) > 1 else 0.0
