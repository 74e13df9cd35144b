import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from rlhf_ray.algorithms.advantages import gae

NAN = float("nan")
REWARDS = [1.0, 2.0, 3.0]
VALUES = [0.5, 1.0, 2.0]


@pytest.mark.parametrize(
    ("mask", "advantages", "returns"),
    [
        # t2: 3 - 2 = 1.  t1: (2 + 0.5·2 - 1) + 0.25·1 = 2.25.  t0: (1 + 0.5·1 - 0.5) + 0.25·2.25 = 1.5625.
        ([True, True, True], [1.5625, 2.25, 1.0], [2.0625, 3.25, 3.0]),
        # Padding on the right.  t1: 2 - 1 = 1.  t0: 1 + 0.25·1 = 1.25.
        ([True, True, False], [1.25, 1.0, 0.0], [1.75, 2.0, 0.0]),
        # A hole.  t2: 1.  t0: (1 + 0.5·2 - 0.5) + 0.25·1 = 1.75: t2 is what follows t0.
        ([True, False, True], [1.75, 0.0, 1.0], [2.25, 0.0, 3.0]),
        # Padding on the left.
        ([False, True, True], [0.0, 2.25, 1.0], [0.0, 3.25, 3.0]),
        # One token alone.
        ([False, True, False], [0.0, 1.0, 0.0], [0.0, 2.0, 0.0]),
        ([False, False, False], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
    ],
)
def test_gae_by_hand_with_gamma_and_lambda_of_one_half(mask, advantages, returns):
    counts = torch.tensor([mask])
    rewards = torch.where(counts, torch.tensor([REWARDS]), NAN)  # what is masked must not be read
    values = torch.where(counts, torch.tensor([VALUES]), NAN)
    got_advantages, got_returns = gae(rewards, values, counts, gamma=0.5, lam=0.5)
    assert_close(got_advantages, torch.tensor([advantages]))
    assert_close(got_returns, torch.tensor([returns]))


def test_lambda_zero_is_the_one_step_difference_and_lambda_one_the_whole_return():
    rewards, values, mask = torch.tensor([REWARDS]), torch.tensor([VALUES]), torch.ones(1, 3, dtype=torch.bool)
    assert gae(rewards, values, mask, gamma=1.0, lam=0.0)[0].tolist() == [[1.5, 3.0, 1.0]]
    assert gae(rewards, values, mask, gamma=1.0, lam=1.0)[1].tolist() == [[6.0, 5.0, 3.0]]


def test_advantages_and_returns_carry_no_gradient():
    values = torch.tensor([VALUES], requires_grad=True)
    advantages, returns = gae(torch.tensor([REWARDS]), values, torch.ones(1, 3, dtype=torch.bool), gamma=1.0, lam=0.9)
    assert not advantages.requires_grad
    assert not returns.requires_grad


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="must share one shape"):
        gae(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 1, dtype=torch.bool), gamma=1.0, lam=0.95)


def slow_gae(rewards, values, mask, gamma, lam):
    """Equation 16 of the paper as it is written, a sum for each token, after cutting out the masked ones."""
    advantages, returns = np.zeros_like(rewards), np.zeros_like(rewards)
    for row in range(len(rewards)):
        kept = np.flatnonzero(mask[row])
        r, v = rewards[row, kept], np.append(values[row, kept], 0.0)
        deltas = r + gamma * v[1:] - v[:-1]
        for t, column in enumerate(kept):
            advantages[row, column] = sum((gamma * lam) ** i * deltas[t + i] for i in range(len(kept) - t))
            returns[row, column] = advantages[row, column] + v[t]
    return advantages, returns


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 4),
    columns=st.integers(1, 9),
    kept=st.floats(0, 1),
    gamma=st.floats(0.1, 1),
    lam=st.floats(0, 1),
)
def test_gae_agrees_with_a_slow_sum_over_the_unmasked_tokens(seed, rows, columns, kept, gamma, lam):
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=(2, rows, columns))
    mask = rng.random((rows, columns)) < kept
    got = gae(*map(torch.from_numpy, (rewards, values, mask)), gamma=gamma, lam=lam)
    for ours, theirs in zip(got, slow_gae(rewards, values, mask, gamma, lam), strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-10, atol=1e-10)
