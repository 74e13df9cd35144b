import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_ray.algorithms.advantages import gae
from rlhf_ray.algorithms.losses import entropy_from_logits, explained_variance, policy_loss, value_loss
from rlhf_ray.algorithms.masking import masked_whiten
from rlhf_ray.algorithms.offpolicy import importance_weights
from rlhf_ray.algorithms.rewards import token_rewards

INF, NAN = float("inf"), float("nan")


def one(value):
    """A batch of one token."""
    return torch.tensor([[float(value)]])


ONE = torch.tensor([[True]])


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.5, 1.0, -1.2, 0.0),  # better than allowed: held at 1 + clip, nothing more to gain
        (1.5, -1.0, 1.5, 1.5),  # a bad token made likelier: never held
        (0.5, 1.0, -0.5, -0.5),  # a good token made less likely: never held
        (0.5, -1.0, 0.8, 0.0),  # a bad token suppressed enough: held at 1 - clip
        (1.1, 1.0, -1.1, -1.1),  # inside the range
        (0.9, -1.0, 0.9, 0.9),
    ],
)
def test_the_surrogate_is_clipped_on_the_side_where_there_is_nothing_more_to_gain(ratio, advantage, loss, slope):
    logprobs = one(-2.0 + math.log(ratio)).requires_grad_()
    got, _ = policy_loss(logprobs, one(-2.0), one(advantage), ONE, clip=0.2)
    got.backward()
    assert got.item() == pytest.approx(loss)
    assert logprobs.grad.item() == pytest.approx(slope)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.25, 1.0, -1.25, -1.25),  # a good token may now gain up to 1.3
        (1.5, 1.0, -1.3, 0.0),
        (0.75, -1.0, 0.8, 0.0),  # the lower side stays where it was
        (0.85, -1.0, 0.85, 0.85),
        (1.5, -1.0, 1.5, 1.5),
    ],
)
def test_a_higher_upper_clip_lets_a_good_token_gain_more_and_leaves_the_lower_side(ratio, advantage, loss, slope):
    logprobs = one(-2.0 + math.log(ratio)).requires_grad_()
    got, _ = policy_loss(logprobs, one(-2.0), one(advantage), ONE, clip=0.2, clip_high=0.3)
    got.backward()
    assert got.item() == pytest.approx(loss)
    assert logprobs.grad.item() == pytest.approx(slope)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (5.0, -1.0, 3.0, 0.0),  # a bad token made five times likelier: punished as if it were three
        (2.5, -1.0, 2.5, 2.5),  # within the bound
        (0.5, -1.0, 0.8, 0.0),  # the ordinary clip
        (5.0, 1.0, -1.2, 0.0),  # good tokens know no second clip
        (5.0, 0.0, 0.0, 0.0),
    ],
)
def test_the_dual_clip_bounds_the_loss_of_a_bad_token_that_became_likelier(ratio, advantage, loss, slope):
    logprobs = one(-2.0 + math.log(ratio)).requires_grad_()
    got, stats = policy_loss(logprobs, one(-2.0), one(advantage), ONE, clip=0.2, dual_clip=3.0)
    got.backward()
    assert got.item() == pytest.approx(loss)
    assert logprobs.grad.item() == pytest.approx(slope)
    assert stats.dual_clipfrac.item() == (ratio == 5.0 and advantage < 0)


def test_the_importance_weight_goes_on_top_of_the_dual_clip():
    logprobs = one(-2.0 + math.log(5.0))
    loss, _ = policy_loss(logprobs, one(-2.0), one(-1.0), ONE, clip=0.2, dual_clip=3.0, weights=one(0.5))
    assert loss.item() == pytest.approx(1.5)


def test_the_dual_clip_holds_a_ratio_out_of_all_bounds():
    loss, _ = policy_loss(one(1000.0), one(0.0), one(-1.0), ONE, clip=0.2, dual_clip=3.0)
    assert loss.item() == 3.0  # without it e^20


@pytest.mark.parametrize("bound", [1.0, 0.5])
def test_a_dual_clip_that_would_hold_an_unchanged_policy_is_refused(bound):
    with pytest.raises(ValueError, match="choose a bound above 1"):
        policy_loss(one(-1.0), one(-1.0), one(-1.0), ONE, clip=0.2, dual_clip=bound)


