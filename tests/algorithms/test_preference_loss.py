"""The Bradley–Terry loss on numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.algorithms.preference_loss import bradley_terry_loss

LOG3 = math.log(3)


def loss(
    chosen: list[float], rejected: list[float], p: list[float], w: list[float] | None = None, **options: object
) -> float:
    weight = torch.tensor(w or [1.0] * len(p), dtype=torch.float64)
    numbers = (torch.tensor(values, dtype=torch.float64) for values in (chosen, rejected, p))
    first, second, probability = numbers
    return float(bradley_terry_loss(first, second, probability=probability, weight=weight, **options))  # type: ignore[arg-type]


def test_a_certain_answer_costs_the_log_of_its_probability() -> None:
    # σ(log 3) = 3/4
    assert loss([LOG3], [0.0], [1.0]) == pytest.approx(-math.log(0.75))
    assert loss([0.0], [LOG3], [1.0]) == pytest.approx(-math.log(0.25))


def test_an_uncertain_answer_costs_its_cross_entropy() -> None:
    expected = -0.6 * math.log(0.75) - 0.4 * math.log(0.25)
    assert loss([LOG3 + 1], [1.0], [0.6]) == pytest.approx(expected)


def test_a_tie_is_cheapest_where_the_scores_are_equal() -> None:
    assert loss([2.0], [2.0], [0.5]) == pytest.approx(math.log(2))
    assert loss([2.5], [2.0], [0.5]) > math.log(2)
    assert loss([2.0], [2.5], [0.5]) == pytest.approx(loss([2.5], [2.0], [0.5]))


def test_a_margin_is_taken_off_the_difference() -> None:
    with_margin = loss([LOG3 + 2], [0.0], [1.0], margin=torch.tensor([2.0], dtype=torch.float64))
    assert with_margin == pytest.approx(-math.log(0.75))


def test_weights_scale_each_pair_and_not_the_number_of_pairs() -> None:
    first, second = -math.log(0.75), -math.log(0.25)
    assert loss([LOG3, 0.0], [0.0, LOG3], [1.0, 1.0], [0.5, 1.5]) == pytest.approx((0.5 * first + 1.5 * second) / 2)


def test_centring_costs_the_square_of_the_sum() -> None:
    assert loss([3.0], [-1.0], [0.5], center_coef=0.1) - loss([3.0], [-1.0], [0.5]) == pytest.approx(0.1 * 4)


def test_extreme_scores_stay_finite() -> None:
    assert loss([0.0], [1e4], [1.0]) == pytest.approx(1e4)


@given(p=st.floats(0.01, 0.99), margin=st.floats(-2, 2))
def test_the_gradient_vanishes_where_the_scores_say_the_probability(p: float, margin: float) -> None:
    difference = torch.tensor([margin + math.log(p / (1 - p))], dtype=torch.float64, requires_grad=True)
    bradley_terry_loss(
        difference,
        torch.zeros(1, dtype=torch.float64),
        probability=torch.tensor([p], dtype=torch.float64),
        weight=torch.ones(1, dtype=torch.float64),
        margin=torch.tensor([margin], dtype=torch.float64),
    ).backward()
    assert difference.grad is not None
    assert float(difference.grad) == pytest.approx(0.0, abs=1e-9)


def test_the_gradient_is_that_of_finite_differences() -> None:
    chosen, rejected = torch.randn(2, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    options = {
        "probability": torch.tensor([1.0, 0.5, 0.2, 0.0], dtype=torch.float64),
        "weight": torch.tensor([0.5, 1.5, 1.0, 1.0], dtype=torch.float64),
        "margin": torch.tensor([0.0, 0.3, -0.2, 1.0], dtype=torch.float64),
    }

    def differentiable(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return bradley_terry_loss(chosen, rejected, center_coef=0.1, **options)

    assert torch.autograd.gradcheck(differentiable, (chosen.requires_grad_(), rejected.requires_grad_()))
