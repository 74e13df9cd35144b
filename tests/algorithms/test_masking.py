import pytest
import torch
from torch.testing import assert_close

from rlhf_ray.algorithms.masking import masked_mean, masked_moments, masked_whiten

NAN, INF = float("nan"), float("inf")


def test_masked_mean_counts_only_unmasked_entries_whatever_the_others_hold():
    x = torch.tensor([[1.0, 2.0, NAN], [6.0, INF, -INF]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert masked_mean(x, mask).item() == 3.0


def test_masked_mean_with_a_count_divides_by_it():
    x = torch.tensor([1.0, 2.0, 9.0])
    mask = torch.tensor([True, True, False])
    assert masked_mean(x, mask, count=12).item() == 0.25
    assert masked_mean(x, mask, count=torch.tensor(6)).item() == 0.5


def test_a_micro_batch_without_tokens_adds_nothing_to_a_global_mean():
    assert masked_mean(torch.tensor([5.0]), torch.tensor([False]), count=10).item() == 0.0


def test_micro_batches_with_a_global_count_add_up_to_the_global_token_mean():
    long, short = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([9.0])
    count = 4
    parts = [masked_mean(x, torch.ones_like(x, dtype=torch.bool), count=count) for x in (long, short)]
    assert sum(parts).item() == 3.0  # a mean of the two means would be 5


def test_masked_entries_get_no_gradient_even_where_they_are_infinite():
    x = torch.tensor([1.0, INF, NAN, 3.0], requires_grad=True)
    mask = torch.tensor([True, False, False, True])
    masked_mean(x, mask).backward()
    assert x.grad.tolist() == [0.5, 0.0, 0.0, 0.5]

    x.grad = None
    (masked_whiten(x, mask) * torch.tensor([1.0, 1.0, 1.0, 2.0])).sum().backward()
    assert x.grad[1:3].tolist() == [0.0, 0.0]
    assert x.grad.isfinite().all()


def test_masked_moments_are_those_of_the_population():
    x = torch.tensor([1.0, 3.0, 100.0, 5.0])
    mean, var = masked_moments(x, torch.tensor([True, True, False, True]))
    assert mean.item() == 3.0
    assert var.item() == pytest.approx(8 / 3)


def test_whitening_ignores_masked_entries_and_sets_them_to_zero():
    x = torch.tensor([[1.0, 3.0], [NAN, 5.0]])
    mask = torch.tensor([[True, True], [False, True]])
    assert_close(masked_whiten(x, mask), torch.tensor([[-1.2247449, 0.0], [0.0, 1.2247449]]))


def test_whitening_values_that_are_all_the_same_gives_zeros_not_nan():
    x = torch.tensor([2.5, 2.5, 2.5])
    assert masked_whiten(x, torch.tensor([True, True, False])).tolist() == [0.0, 0.0, 0.0]


def test_the_gradient_of_whitening_is_that_of_finite_differences():
    x = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, True, False, True])
    assert torch.autograd.gradcheck(lambda x: masked_whiten(x, mask), (x,))


@pytest.mark.parametrize("function", [masked_mean, masked_moments, masked_whiten])
def test_a_mask_of_another_shape_is_refused_instead_of_broadcast(function):
    with pytest.raises(ValueError, match=r"shape \(2, 3\) do not fit a mask of shape \(2, 1\)"):
        function(torch.zeros(2, 3), torch.ones(2, 1, dtype=torch.bool))
