import itertools
from typing import get_args

import pytest
import torch
from torch.testing import assert_close

from rlhf_ray.algorithms.advantages import (
    NEED_GROUPS,
    NEED_VALUES,
    EstimatorName,
    estimate,
    gae,
    grpo,
    reinforce_pp,
    reinforce_pp_baseline,
    rloo,
)
from rlhf_ray.algorithms.masking import masked_whiten

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


# Five responses to two prompts, in no order: whole, with a hole, of one token, of one token in the middle, padded.
GROUPS = torch.tensor([7, 4, 7, 4, 7])
GROUP_REWARDS = torch.tensor(
    [[1.0, 2.0, 3.0], [1.0, NAN, 1.0], [2.0, NAN, NAN], [NAN, -1.0, NAN], [0.0, 1.0, NAN]]
)  # what is masked must not be read
GROUP_MASK = ~GROUP_REWARDS.isnan()
WHOLE_RETURNS = [6.0, 2.0, 2.0, -1.0, 1.0]  # means 3 in group 7 and 0.5 in group 4


def on_tokens(per_response):
    return torch.where(GROUP_MASK, torch.tensor(per_response).unsqueeze(1), 0.0)


def test_rloo_by_hand():
    advantages, returns = rloo(GROUP_REWARDS, GROUP_MASK, GROUPS)
    # The others of each: (2 + 1) / 2, -1, (6 + 1) / 2, 2, (6 + 2) / 2.
    assert_close(advantages, on_tokens([4.5, 3.0, -1.5, -3.0, -3.0]))
    assert_close(returns, on_tokens(WHOLE_RETURNS))


def test_grpo_by_hand():
    advantages, returns = grpo(GROUP_REWARDS, GROUP_MASK, GROUPS, eps=0.0)
    # Deviations 3, -1, -2 over √((9 + 1 + 4) / 2) = 2.6457513; and ±1.5 over √((2.25 + 2.25) / 1) = 2.1213203.
    assert_close(advantages, on_tokens([1.1338934, 0.7071068, -0.3779645, -0.7071068, -0.7559289]))
    assert_close(returns, on_tokens(WHOLE_RETURNS))


def test_grpo_without_the_division_is_dr_grpo():
    advantages, _ = grpo(GROUP_REWARDS, GROUP_MASK, GROUPS, divide_by_std=False)
    assert_close(advantages, on_tokens([3.0, 1.5, -1.0, -1.5, -2.0]))


def test_the_eps_of_grpo_is_added_to_the_deviation():
    advantages, _ = grpo(GROUP_REWARDS, GROUP_MASK, GROUPS, eps=1.0)
    assert_close(advantages[0], torch.full((3,), 3 / 3.6457513))


def test_reinforce_pp_by_hand_with_gamma_of_one_half():
    advantages, returns = reinforce_pp(GROUP_REWARDS, GROUP_MASK, gamma=0.5)
    # 1 + (2 + 3/2)/2, 2 + 3/2, 3; 1 + 1/2 over the hole, 1; 2; -1; 0 + 1/2, 1
    by_hand = [[2.75, 3.5, 3.0], [1.5, 0.0, 1.0], [2.0, 0.0, 0.0], [0.0, -1.0, 0.0], [0.5, 1.0, 0.0]]
    assert_close(returns, torch.tensor(by_hand))
    # Nine tokens: mean 14.25 / 9 = 1.5833333, variance 38.3125 / 9 - 1.5833333² = 1.75.
    white = [
        [0.8819171, 1.4488638, 1.0708995],
        [-0.0629941, 0.0, -0.4409586],
        [0.3149704, 0.0, 0.0],
        [0.0, -1.9528165, 0.0],
        [-0.8189230, -0.4409586, 0.0],
    ]
    assert_close(advantages, torch.tensor(white), rtol=0, atol=1e-6)


def test_reinforce_pp_with_a_group_baseline_by_hand():
    advantages, returns = reinforce_pp_baseline(GROUP_REWARDS, GROUP_MASK, GROUPS)
    # Dr. GRPO's 3, 1.5, -1, -1.5, -2 on 3, 2, 1, 1, 2 tokens: mean 5.5 / 9 = 0.6111111, variance 42.75 / 9 - 0.3734568
    # = 4.3765432, deviation 2.0920190.
    assert_close(advantages, on_tokens([1.1419058, 0.4248952, -0.7701226, -1.0091262, -1.2481298]), rtol=0, atol=1e-6)
    assert_close(returns, on_tokens(WHOLE_RETURNS))


