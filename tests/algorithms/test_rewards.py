import pytest
import torch
from torch.testing import assert_close

from rlhf_ray.algorithms.rewards import token_rewards

NAN = float("nan")
LOGPROBS = torch.tensor([[-1.0, -2.0, -0.5], [-1.0, NAN, NAN]])
REF_LOGPROBS = torch.tensor([[-1.5, -1.0, -0.5], [-0.8, NAN, NAN]])
MASK = torch.tensor([[True, True, True], [True, False, False]])
SCORES = torch.tensor([0.7, -3.0])


def test_every_token_pays_for_its_kl_and_the_last_one_gets_the_score():
    rewards = token_rewards(SCORES, LOGPROBS, REF_LOGPROBS, MASK, kl_coef=0.1, truncated=None)
    assert_close(rewards, torch.tensor([[-0.05, 0.1, 0.7], [0.02 - 3.0, 0.0, 0.0]]))


def test_the_score_lands_on_the_last_generated_token_also_when_tokens_before_it_are_masked():
    mask = torch.tensor([[True, False, True, False]])
    zeros = torch.zeros(1, 4)
    rewards = token_rewards(torch.tensor([2.0]), zeros, zeros, mask, kl_coef=0.1, truncated=None)
    assert rewards.tolist() == [[0.0, 0.0, 2.0, 0.0]]


def test_a_response_without_eos_pays_the_penalty_and_the_others_do_not():
    truncated = torch.tensor([False, True])
    rewards = token_rewards(SCORES, LOGPROBS, LOGPROBS, MASK, kl_coef=0.1, truncated=truncated, missing_eos_penalty=1.5)
    assert_close(rewards, torch.tensor([[0.0, 0.0, 0.7], [-4.5, 0.0, 0.0]]))


def test_scores_are_clipped_on_both_sides():
    rewards = token_rewards(
        torch.tensor([4.0, -3.0]), LOGPROBS, LOGPROBS, MASK, kl_coef=0.1, truncated=None, score_clip=2.0
    )
    assert_close(rewards, torch.tensor([[0.0, 0.0, 2.0], [-2.0, 0.0, 0.0]]))


def test_the_clip_does_not_swallow_the_penalty():
    truncated = torch.tensor([True, True])
    rewards = token_rewards(
        SCORES, LOGPROBS, LOGPROBS, MASK, kl_coef=0, truncated=truncated, missing_eos_penalty=1.0, score_clip=2.0
    )
    assert_close(rewards, torch.tensor([[0.0, 0.0, -0.3], [-3.0, 0.0, 0.0]]))


def test_rewards_carry_no_gradient_and_leave_their_inputs_alone():
    scores, logprobs = SCORES.clone(), LOGPROBS.clone().requires_grad_()
    rewards = token_rewards(
        scores, logprobs, REF_LOGPROBS, MASK, kl_coef=0.1, truncated=torch.tensor([True, True]), missing_eos_penalty=1.0
    )
    assert not rewards.requires_grad
    assert scores.tolist() == SCORES.tolist()


def test_a_row_without_tokens_is_refused_since_its_score_has_nowhere_to_land():
    mask = torch.tensor([[True, True, True], [False, False, False]])
    with pytest.raises(ValueError, match="no tokens"):
        token_rewards(SCORES, LOGPROBS, REF_LOGPROBS, mask, kl_coef=0.1, truncated=None)


def test_log_probabilities_that_would_be_broadcast_are_refused():
    with pytest.raises(ValueError, match="do not fit a mask"):
        token_rewards(SCORES, LOGPROBS, REF_LOGPROBS[:1], MASK, kl_coef=0.1, truncated=None)
