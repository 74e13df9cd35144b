"""From token rewards to advantages: with a critic, with a group of responses to one prompt, or with the batch alone.

    name                    needs     advantage of a token
    gae                     values    discounted sum of temporal differences, whitened over the batch
    rloo                    groups    return of its response minus the mean of the others' in the group
    grpo                    groups    return of its response, with mean 0 and deviation 1 in the group
    dr_grpo                 groups    return of its response minus the group's mean
    reinforce_pp            nothing   discounted return from the token on, whitened over the batch
    reinforce_pp_baseline   groups    as dr_grpo, whitened over the batch

``estimate`` is the one call for all of them; the functions below it are the formulas alone.

Shapes: B responses, T tokens. Rewards are per token, and the penalty for leaving the reference may be among them. The
*return* of a response is the plain sum of its token rewards: with k1 in the rewards that is r(x, y) - β log(π / π_ref)
of the whole response, which is what Ahmadian et al. (2024) call its reward R(x, y). Where the penalty belongs in the
loss instead, as in GRPO, make the rewards with ``kl_coef = 0`` and the return is the score.
"""

from __future__ import annotations

from typing import Literal, assert_never

import torch
from torch import Tensor

from rlhf_ray.algorithms.masking import masked_whiten, require_shape_of_mask

EstimatorName = Literal["gae", "rloo", "grpo", "dr_grpo", "reinforce_pp", "reinforce_pp_baseline"]

NEED_VALUES: frozenset[EstimatorName] = frozenset({"gae"})
"""Estimators that read a critic's values; the others have nothing for a value loss to do."""

NEED_GROUPS: frozenset[EstimatorName] = frozenset({"rloo", "grpo", "dr_grpo", "reinforce_pp_baseline"})
"""Estimators that compare the responses to one prompt, of which there must be two or more."""


