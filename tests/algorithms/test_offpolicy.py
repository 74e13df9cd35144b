import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_ray.algorithms.offpolicy import importance_weights

INF, NAN = float("inf"), float("nan")


def test_weights_are_the_ratio_of_proximal_to_behaviour_policy_cut_at_the_cap():
    rollout = torch.full((1, 4), -3.0)
    old = rollout + torch.tensor([[math.log(0.5), math.log(4.0), math.log(2.0), 0.0]])
    weights, clipped_share = importance_weights(old, rollout, torch.ones(1, 4, dtype=torch.bool), cap=3.0)
    assert_close(weights, torch.tensor([[0.5, 3.0, 2.0, 1.0]]))
    assert clipped_share.item() == 0.25


def test_masked_tokens_weigh_one_and_do_not_count_as_clipped():
    old, rollout = torch.tensor([[0.0, 9.0, NAN]]), torch.tensor([[-5.0, 0.0, -INF]])
    weights, clipped_share = importance_weights(old, rollout, torch.tensor([[True, False, False]]), cap=2.0)
    assert weights.tolist() == [[2.0, 1.0, 1.0]]
    assert clipped_share.item() == 1.0


def test_a_ratio_too_large_for_the_floating_point_range_is_the_cap():
    weights, _ = importance_weights(torch.zeros(1, 1), torch.full((1, 1), -1e4), torch.ones(1, 1).bool(), cap=2.0)
    assert weights.item() == 2.0


def test_weights_carry_no_gradient():
    old = torch.tensor([[-1.0]], requires_grad=True)
    weights, clipped_share = importance_weights(old, torch.tensor([[-1.5]]), torch.tensor([[True]]), cap=2.0)
    assert not weights.requires_grad
    assert not clipped_share.requires_grad


def test_a_nan_of_the_sampler_is_not_hidden_by_the_cap():
    weights, _ = importance_weights(torch.zeros(1, 1), torch.full((1, 1), NAN), torch.ones(1, 1).bool(), cap=2.0)
    assert weights.isnan().all()


def test_weights_are_a_matter_of_each_token_and_a_nan_stays_in_its_place():
    old = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, NAN, -1.0]])
    rollout = torch.tensor([[-1.0 - math.log(2.0), NAN, -3.0 - math.log(9.0)], [NAN, -1.0, -1.0]])
    mask = torch.tensor([[True, False, True], [True, True, True]])
    weights, _ = importance_weights(old, rollout, mask, cap=3.0)
    assert_close(weights, torch.tensor([[2.0, 1.0, 3.0], [NAN, NAN, 1.0]]), equal_nan=True)


def test_a_long_response_weighs_its_tokens_one_by_one_and_not_by_their_product():
    # Twice as likely at each of 40 tokens: the ratio of the whole response is 2^40, and no token is at the cap.
    rollout = torch.full((1, 40), -3.0)
    weights, clipped_share = importance_weights(
        rollout + math.log(2.0), rollout, torch.ones(1, 40, dtype=torch.bool), cap=3.0
    )
    assert_close(weights, torch.full((1, 40), 2.0))
    assert clipped_share.item() == 0.0


def test_a_token_that_the_proximal_policy_would_never_say_weighs_nothing():
    weights, _ = importance_weights(torch.full((1, 1), -INF), torch.full((1, 1), -1.0), torch.ones(1, 1).bool(), cap=2)
    assert weights.item() == 0.0


@pytest.mark.parametrize("shapes", [((2, 3), (2, 3), (1, 3)), ((2, 1), (2, 3), (2, 3)), ((2, 3), (1, 3), (2, 3))])
def test_shapes_that_differ_are_refused(shapes):
    old, rollout, mask = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match="do not fit a mask"):
        importance_weights(old, rollout, mask.bool(), cap=2.0)