def test_policy_stats_follow_both_clips():
    old = torch.full((1, 5), -1.0)
    logprobs = old + torch.tensor([[math.log(1.25), math.log(1.5), math.log(0.75), math.log(5.0), NAN]])
    mask = torch.tensor([[True, True, True, True, False]])
    _, stats = policy_loss(logprobs, old, -torch.ones(1, 5), mask, clip=0.2, clip_high=0.3, dual_clip=3.0)
    assert stats.clipfrac.item() == 0.75  # 1.25 is inside 0.8 to 1.3
    assert stats.dual_clipfrac.item() == 0.25
    _, stats = policy_loss(logprobs, old, -torch.ones(1, 5), mask, clip=0.2)
    assert stats.clipfrac.item() == 1.0
    assert stats.dual_clipfrac.item() == 0.0


def test_policy_stats_of_a_hand_made_row():
    old = torch.full((1, 4), -1.0)
    logprobs = old + torch.tensor([[math.log(1.5), 0.0, math.log(0.9), NAN]])
    mask = torch.tensor([[True, True, True, False]])
    _, stats = policy_loss(logprobs, old, torch.ones(1, 4), mask, clip=0.2)
    assert stats.clipfrac.item() == pytest.approx(1 / 3)
    # mean of ratio - 1 - ln(ratio): 0.5 - 0.405465, 0, -0.1 + 0.105361
    assert stats.approx_kl.item() == pytest.approx((0.09453489 + 0.00536052) / 3, rel=1e-5)


def test_before_any_update_the_loss_is_minus_the_mean_advantage_and_nothing_is_clipped():
    logprobs = torch.tensor([[-1.0, -2.0], [-0.5, -9.0]])
    mask = torch.tensor([[True, True], [True, False]])
    loss, stats = policy_loss(logprobs, logprobs, torch.tensor([[1.0, 2.0], [6.0, 50.0]]), mask, clip=0.2)
    assert loss.item() == -3.0
    assert stats.approx_kl.item() == 0.0
    assert stats.clipfrac.item() == 0.0


def test_the_decoupled_loss_weighs_the_clipped_surrogate():
    logprobs = one(-2.0 + math.log(1.5))
    loss, stats = policy_loss(logprobs, one(-2.0), one(1.0), ONE, clip=0.2, weights=one(0.5))
    assert loss.item() == pytest.approx(-0.6)
    assert stats.clipfrac.item() == 1.0  # the weight is outside the clip


def test_the_decoupled_loss_clips_around_the_proximal_policy_and_not_around_the_sampler():
    # The policy moved by a factor of 1.5 since the sample was drawn, but not at all in this update.
    rollout, old = one(-2.0), one(-2.0 + math.log(1.5))
    weights, _ = importance_weights(old, rollout, ONE, cap=2.0)
    logprobs = old.clone().requires_grad_()
    loss, _ = policy_loss(logprobs, old, one(1.0), ONE, clip=0.2, weights=weights)
    loss.backward()
    assert loss.item() == pytest.approx(-1.5)
    assert logprobs.grad.item() == pytest.approx(-1.5)

    plain = old.clone().requires_grad_()
    policy_loss(plain, rollout, one(1.0), ONE, clip=0.2)[0].backward()
    assert plain.grad.item() == 0.0  # clipped around the sampler, the stale sample would teach nothing


def test_only_the_current_policy_gets_a_gradient():
    inputs = [torch.full((1, 2), x, requires_grad=True) for x in (-1.0, -1.1, 0.5, 0.9)]
    logprobs, old, advantages, weights = inputs
    policy_loss(logprobs, old, advantages, torch.ones(1, 2).bool(), clip=0.2, weights=weights)[0].backward()
    assert logprobs.grad.abs().sum() > 0
    assert [x.grad for x in inputs[1:]] == [None, None, None]

    values, old_values, returns = (torch.full((1, 2), x, requires_grad=True) for x in (0.1, 0.0, 1.0))
    value_loss(values, old_values, returns, torch.ones(1, 2).bool(), clip=0.2).backward()
    assert values.grad.abs().sum() > 0
    assert old_values.grad is returns.grad is None


