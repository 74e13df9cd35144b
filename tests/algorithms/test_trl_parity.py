"""The same numbers as TRL 1.9.2's PPO, on one small batch.

How they were made: the tensors below went through the very lines of ``PPOTrainer.train`` in
``trl/experimental/ppo/ppo_trainer.py`` of TRL 1.9.2 (torch 2.13, CPU, float32), from the padding masks to the whitened
advantages and from the new log-probabilities to the two losses, with kl_coef 0.1, γ 0.95, λ 0.9, both clips 0.2 and no
whitening of rewards. What came out was written down to six decimals.

Where TRL means something else, the test says so and gives our functions what it means:

- The score lands on the first padding slot, and on the last token only in a row without padding. That slot has a value
  and is trained as a step of the episode. Ours lands on the last token, and padding is nothing. With TRL's longer mask,
  which counts that slot as a token, ours are its numbers.
- Its variance divides by n - 1, ours by n: its whitened advantages are smaller by √((n - 1) / n).
"""

import math

import torch
from torch.testing import assert_close

from rlhf_ray.algorithms.advantages import gae
from rlhf_ray.algorithms.kl import k1, k3
from rlhf_ray.algorithms.losses import policy_loss, value_loss
from rlhf_ray.algorithms.masking import masked_whiten
from rlhf_ray.algorithms.rewards import token_rewards

TOKENS = torch.tensor([5, 3, 1])[:, None] > torch.arange(5)
WITH_SCORE_SLOT = torch.tensor([5, 4, 2])[:, None] > torch.arange(5)

LOGPROBS = torch.tensor(
    [[-0.58, -1.68, -2.81, -1.16, -2.15], [-2.34, -1.26, -1.0, -1.93, -1.74], [-1.86, -1.39, -2.01, -0.84, -2.14]]
)
REF_LOGPROBS = torch.tensor(
    [[-0.53, -1.91, -2.66, -1.52, -2.75], [-2.19, -0.68, -0.62, -1.62, -1.66], [-1.35, -1.91, -2.33, -0.85, -2.43]]
)
VALUES = torch.tensor(
    [[0.56, -0.72, 0.33, 0.58, -1.35], [0.38, -0.52, -0.15, 0.39, -0.44], [0.17, 0.4, 0.19, -0.44, -0.56]]
)
SCORES = torch.tensor([0.8, -1.3, 0.9])
NEW_LOGPROBS = torch.tensor(
    [[-0.65, -1.18, -2.86, -0.65, -2.16], [-2.84, -1.45, -0.73, -1.24, -1.7], [-2.09, -1.77, -2.18, -0.51, -2.13]]
)
NEW_VALUES = torch.tensor(
    [[0.47, -0.76, 0.9, 1.51, -1.49], [0.28, -0.99, -0.7, 0.81, -0.09], [0.3, -0.12, -0.21, -0.17, -0.33]]
)

TRL_K1_REWARDS = torch.tensor(
    [[0.005, -0.023, 0.015, -0.036, -0.06], [0.015, 0.058, 0.038, 0.0, 0.0], [0.051, 0.0, 0.0, 0.0, 0.0]]
)
TRL_K3_REWARDS = torch.tensor(
    [
        [-0.000127, -0.002453, -0.001183, -0.005768, -0.014881],
        [-0.001183, -0.020604, -0.008228, 0.0, 0.0],
        [-0.015529, 0.0, 0.0, 0.0, 0.0],
    ]
)
TRL_REWARDS = torch.tensor(
    [[0.005, -0.023, 0.015, -0.036, 0.74], [0.015, 0.058, 0.038, -1.3, 0.0], [0.051, 0.9, 0.0, 0.0, 0.0]]
)
TRL_ADVANTAGES = torch.tensor(
    [
        [-0.272222, 1.130734, 0.140625, -0.11155, 2.09],
        [-1.134665, -0.322415, -0.88645, -1.69, 0.0],
        [0.6885, 0.5, 0.0, 0.0, 0.0],
    ]
)
TRL_RETURNS = torch.tensor(
    [
        [0.287778, 0.410734, 0.470625, 0.46845, 0.74],
        [-0.754665, -0.842415, -1.03645, -1.3, 0.0],
        [0.8585, 0.9, 0.0, 0.0, 0.0],
    ]
)
TRL_WHITENED = torch.tensor(
    [
        [-0.413781, 0.971128, -0.006245, -0.255175, 1.918053],
        [-1.265128, -0.463328, -1.020107, 0.0, 0.0],
        [0.534582, 0.0, 0.0, 0.0, 0.0],
    ]
)
TRL_POLICY_LOSS = 0.0065757
TRL_VALUE_LOSS = 0.6824481