@pytest.mark.parametrize("score", [0.1, 3.3, -1234.567])
@pytest.mark.parametrize("name", sorted(NEED_GROUPS))
def test_a_group_of_equal_responses_teaches_nothing_whatever_the_rounding(name, score):
    rewards, mask = torch.full((3, 2), score), torch.tensor([[True, False]] * 3)
    advantages, _ = estimate(name, rewards, mask, groups=torch.zeros(3).long(), gamma=1.0, lam=0.95)
    assert_close(advantages, torch.zeros(3, 2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", sorted(NEED_GROUPS - {"reinforce_pp_baseline"}))
def test_a_nan_of_a_real_token_spoils_its_own_group_and_no_other(name):
    rewards = GROUP_REWARDS.clone()
    rewards[3, 1] = NAN
    advantages, _ = estimate(name, rewards, GROUP_MASK, groups=GROUPS, gamma=1.0, lam=0.95)
    assert advantages.isnan().equal(GROUP_MASK & (GROUPS == 4).unsqueeze(1))


def expected_policy_gradient(estimator):
    """Of one-token responses, two to a prompt, over all nine pairs that a policy of three answers may give."""
    logits = torch.tensor([0.5, -0.3, 1.1], dtype=torch.float64, requires_grad=True)
    logprobs = torch.log_softmax(logits, 0)
    scores = torch.tensor([1.0, 4.0, -2.0], dtype=torch.float64)
    mask, groups = torch.ones(2, 1, dtype=torch.bool), torch.zeros(2, dtype=torch.long)
    total = torch.zeros((), dtype=torch.float64)
    for answers in itertools.product(range(3), repeat=2):
        pair = torch.tensor(answers)
        advantages, _ = estimator(scores[pair].unsqueeze(1), mask, groups)
        chance = logprobs[pair].sum().exp().detach()
        total = total + chance * (advantages.squeeze(1) * logprobs[pair]).mean()
    (wanted,) = torch.autograd.grad((logprobs.exp() * scores).sum(), logits, retain_graph=True)
    (got,) = torch.autograd.grad(total, logits)
    return got, wanted


def test_the_leave_one_out_baseline_adds_no_bias_to_the_policy_gradient():
    assert_close(*expected_policy_gradient(rloo))


def test_the_mean_of_the_group_shrinks_the_policy_gradient_by_one_over_its_size():
    got, wanted = expected_policy_gradient(lambda *batch: grpo(*batch, divide_by_std=False))
    assert_close(got, wanted / 2)


def batch_for(name):
    """What the estimator asks for and no more."""
    needs = {"values": torch.ones(5, 3), "groups": GROUPS}
    return {what: needs[what] for what, names in (("values", NEED_VALUES), ("groups", NEED_GROUPS)) if name in names}


NAMES = get_args(EstimatorName)


@pytest.mark.parametrize(
    ("name", "alone"),
    [
        ("gae", lambda r, m: gae(r, torch.ones(5, 3), m, gamma=0.9, lam=0.8)),
        ("rloo", lambda r, m: rloo(r, m, GROUPS)),
        ("grpo", lambda r, m: grpo(r, m, GROUPS)),
        ("dr_grpo", lambda r, m: grpo(r, m, GROUPS, divide_by_std=False)),
        ("reinforce_pp", lambda r, m: reinforce_pp(r, m, gamma=0.9)),
        ("reinforce_pp_baseline", lambda r, m: reinforce_pp_baseline(r, m, GROUPS)),
    ],
)
def test_the_estimator_is_the_one_that_was_named_and_that_of_ppo_is_whitened(name, alone):
    assert name in NAMES
    advantages, returns = alone(GROUP_REWARDS, GROUP_MASK)
    if name == "gae":
        advantages = masked_whiten(advantages, GROUP_MASK)
    got = estimate(name, GROUP_REWARDS, GROUP_MASK, **batch_for(name), gamma=0.9, lam=0.8)
    assert_close(got, (advantages, returns))


@pytest.mark.parametrize("name", NAMES)
def test_an_estimator_that_is_not_given_what_it_needs_says_so(name):
    for what in batch_for(name):
        with pytest.raises(ValueError, match=f"{name} needs {what}"):
            estimate(name, GROUP_REWARDS, GROUP_MASK, gamma=1.0, lam=0.95)


@pytest.mark.parametrize("name", NAMES)
def test_no_estimator_carries_a_gradient_or_changes_the_dtype_of_the_rewards(name):
    rewards = torch.where(GROUP_MASK, GROUP_REWARDS, 0.0).requires_grad_()
    for tensor in estimate(name, rewards, GROUP_MASK, **batch_for(name), gamma=0.9, lam=0.8):
        assert not tensor.requires_grad
        assert tensor.dtype == torch.float32


@pytest.mark.parametrize("name", sorted(NEED_GROUPS))
def test_groups_that_do_not_allow_a_comparison_are_refused(name):
    def with_groups(groups, mask=GROUP_MASK):
        return estimate(name, GROUP_REWARDS, mask, groups=torch.tensor(groups), gamma=1.0, lam=0.95)

    with pytest.raises(ValueError, match=r"group 9 has a single response.* at least two for each prompt"):
        with_groups([7, 4, 7, 4, 9])
    with pytest.raises(ValueError, match="one id for each of 5 responses"):
        with_groups([7, 4, 7, 4])
    with pytest.raises(ValueError, match="has no tokens"):
        with_groups([7, 4, 7, 4, 7], GROUP_MASK & torch.tensor([True, True, True, True, False]).unsqueeze(1))
    with pytest.raises(ValueError, match="do not fit a mask"):
        with_groups([7, 4, 7, 4, 7], GROUP_MASK[:, :1])


def test_a_row_without_tokens_is_no_hindrance_where_nothing_is_compared():
    mask = torch.tensor([[True, True], [False, False]])
    advantages, returns = reinforce_pp(torch.tensor([[1.0, 3.0], [NAN, NAN]]), mask, gamma=1.0)
    assert_close(returns, torch.tensor([[4.0, 3.0], [0.0, 0.0]]))
    assert_close(advantages, torch.tensor([[1.0, -1.0], [0.0, 0.0]]))