@pytest.mark.parametrize("log_ratio", [1000.0, -1000.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_ratio_out_of_all_bounds_leaves_loss_and_gradient_finite_and_shows_in_approx_kl(log_ratio, advantage):
    logprobs = one(log_ratio).requires_grad_()
    loss, stats = policy_loss(logprobs, one(0.0), one(advantage), ONE, clip=0.2)
    loss.backward()
    assert loss.isfinite()
    assert abs(loss.item()) <= math.exp(20) * 1.001
    assert logprobs.grad.item() == 0.0
    assert stats.approx_kl.item() >= 999.0


def test_a_nan_log_probability_of_a_real_token_reaches_the_loss_so_that_the_step_is_skipped():
    loss, _ = policy_loss(one(NAN), one(-1.0), one(1.0), ONE, clip=0.2)
    assert loss.isnan()


def test_garbage_in_masked_tokens_touches_neither_losses_nor_gradients():
    mask = torch.tensor([[True, False, False, False, False]])
    old, garbage = torch.tensor([[-1.0, NAN, INF, -INF, -1.0]]), torch.tensor([[1.0, NAN, INF, -INF, NAN]])
    logprobs, values = old.clone().requires_grad_(), old.clone().requires_grad_()
    policy, stats = policy_loss(logprobs, old, -garbage, mask, clip=0.2, clip_high=0.3, dual_clip=3.0, weights=garbage)
    value = value_loss(values, old, garbage, mask, clip=0.2)
    (policy + value).backward()
    assert policy.item() == 1.0
    assert stats.approx_kl.item() == 0.0
    assert value.item() == 2.0
    assert logprobs.grad.tolist() == [[1.0, 0.0, 0.0, 0.0, 0.0]]
    assert values.grad.tolist() == [[-2.0, 0.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("value", "target", "loss", "slope"),
    [
        (0.1, 1.0, 0.405, -0.9),  # inside the clip: 0.5 · 0.9²
        (1.0, 2.0, 1.62, 0.0),  # moved towards the return by more than 0.2: 0.5 · (0.2 - 2)²
        (-1.0, -2.0, 1.62, 0.0),
        (1.0, 0.0, 0.5, 1.0),  # moved away from the return: never held
        (-1.0, 0.0, 0.5, -1.0),
    ],
)
def test_the_value_gains_nothing_by_moving_further_than_the_clip(value, target, loss, slope):
    values = one(value).requires_grad_()
    got = value_loss(values, one(0.0), one(target), ONE, clip=0.2)
    got.backward()
    assert got.item() == pytest.approx(loss)
    assert values.grad.item() == pytest.approx(slope)


@pytest.fixture
def batch():
    """Rows of very different lengths: logprobs, old, advantages, weights, values, old values, returns; and a mask."""
    generator = torch.Generator().manual_seed(11)
    lengths = torch.tensor([7, 1, 4, 2, 6])
    mask = torch.arange(7) < lengths[:, None]
    mask[0, 3] = False
    tensors = torch.randn(7, 5, 7, generator=generator, dtype=torch.float64)
    tensors[1] = tensors[0] + 0.3 * tensors[1]  # ratios near 1, some outside the clip
    tensors[3] = tensors[3].abs()
    return list(tensors), mask


def both_losses(tensors, mask, count=None):
    logprobs, old, advantages, weights, values, old_values, returns = tensors
    policy, stats = policy_loss(logprobs, old, advantages, mask, clip=0.2, weights=weights, count=count)
    both, both_stats = policy_loss(
        logprobs, old, advantages, mask, clip=0.2, clip_high=0.3, dual_clip=1.1, weights=weights, count=count
    )
    value = value_loss(values, old_values, returns, mask, clip=0.2, count=count)
    shares = [stats.clipfrac, both_stats.clipfrac, both_stats.dual_clipfrac]
    return torch.stack([policy, both, value, stats.approx_kl, *shares])


def test_micro_batches_add_up_to_the_loss_of_the_whole_batch_and_so_do_their_gradients(batch):
    tensors, mask = batch
    whole_leaves = [tensors[i].clone().requires_grad_() for i in (0, 4)]
    part_leaves = [tensors[i].clone().requires_grad_() for i in (0, 4)]

    def with_leaves(leaves, rows, width):
        chosen = [*tensors]
        chosen[0], chosen[4] = leaves
        return [tensor[rows, :width] for tensor in chosen], mask[rows, :width]

    whole = both_losses(*with_leaves(whole_leaves, slice(None), 7))
    whole[:3].sum().backward()
    parts, means = torch.zeros(7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
    for rows, width in (([0, 4], 7), ([2, 3], 4), ([1], 1)):  # each trimmed to its longest
        part = both_losses(*with_leaves(part_leaves, rows, width), count=mask.sum())
        part[:3].sum().backward()
        parts += part.detach()
        means += both_losses(*with_leaves(tensors[0:5:4], rows, width)) / 3

    assert_close(parts, whole.detach())
    for whole_leaf, part_leaf in zip(whole_leaves, part_leaves, strict=True):
        assert_close(part_leaf.grad, whole_leaf.grad)
    assert (means - whole.detach()).abs().min() > 1e-3  # the mean of micro-batch means is another number


def test_the_order_of_rows_does_not_matter(batch):
    tensors, mask = batch
    order = [3, 0, 4, 2, 1]
    assert_close(both_losses([tensor[order] for tensor in tensors], mask[order]), both_losses(tensors, mask))


def test_padding_changes_nothing_from_rewards_to_losses(batch):
    (logprobs, old, ref, _, values, old_values, _), mask = batch
    scores, truncated = torch.arange(5.0, dtype=torch.float64), torch.tensor([True, False, True, False, False])

    def update(pad):
        def wide(tensor, fill=NAN):
            return torch.nn.functional.pad(tensor, (0, pad), value=fill)

        wide_mask = wide(mask, False)
        rewards = token_rewards(
            scores, wide(old), wide(ref), wide_mask, kl_coef=0.1, truncated=truncated, missing_eos_penalty=1.0
        )
        advantages, returns = gae(rewards, wide(old_values), wide_mask, gamma=0.99, lam=0.95)
        white = masked_whiten(advantages, wide_mask)
        weights, share = importance_weights(wide(old), wide(ref), wide_mask, cap=2.0)
        tensors = [wide(logprobs), wide(old), white, weights, wide(values), wide(old_values), returns]
        entries = torch.stack([rewards, advantages, returns, white])
        assert (entries[..., 7:] == 0).all()
        explained = explained_variance(wide(old_values), returns, wide_mask)
        return both_losses(tensors, wide_mask), entries[..., :7], weights[:, :7], share, explained

    assert_close(update(pad=3), update(pad=0))


def test_gradients_of_the_losses_are_those_of_finite_differences(batch):
    tensors, mask = batch
    logprobs, values = tensors[0].clone().requires_grad_(), tensors[4].clone().requires_grad_()

    def losses(logprobs, values):
        chosen = [*tensors]
        chosen[0], chosen[4] = logprobs, values
        return both_losses(chosen, mask)[:3]

    assert torch.autograd.gradcheck(losses, (logprobs, values))


def test_entropy_of_known_distributions():
    logits = torch.tensor([[0.0, 0.0], [0.0, math.log(3.0)], [0.0, 200.0]])
    assert_close(entropy_from_logits(logits), torch.tensor([math.log(2.0), 0.56233514, 0.0]))


def test_entropy_does_not_depend_on_a_shift_of_the_logits():
    logits = torch.tensor([0.0, math.log(3.0)])
    assert entropy_from_logits(logits + 1000).item() == pytest.approx(0.56233514, abs=1e-4)


def test_entropy_of_sixteen_bit_logits_is_worked_out_in_float32():
    entropy = entropy_from_logits(torch.zeros(50_000, dtype=torch.bfloat16))
    assert entropy.dtype == torch.float32
    assert entropy.item() == pytest.approx(math.log(50_000), rel=1e-5)


def test_the_gradient_of_the_entropy_is_that_of_finite_differences():
    logits = torch.tensor([[0.3, -1.0, 2.0], [0.0, 0.1, -0.2]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(entropy_from_logits, (logits,))


@pytest.mark.parametrize(
    ("values", "explained"),
    [
        ([1.0, 2.0, 3.0], 1.0),
        ([2.0, 3.0, 4.0], 1.0),  # a constant offset is not variance
        ([5.0, 5.0, 5.0], 0.0),
        ([0.0, 0.0, 6.0], -6.0),  # residuals 1, 2, -3: variance 14/3 against 2/3
    ],
)
def test_explained_variance_of_three_tokens(values, explained):
    mask = torch.tensor([[True, True, True, False]])
    returns = torch.tensor([[1.0, 2.0, 3.0, NAN]])
    assert explained_variance(torch.tensor([[*values, INF]]), returns, mask) == pytest.approx(explained)


def test_explained_variance_of_returns_that_do_not_vary_is_zero_and_not_nan():
    returns = torch.full((1, 7), 0.1)
    assert explained_variance(torch.arange(7.0)[None], returns, torch.ones(1, 7).bool()) == 0.0


def test_shapes_that_differ_are_refused():
    mask = torch.ones(2, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="do not fit a mask"):
        policy_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3), mask, clip=0.2)
    with pytest.raises(ValueError, match="do not fit a mask"):
        value_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3), mask, clip=0.2)


@pytest.mark.parametrize("narrow", range(4))
def test_a_column_that_would_be_read_once_for_each_token_is_refused(narrow):
    tensors = [torch.zeros(2, 3) for _ in range(4)]
    tensors[narrow] = torch.zeros(2, 1)
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"shape \(2, 1\) do not fit a mask of shape \(2, 3\)"):
        policy_loss(*tensors[:3], mask, clip=0.2, weights=tensors[3])
    if narrow < 3:
        with pytest.raises(ValueError, match=r"shape \(2, 1\) do not fit a mask of shape \(2, 3\)"):
            value_loss(*tensors[:3], mask, clip=0.2)