def same(ours, theirs):
    """As close as six decimals are."""
    assert_close(ours, torch.as_tensor(theirs), rtol=0, atol=2e-6)


def test_the_kl_part_of_the_rewards_is_that_of_trl_for_k1_and_k3():
    kl_only = token_rewards(torch.zeros(3), LOGPROBS, REF_LOGPROBS, TOKENS, kl_coef=0.1, truncated=None)
    same(kl_only, TRL_K1_REWARDS)
    same(torch.where(TOKENS, -0.1 * k1(LOGPROBS, REF_LOGPROBS), 0.0), TRL_K1_REWARDS)
    same(torch.where(TOKENS, -0.1 * k3(LOGPROBS, REF_LOGPROBS), 0.0), TRL_K3_REWARDS)


def rewards_where_trl_puts_them():
    """With no KL in the slot of the score, where TRL makes both log-probabilities the same."""
    ref = torch.where(TOKENS, REF_LOGPROBS, LOGPROBS)
    return token_rewards(SCORES, LOGPROBS, ref, WITH_SCORE_SLOT, kl_coef=0.1, truncated=None)


def test_the_score_is_one_slot_earlier_than_in_trl_and_otherwise_the_rewards_are_the_same():
    same(rewards_where_trl_puts_them(), TRL_REWARDS)

    ours = token_rewards(SCORES, LOGPROBS, REF_LOGPROBS, TOKENS, kl_coef=0.1, truncated=None)
    same(ours[0], TRL_REWARDS[0])  # no padding, no difference
    same(ours[1], torch.tensor([0.015, 0.058, 0.038 - 1.3, 0.0, 0.0]))
    same(ours.sum(dim=1), TRL_REWARDS.sum(dim=1))


def test_advantages_and_returns_are_those_of_trl():
    advantages, returns = gae(rewards_where_trl_puts_them(), VALUES, WITH_SCORE_SLOT, gamma=0.95, lam=0.9)
    same(advantages, TRL_ADVANTAGES)
    same(returns, TRL_RETURNS)


def test_whitened_advantages_are_those_of_trl_but_for_the_divisor_of_the_variance():
    tokens = int(TOKENS.sum())
    same(masked_whiten(TRL_ADVANTAGES, TOKENS) * math.sqrt((tokens - 1) / tokens), TRL_WHITENED)


def test_the_clipped_policy_loss_is_that_of_trl():
    loss, _ = policy_loss(NEW_LOGPROBS, LOGPROBS, TRL_WHITENED, TOKENS, clip=0.2)
    same(loss, TRL_POLICY_LOSS)
    unclipped, _ = policy_loss(NEW_LOGPROBS, LOGPROBS, TRL_WHITENED, TOKENS, clip=0.999)
    assert unclipped < loss - 0.01  # so the clip is among what was compared


def test_the_clipped_value_loss_is_that_of_trl():
    loss = value_loss(NEW_VALUES, VALUES, TRL_RETURNS, WITH_SCORE_SLOT, clip=0.2)
    same(loss, TRL_VALUE_LOSS)
    assert value_loss(NEW_VALUES, VALUES, TRL_RETURNS, WITH_SCORE_SLOT, clip=100.0) < loss - 0.01
