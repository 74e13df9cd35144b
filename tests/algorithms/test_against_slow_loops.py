"""Every estimator and loss against the formula written out token by token in plain Python, and what must not matter.

The loops know no masks, no broadcasting and no gradients: a response is the list of its tokens that count.
"""

from __future__ import annotations

import math
from statistics import fmean, pstdev, stdev
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad
from torch.testing import assert_close

from rlhf_ray.algorithms.advantages import NEED_GROUPS, EstimatorName, estimate, gae, grpo
from rlhf_ray.algorithms.losses import entropy_from_logits, explained_variance, policy_loss, value_loss
from rlhf_ray.algorithms.masking import masked_mean, masked_whiten
from rlhf_ray.algorithms.offpolicy import importance_weights
from rlhf_ray.algorithms.preference_loss import bradley_terry_loss
from rlhf_ray.algorithms.rewards import token_rewards

NAN = float("nan")
NAMES = get_args(EstimatorName)


class RandomBatch:
    """Responses of every kind: whole, with holes, of one token, padded on either side. Masked entries are NaN."""

    def __init__(self, seed: int, rows: int, columns: int, kept: float) -> None:
        self.rng = np.random.default_rng(seed)
        self.mask = self.rng.random((rows, columns)) < kept
        self.mask[np.arange(rows), self.rng.integers(columns, size=rows)] = True  # at least one token in each
        # Two groups or one, of two or more, in any order and under any name.
        ids = np.repeat([41, -3], [rows // 2, rows - rows // 2]) if rows >= 4 else np.full(rows, 5)
        self.groups = torch.from_numpy(self.rng.permutation(ids))

    def normal(self, scale: float = 1.0) -> np.ndarray:
        return np.where(self.mask, scale * self.rng.normal(size=self.mask.shape), NAN)

    def tokens(self, x: np.ndarray) -> list[list[float]]:
        """Of each row those that count."""
        return [[float(x[row, t]) for t in np.flatnonzero(self.mask[row])] for row in range(len(x))]

    def spread(self, rows: list[list[float]]) -> torch.Tensor:
        """The inverse of ``tokens``, with 0 where masked."""
        out = np.zeros(self.mask.shape)
        for row, values in enumerate(rows):
            out[row, self.mask[row]] = values
        return torch.from_numpy(out)

    def members(self, row: int) -> list[int]:
        return [other for other in range(len(self.mask)) if self.groups[other] == self.groups[row]]


batches = st.builds(
    RandomBatch,
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(2, 7),
    columns=st.integers(1, 9),
    kept=st.floats(0, 1),
)
shares = st.floats(0, 1)
many = settings(max_examples=60, deadline=None)


def flat(rows: list[list[float]]) -> list[float]:
    return [x for row in rows for x in row]


def close(ours: torch.Tensor, theirs: torch.Tensor | float) -> None:
    assert_close(ours, torch.as_tensor(theirs, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def tensors(*arrays: np.ndarray) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(array) for array in arrays)


def slow_gae(rewards, values, gamma, lam):
    """Equation 16 of the paper as it is written: for each token a sum over those after it."""
    advantages, returns = [], []
    for r, v in zip(rewards, values, strict=True):
        n = len(r)
        deltas = [r[t] + gamma * (v[t + 1] if t + 1 < n else 0.0) - v[t] for t in range(n)]
        advantages.append([sum((gamma * lam) ** i * deltas[t + i] for i in range(n - t)) for t in range(n)])
        returns.append([advantages[-1][t] + v[t] for t in range(n)])
    return advantages, returns


def slow_whiten(rows):
    mean, variance = fmean(flat(rows)), pstdev(flat(rows)) ** 2
    return [[(x - mean) / math.sqrt(variance + 1e-8) for x in row] for row in rows]


def slow_estimate(name, batch, rewards, values, gamma, lam):
    if name == "gae":
        advantages, returns = slow_gae(rewards, values, gamma, lam)
        return slow_whiten(advantages), returns
    if name == "reinforce_pp":
        returns = [[sum(gamma ** (k - t) * r[k] for k in range(t, len(r))) for t in range(len(r))] for r in rewards]
        return slow_whiten(returns), returns
    whole = [sum(r) for r in rewards]
    advantages = []
    for row, own in enumerate(whole):
        group = [whole[other] for other in batch.members(row)]
        others = [whole[other] for other in batch.members(row) if other != row]
        advantage = own - fmean(others if name == "rloo" else group)
        if name == "grpo":
            advantage /= stdev(group) + 1e-4
        advantages.append([advantage] * len(rewards[row]))
    if name == "reinforce_pp_baseline":
        advantages = slow_whiten(advantages)
    return advantages, [[own] * len(r) for own, r in zip(whole, rewards, strict=True)]


@pytest.mark.parametrize("name", NAMES)
@many
@given(batch=batches, gamma=st.floats(0.1, 1), lam=shares)
def test_every_estimator_agrees_with_a_slow_loop(name, batch, gamma, lam):
    rewards, values = batch.normal(), batch.normal()
    got = estimate(
        name, *tensors(rewards, batch.mask), values=torch.from_numpy(values), groups=batch.groups, gamma=gamma, lam=lam
    )
    slow = slow_estimate(name, batch, batch.tokens(rewards), batch.tokens(values), gamma, lam)
    for ours, theirs in zip(got, slow, strict=True):
        close(ours, batch.spread(theirs))


@pytest.mark.parametrize("name", NAMES)
@many
@given(batch=batches, left=st.integers(0, 2), right=st.integers(0, 3), hole=st.integers(0, 9))
def test_padding_order_and_names_of_groups_do_not_matter_to_an_estimator(name, batch, left, right, hole):
    def run(rewards, mask, values, groups):
        return estimate(name, rewards, mask, values=values, groups=groups, gamma=0.9, lam=0.8)

    rewards, mask, values = tensors(batch.normal(), batch.mask, batch.normal())
    plain = run(rewards, mask, values, batch.groups)

    def wider(x, fill=NAN):
        x = torch.cat([x[:, :hole], torch.full_like(x[:, :1], fill), x[:, hole:]], dim=1)
        return pad(x, (left, right), value=fill)

    for got, was in zip(run(wider(rewards), wider(mask, False), wider(values), batch.groups), plain, strict=True):
        close(got, wider(was, 0.0))

    order = torch.from_numpy(batch.rng.permutation(len(mask)))
    shuffled = run(rewards[order], mask[order], values[order], 100 - 7 * batch.groups[order])
    for got, was in zip(shuffled, plain, strict=True):
        close(got, was[order])


@pytest.mark.parametrize("name", sorted(NEED_GROUPS))
@many
@given(batch=batches, shift=st.floats(-10, 10))
def test_a_prompt_whose_responses_all_score_higher_is_not_preferred(name, batch, shift):
    rewards, mask = tensors(batch.normal(), batch.mask)
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    lucky = (batch.groups == batch.groups[0]).unsqueeze(1) & last
    both = [
        estimate(name, x, mask, groups=batch.groups, gamma=1.0, lam=1.0)[0] for x in (rewards, rewards + shift * lucky)
    ]
    close(both[1], both[0])


@many
@given(batch=batches, scale=st.floats(0.1, 10))
def test_grpo_does_not_know_the_scale_of_the_scores(batch, scale):
    rewards, mask = tensors(batch.normal(), batch.mask)
    both = [grpo(x, mask, batch.groups, eps=0.0)[0] for x in (rewards, scale * rewards)]
    assert_close(both[1], both[0], rtol=1e-6, atol=1e-6)


@many
@given(batch=batches, gamma=st.floats(0.1, 1), lam=shares)
def test_gae_agrees_with_a_slow_loop_also_where_rows_have_no_tokens(batch, gamma, lam):
    batch.mask[batch.rng.random(len(batch.mask)) < 0.3] = False
    rewards, values = batch.normal(), batch.normal()
    got = gae(*tensors(rewards, values, batch.mask), gamma=gamma, lam=lam)
    for ours, theirs in zip(got, slow_gae(batch.tokens(rewards), batch.tokens(values), gamma, lam), strict=True):
        close(ours, batch.spread(theirs))


@many
@given(batch=batches, kl_coef=shares, penalty=st.floats(0, 2), score_clip=st.none() | st.floats(0.1, 2))
def test_token_rewards_agree_with_a_slow_loop(batch, kl_coef, penalty, score_clip):
    logprobs, ref = batch.normal(), batch.normal()
    scores, truncated = batch.rng.normal(size=len(batch.mask)), batch.rng.random(len(batch.mask)) < 0.5
    slow = []
    for row, (own, theirs) in enumerate(zip(batch.tokens(logprobs), batch.tokens(ref), strict=True)):
        score = float(scores[row])
        if score_clip is not None:
            score = min(max(score, -score_clip), score_clip)
        score -= penalty if truncated[row] else 0.0
        slow.append([-kl_coef * (a - b) for a, b in zip(own, theirs, strict=True)])
        slow[-1][-1] += score
    got = token_rewards(
        *tensors(scores, logprobs, ref, batch.mask),
        kl_coef=kl_coef,
        truncated=torch.from_numpy(truncated),
        missing_eos_penalty=penalty,
        score_clip=score_clip,
    )
    close(got, batch.spread(slow))


@many
@given(batch=batches)
def test_means_whitening_and_explained_variance_agree_with_slow_loops(batch):
    x, y = batch.normal(), batch.normal()
    rows, others = batch.tokens(x), batch.tokens(y)
    close(masked_mean(*tensors(x, batch.mask)), fmean(flat(rows)))
    close(masked_whiten(*tensors(x, batch.mask)), batch.spread(slow_whiten(rows)))
    residuals = [b - a for a, b in zip(flat(rows), flat(others), strict=True)]
    explained = 1 - (pstdev(residuals) / pstdev(flat(others))) ** 2 if len(residuals) > 1 else 0.0
    assert explained_variance(*tensors(x, y, batch.mask)) == pytest.approx(explained, rel=1e-6, abs=1e-9)


@many
@given(
    batch=batches,
    clip=st.floats(0.05, 0.5),
    clip_high=st.none() | st.floats(0.05, 0.9),
    dual_clip=st.none() | st.floats(1.01, 4),
    weighted=st.booleans(),
    count=st.none() | st.integers(1, 100),
)
def test_the_policy_loss_agrees_with_a_slow_loop(batch, clip, clip_high, dual_clip, weighted, count):
    logprobs, advantages, weights = batch.normal(), batch.normal(), np.abs(batch.normal())
    old = logprobs + batch.normal(0.5)
    total = kl = outside = held = 0.0
    for new, before, a, w in zip(*(flat(batch.tokens(x)) for x in (logprobs, old, advantages, weights)), strict=True):
        ratio = math.exp(new - before)
        low, high = 1 - clip, 1 + (clip if clip_high is None else clip_high)
        surrogate = min(ratio * a, min(max(ratio, low), high) * a)
        if dual_clip is not None and a < 0:
            held += surrogate < dual_clip * a
            surrogate = max(surrogate, dual_clip * a)
        total -= (w if weighted else 1.0) * surrogate
        kl += ratio - 1 - math.log(ratio)
        outside += not low <= ratio <= high
    n = batch.mask.sum() if count is None else count
    loss, stats = policy_loss(
        *tensors(logprobs, old, advantages, batch.mask),
        clip=clip,
        clip_high=clip_high,
        dual_clip=dual_clip,
        weights=torch.from_numpy(weights) if weighted else None,
        count=count,
    )
    for ours, theirs in zip(
        (loss, stats.approx_kl, stats.clipfrac, stats.dual_clipfrac), (total, kl, outside, held), strict=True
    ):
        close(ours, theirs / n)


@many
@given(batch=batches, clip=st.floats(0.05, 1), count=st.none() | st.integers(1, 100))
def test_the_value_loss_agrees_with_a_slow_loop(batch, clip, count):
    values, old, returns = batch.normal(), batch.normal(), batch.normal()
    total = 0.0
    for value, before, wanted in zip(*(flat(batch.tokens(x)) for x in (values, old, returns)), strict=True):
        near = min(max(value, before - clip), before + clip)
        total += 0.5 * max((value - wanted) ** 2, (near - wanted) ** 2)
    n = batch.mask.sum() if count is None else count
    close(value_loss(*tensors(values, old, returns, batch.mask), clip=clip, count=count), total / n)


@many
@given(batch=batches, cap=st.floats(1, 4))
def test_importance_weights_agree_with_a_slow_loop(batch, cap):
    old, rollout = batch.normal(), batch.normal()
    weights, clipped_share = importance_weights(*tensors(old, rollout, batch.mask), cap=cap)
    pairs = zip(batch.tokens(old), batch.tokens(rollout), strict=True)
    ratios = [[math.exp(a - b) for a, b in zip(*pair, strict=True)] for pair in pairs]
    slow = batch.spread([[min(ratio, cap) for ratio in row] for row in ratios])
    close(weights, torch.where(torch.from_numpy(batch.mask), slow, 1.0))
    close(clipped_share, fmean(ratio > cap for ratio in flat(ratios)))


@many
@given(seed=st.integers(0, 2**32 - 1), vocabulary=st.integers(1, 6))
def test_the_entropy_agrees_with_a_slow_loop(seed, vocabulary):
    logits = np.random.default_rng(seed).normal(size=(2, 3, vocabulary)) * 3
    slow = np.empty((2, 3))
    for place in np.ndindex(2, 3):
        powers = [math.exp(x) for x in logits[place]]
        slow[place] = -sum(p / sum(powers) * math.log(p / sum(powers)) for p in powers)
    close(entropy_from_logits(torch.from_numpy(logits)), torch.from_numpy(slow))


@many
@given(seed=st.integers(0, 2**32 - 1), pairs=st.integers(1, 6), center_coef=shares)
def test_the_preference_loss_agrees_with_a_slow_loop(seed, pairs, center_coef):
    rng = np.random.default_rng(seed)
    chosen, rejected, margin = rng.normal(size=(3, pairs))
    probability, weight = rng.random((2, pairs))
    total = 0.0
    for c, r, m, p, w in zip(chosen, rejected, margin, probability, weight, strict=True):
        wins = 1 / (1 + math.exp(-(c - r - m)))
        total += w * (-p * math.log(wins) - (1 - p) * math.log(1 - wins)) + center_coef * (c + r) ** 2
    close(
        bradley_terry_loss(
            *tensors(chosen, rejected),
            probability=torch.from_numpy(probability),
            weight=torch.from_numpy(weight),
            margin=torch.from_numpy(margin),
            center_coef=center_coef,
        ),
        total / pairs,
    )


@many
@given(batch=batches, data=st.data())
def test_losses_add_up_over_any_split_into_micro_batches(batch, data):
    rows = len(batch.mask)
    cut = data.draw(st.integers(0, rows))
    order = batch.rng.permutation(rows)
    inputs = [batch.normal() for _ in range(6)]

    def losses(chosen):
        logprobs, old, advantages, values, old_values, returns = tensors(*(x[chosen] for x in inputs))
        mask = torch.from_numpy(batch.mask[chosen])
        options = {"clip": 0.2, "count": float(batch.mask.sum())}
        policy, stats = policy_loss(logprobs, old, advantages, mask, clip_high=0.3, dual_clip=1.5, **options)
        value = value_loss(values, old_values, returns, mask, **options)
        return torch.stack([policy, value, stats.approx_kl, stats.clipfrac, stats.dual_clipfrac])

    close(losses(order[:cut]) + losses(order[cut:]), losses(np.arange(rows)))