@torch.no_grad()
def estimate(
    name: EstimatorName,
    rewards: Tensor,
    mask: Tensor,
    *,
    values: Tensor | None = None,
    groups: Tensor | None = None,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Advantages as the policy loss takes them, by the estimator that is named.

    Args:
        name: see the table at the top of this file.
        rewards: [B, T] per-token rewards.
        mask: [B, T] bool, True on tokens that count.
        values: [B, T] value before each token; for the estimators in ``NEED_VALUES``.
        groups: [B] integers, equal for responses to the same prompt; for the estimators in ``NEED_GROUPS``.
        gamma: discount γ per token; of gae and reinforce_pp. The others see a response as one action.
        lam: λ of gae.

    Returns:
        advantages and returns, each [B, T], 0 where masked, without gradient. Returns are never whitened.

    Raises:
        ValueError: the shapes differ, or values or groups are missing or unfit.
    """
    match name:
        case "gae":
            advantages, returns = gae(rewards, _given(values, "values", name), mask, gamma=gamma, lam=lam)
            return masked_whiten(advantages, mask), returns
        case "rloo":
            return rloo(rewards, mask, _given(groups, "groups", name))
        case "grpo":
            return grpo(rewards, mask, _given(groups, "groups", name))
        case "dr_grpo":
            return grpo(rewards, mask, _given(groups, "groups", name), divide_by_std=False)
        case "reinforce_pp":
            return reinforce_pp(rewards, mask, gamma=gamma)
        case "reinforce_pp_baseline":
            return reinforce_pp_baseline(rewards, mask, _given(groups, "groups", name))
        case _:
            assert_never(name)


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
        advantages and returns, each [B, T], 0 where masked, without gradient; not whitened.

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


@torch.no_grad()
def rloo(rewards: Tensor, mask: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024; Kool et al. 2019).

        R_i = Σ_t r_{i,t}
        A_i = R_i - mean_{j ≠ i in the group} R_j

    A response is one action, so each of its tokens gets its advantage. The baseline does not depend on the response
    that it is taken from, so it adds no bias, whatever the number of responses. Nothing is whitened or discounted.

    Args:
        rewards: [B, T] per-token rewards; the KL penalty belongs among them, as in the paper.
        mask: [B, T] bool, True on tokens that count; at least one in each row.
        groups: [B] integers, equal for responses to the same prompt, in any order; each at least twice.

    Returns:
        advantages and returns R_i, each [B, T], 0 where masked, without gradient.

    Raises:
        ValueError: the shapes differ, a response is alone in its group or has no tokens.
    """
    returns = _response_returns(rewards, mask)
    deviations, sizes = _group_deviations(returns, groups)
    # R_i minus the mean of the other n - 1 is the deviation from the mean of all n, times n / (n - 1).
    return _on_tokens(deviations * sizes / (sizes - 1), rewards, mask), _on_tokens(returns, rewards, mask)


@torch.no_grad()
def grpo(
    rewards: Tensor, mask: Tensor, groups: Tensor, *, divide_by_std: bool = True, eps: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """Group-relative advantages, outcome supervision (Shao et al. 2024, DeepSeekMath, sec. 4.1.2).

        R_i = Σ_t r_{i,t}
        A_i = (R_i - mean_group R) / (std_group R + eps)

    The deviation is that of a sample (divided by n - 1; the paper leaves it open). Without ``divide_by_std`` this is
    Dr. GRPO (Liu et al. 2025): the division weighs prompts that are nearly solved or nearly hopeless more.
    The other half of that paper, no division by each response's length, is what a token mean over the batch does.

    The paper keeps KL out of the rewards and adds ``kl.k3`` to the loss; where the rewards hold a KL penalty, it is
    compared and normalised with the score.

    Args:
        rewards: [B, T] per-token rewards.
        mask: [B, T] bool, True on tokens that count; at least one in each row.
        groups: [B] integers, equal for responses to the same prompt, in any order; each at least twice.
        divide_by_std: False for Dr. GRPO.
        eps: added to the deviation, in units of the return: a group that hardly differs teaches hardly anything.

    Returns:
        advantages and returns R_i, each [B, T], 0 where masked, without gradient.

    Raises:
        ValueError: the shapes differ, a response is alone in its group or has no tokens.
    """
    returns = _response_returns(rewards, mask)
    advantages, sizes = _group_deviations(returns, groups)
    if divide_by_std:
        variance = _group_sums(advantages**2, groups) / (sizes - 1)
        advantages = advantages / (variance.sqrt() + eps)
    return _on_tokens(advantages, rewards, mask), _on_tokens(returns, rewards, mask)


@torch.no_grad()
def reinforce_pp(rewards: Tensor, mask: Tensor, *, gamma: float) -> tuple[Tensor, Tensor]:
    """REINFORCE++ (Hu et al. 2025): no critic and no group; the batch is the baseline.

        G_t = r_t + γ G_{t+1}
        A_t = (G_t - mean_batch G) / std_batch G

    With k1 in the rewards and γ = 1, G_t is the score minus β times the KL of the tokens from t on, as in the paper.
    "t + 1" is the next unmasked token; mean and deviation are over all unmasked tokens of the batch.

    Args:
        rewards: [B, T] per-token rewards; the KL penalty belongs among them, as in the paper.
        mask: [B, T] bool, True on tokens that count.
        gamma: discount γ per token.

    Returns:
        advantages and returns G_t, each [B, T], 0 where masked, without gradient.

    Raises:
        ValueError: the shapes differ.
    """
    returns, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0)
    return masked_whiten(returns, mask), returns


@torch.no_grad()
def reinforce_pp_baseline(rewards: Tensor, mask: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """REINFORCE++ with a group baseline (Hu et al. 2025, the variant for several responses to a prompt).

        R_i = Σ_t r_{i,t}
        A'_i = R_i - mean_group R
        A_i = (A'_i - mean_batch A') / std_batch A'

    Unlike GRPO it divides by one deviation for the whole batch; mean and deviation are over all unmasked tokens, so a
    long response counts with each of its tokens. The paper keeps KL out of the rewards and adds ``kl.k2`` to the loss.

    Args:
        rewards: [B, T] per-token rewards.
        mask: [B, T] bool, True on tokens that count; at least one in each row.
        groups: [B] integers, equal for responses to the same prompt, in any order; each at least twice.

    Returns:
        advantages and returns R_i, each [B, T], 0 where masked, without gradient.

    Raises:
        ValueError: the shapes differ, a response is alone in its group or has no tokens.
    """
    advantages, returns = grpo(rewards, mask, groups, divide_by_std=False)
    return masked_whiten(advantages, mask), returns


def _given(tensor: Tensor | None, what: str, name: str) -> Tensor:
    if tensor is None:
        raise ValueError(f"the advantage estimator {name} needs {what}, and none were given")
    return tensor


def _response_returns(rewards: Tensor, mask: Tensor) -> Tensor:
    """[B] sums of the unmasked rewards, in float64.

    In float32 the mean of equal returns is off by a rounding, which a division by a deviation of nearly 0 would make
    an advantage of.
    """
    require_shape_of_mask(mask, rewards)
    if not mask.any(dim=1).all():
        raise ValueError("a response has no tokens, so there is no return to compare with its group's")
    return torch.where(mask, rewards, 0.0).sum(dim=1, dtype=torch.float64)


def _group_deviations(returns: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """[B] deviations from the mean of the group, and [B] sizes of the groups."""
    if groups.shape != returns.shape:
        raise ValueError(f"groups must hold one id for each of {len(returns)} responses, not {tuple(groups.shape)}")
    sizes = _group_sums(torch.ones_like(returns), groups)
    if (sizes < 2).any():
        alone = groups[sizes < 2][0].item()
        raise ValueError(
            f"group {alone} has a single response, and its advantage is a comparison with other responses to the same "
            "prompt; sample at least two for each prompt, or use an estimator that needs no groups"
        )
    return returns - _group_sums(returns, groups) / sizes, sizes


def _group_sums(x: Tensor, groups: Tensor) -> Tensor:
    """[B] → [B]: the sum over its group, at each member."""
    ids, members = groups.unique(return_inverse=True)
    return x.new_zeros(len(ids)).index_add(0, members, x)[members]


def _on_tokens(x: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
    """[B] → [B, T] in the dtype of the rewards: the same number on each unmasked token of a row, 0 where masked."""
    return torch.where(mask, x.to(rewards.dtype).unsqueeze(1), 0.0)
