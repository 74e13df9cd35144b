import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_ray.algorithms.kl import AdaptiveKL, FixedKL, k1, k2, k3, kl_controller
from rlhf_ray.errors import ConfigError

LOGPROBS = torch.tensor([-1.0, -2.0, -0.5])
REF_LOGPROBS = torch.tensor([-1.5, -1.0, -0.5])


def test_k1_k2_k3_of_three_tokens():
    assert_close(k1(LOGPROBS, REF_LOGPROBS), torch.tensor([0.5, -1.0, 0.0]))
    assert_close(k2(LOGPROBS, REF_LOGPROBS), torch.tensor([0.125, 0.5, 0.0]))
    assert_close(k3(LOGPROBS, REF_LOGPROBS), torch.tensor([0.10653066, 0.71828183, 0.0]))


@pytest.fixture
def distributions():
    """A policy's and a reference's log-probabilities over four tokens, and the policy's logits."""
    logits = torch.tensor([0.5, -0.3, 1.1, 0.0], dtype=torch.float64, requires_grad=True)
    reference = torch.log_softmax(torch.tensor([-0.2, 0.9, 0.4, 0.1], dtype=torch.float64), 0)
    return logits, torch.log_softmax(logits, 0), reference


def test_k1_and_k3_are_unbiased_and_k3_is_never_negative(distributions):
    _, policy, reference = distributions
    kl = torch.nn.functional.kl_div(reference, policy, log_target=True, reduction="sum")
    for estimator in (k1, k3):
        assert_close((policy.exp() * estimator(policy, reference)).sum(), kl)
    assert (k3(policy, reference) >= 0).all()
    assert (k1(policy, reference) < 0).any()


def expected_gradient(estimator, distributions):
    """Of the estimator as a loss: the mean over the policy's samples, which the gradient does not go through."""
    logits, policy, reference = distributions
    loss = (policy.exp().detach() * estimator(policy, reference)).sum()
    return torch.autograd.grad(loss, logits, retain_graph=True)[0]


def test_k1_as_a_loss_has_no_gradient_in_expectation(distributions):
    assert_close(expected_gradient(k1, distributions), torch.zeros(4, dtype=torch.float64))


def test_k2_as_a_loss_has_the_gradient_of_the_kl_to_the_reference(distributions):
    gradient = expected_gradient(k2, distributions)
    logits, policy, reference = distributions
    kl = (policy.exp() * (policy - reference)).sum()
    assert_close(gradient, torch.autograd.grad(kl, logits)[0])


def test_k3_as_a_loss_has_the_gradient_of_the_kl_from_the_reference(distributions):
    gradient = expected_gradient(k3, distributions)
    logits, policy, reference = distributions
    kl = (reference.exp() * (reference - policy)).sum()
    assert_close(gradient, torch.autograd.grad(kl, logits)[0])


@pytest.mark.parametrize("estimator", [k1, k2, k3])
def test_gradients_of_the_estimators_are_those_of_finite_differences(estimator):
    logprobs = torch.tensor([-1.0, -2.0, -22.5], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.5, -0.4, -0.5], dtype=torch.float64, requires_grad=True)
    # The tangent above 20 nats has a slope of e^20, which double precision checks only relatively.
    assert torch.autograd.gradcheck(estimator, (logprobs, reference), rtol=1e-3, atol=1e-3)


def test_k3_of_a_token_that_the_policy_all_but_forgot_is_finite_and_pulls_it_back():
    logprobs = torch.tensor([-150.0], requires_grad=True)
    loss = k3(logprobs, torch.tensor([-0.1])).sum()
    loss.backward()
    assert loss.isfinite()
    assert logprobs.grad.item() == pytest.approx(1 - math.exp(20))  # downhill is a higher log-probability


def test_k3_is_continuous_where_its_tangent_takes_over():
    below, above = k3(torch.tensor([-20.0 + 1e-9, -20.0 - 1e-9], dtype=torch.float64), torch.zeros(2).double())
    assert above.item() == pytest.approx(below.item(), rel=1e-7)
    assert below.item() == pytest.approx(math.exp(20) - 21, rel=1e-7)


def test_the_fixed_coefficient_stays():
    controller = FixedKL(0.05)
    controller.update(1000.0, 32)
    assert controller.coef == 0.05


@pytest.mark.parametrize(
    ("kl", "samples", "coef"),
    [
        (6.6, 100, 0.1001),  # 10 % over the target: 1 + 0.1 · 100 / 10000
        (5.4, 100, 0.0999),
        (6.0, 100, 0.1),
        (600.0, 500, 0.101),  # the error is clipped to 0.2
        (-3.0, 500, 0.099),  # and to -0.2
    ],
)
def test_the_adaptive_coefficient_moves_in_proportion_to_a_clipped_error(kl, samples, coef):
    controller = AdaptiveKL(0.1, target=6.0, horizon=10_000)
    controller.update(kl, samples)
    assert controller.coef == pytest.approx(coef, rel=1e-12)


@pytest.mark.parametrize("kl", [float("nan"), float("inf"), float("-inf")])
def test_a_skipped_step_leaves_the_adaptive_coefficient_alone(kl):
    controller = AdaptiveKL(0.1, target=6.0, horizon=10_000)
    controller.update(kl, 32)
    assert controller.coef == 0.1


def test_a_restored_controller_goes_on_where_the_saved_one_stood():
    saved = AdaptiveKL(0.1, target=6.0, horizon=1000)
    saved.update(12.0, 100)
    restored = AdaptiveKL(0.5, target=6.0, horizon=1000)
    restored.load_state_dict(saved.state_dict())
    for controller in (saved, restored):
        controller.update(3.0, 100)
    assert restored.coef == saved.coef != 0.1

    fixed = FixedKL(0.5)
    fixed.load_state_dict(FixedKL(0.2).state_dict())
    assert fixed.coef == 0.2


def test_an_adaptive_coefficient_of_zero_is_refused_since_it_could_never_grow():
    with pytest.raises(ConfigError, match=r"ppo\.kl\.coef = 0 can never grow"):
        AdaptiveKL(0.0, target=6.0, horizon=1000)


def test_a_horizon_that_could_turn_the_coefficient_negative_is_refused_at_the_first_step():
    controller = AdaptiveKL(0.1, target=6.0, horizon=6)
    with pytest.raises(ConfigError, match=r"ppo\.kl\.horizon = 6 .* set it above 6\.4"):
        controller.update(6.0, 32)


def test_the_controller_is_the_one_that_was_named():
    fixed = kl_controller("fixed", coef=0.1, target=6.0, horizon=1000)
    adaptive = kl_controller("adaptive", coef=0.1, target=6.0, horizon=1000)
    for controller in (fixed, adaptive):
        controller.update(12.0, 100)
    assert fixed.coef == 0.1
    assert adaptive.coef == pytest.approx(0.102)
