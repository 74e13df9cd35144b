from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.data.batching import collate, micro_batches, micro_batches_of_ranks, select
from rlhf_ray.types import Experience, Prompt, Rollout

PAD = 99


def experience(prompt_id, prompt, response, *, versions=None, finish_reason="stop", score=0.0):
    """Log-probabilities tell the tokens apart: -0.5 · token for the sampler, -0.25 · token for the reference."""
    rollout = Rollout(
        prompt=Prompt(prompt_id=prompt_id, text="", token_ids=tuple(prompt), seed=0),
        response_ids=tuple(response),
        rollout_logprobs=tuple(-0.5 * token for token in response),
        policy_versions=tuple(versions or [3] * len(response)),
        finish_reason=finish_reason,
        text="",
    )
    ref_logprobs = np.array([-0.25 * token for token in response], dtype=np.float32)
    ref_logprobs.flags.writeable = False  # as Ray's object store hands it out
    return Experience(rollout=rollout, score=score, ref_logprobs=ref_logprobs)


@pytest.fixture
def experiences():
    return [
        experience(7, [1, 2, 3], [4, 5], versions=[2, 3], score=0.5),
        experience(8, [1], [6, 7, 8], finish_reason="length", score=-1.5),
        experience(9, [5, 6], [9]),
    ]


def test_collate_pads_on_the_right_and_marks_what_is_real(experiences):
    batch = collate(experiences, version=3, pad_id=PAD)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5], [1, 6, 7, 8, PAD], [5, 6, 9, PAD, PAD]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]
    assert batch.prompt_len.tolist() == [3, 1, 2]
    assert batch.response_ids.tolist() == [[4, 5, 0], [6, 7, 8], [9, 0, 0]]
    assert batch.response_mask.tolist() == [[True, True, False], [True, True, True], [True, False, False]]
    assert batch.rollout_logprobs.tolist() == [[-2.0, -2.5, 0.0], [-3.0, -3.5, -4.0], [-4.5, 0.0, 0.0]]
    assert batch.ref_logprobs.tolist() == [[-1.0, -1.25, 0.0], [-1.5, -1.75, -2.0], [-2.25, 0.0, 0.0]]
    assert batch.scores.tolist() == [0.5, -1.5, 0.0]
    assert batch.truncated.tolist() == [False, True, False]
    assert batch.prompt_ids == (7, 8, 9)


def test_collate_counts_staleness_from_the_oldest_token(experiences):
    assert collate(experiences, version=5, pad_id=PAD).staleness.tolist() == [3, 2, 2]


def test_collate_gives_the_types_that_the_batch_promises(experiences):
    batch = collate(experiences, version=3, pad_id=PAD)
    for name in ("input_ids", "attention_mask", "prompt_len", "response_ids", "staleness"):
        assert getattr(batch, name).dtype == torch.int64, name
    for name in ("rollout_logprobs", "ref_logprobs", "scores"):
        assert getattr(batch, name).dtype == torch.float32, name
    assert batch.response_mask.dtype == batch.truncated.dtype == torch.bool


def test_a_response_token_is_predicted_one_position_before_its_own(experiences):
    batch = collate(experiences, version=3, pad_id=PAD)
    for row in range(3):
        for t in range(int(batch.response_mask[row].sum())):
            predicted_at = int(batch.prompt_len[row]) + t - 1
            assert batch.input_ids[row, predicted_at + 1] == batch.response_ids[row, t]


def with_rollout(experience, **changes):
    return replace(experience, rollout=replace(experience.rollout, **changes))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda e: with_rollout(e, response_ids=()), "prompt 8 has an empty response"),
        (lambda e: with_rollout(e, prompt=replace(e.rollout.prompt, token_ids=())), "prompt 8 has no prompt tokens"),
        (lambda e: with_rollout(e, rollout_logprobs=(-1.0,)), "prompt 8 differ in length: .*rollout_logprobs 1"),
        (lambda e: with_rollout(e, policy_versions=(3, 3)), "prompt 8 differ in length: .*policy_versions 2"),
        (lambda e: replace(e, ref_logprobs=np.zeros(4, np.float32)), "prompt 8 differ in length: .*ref_logprobs 4"),
        (lambda e: replace(e, ref_logprobs=np.zeros((3, 1), np.float32)), r"prompt 8 have shape \(3, 1\)"),
        (lambda e: with_rollout(e, policy_versions=(3, 4, 4)), "sampled by version 4, .* only at version 3"),
    ],
)
def test_collate_refuses_an_experience_that_cannot_be_right_and_names_its_prompt(experiences, break_it, message):
    experiences[1] = break_it(experiences[1])
    with pytest.raises(ValueError, match=message):
        collate(experiences, version=3, pad_id=PAD)


def test_collate_refuses_nothing():
    with pytest.raises(ValueError, match="at least one experience"):
        collate([], version=0, pad_id=PAD)


def test_select_takes_rows_in_order_and_trims_them_to_the_longest(experiences):
    batch = select(collate(experiences, version=3, pad_id=PAD), [2, 1])
    assert batch.input_ids.tolist() == [[5, 6, 9, PAD], [1, 6, 7, 8]]
    assert batch.response_ids.tolist() == [[9, 0, 0], [6, 7, 8]]
    assert batch.prompt_ids == (9, 8)


def assert_same(batch, other):
    for field in fields(batch):
        left, right = getattr(batch, field.name), getattr(other, field.name)
        if field.name == "prompt_ids":
            assert left == right
        else:
            assert torch.equal(left, right), field.name


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=6),
    data=st.data(),
)
def test_selecting_rows_equals_collating_only_those(lengths, data):
    everyone = [
        experience(i, range(1, 1 + prompt), range(10 * i + 1, 10 * i + 1 + response), score=float(i))
        for i, (prompt, response) in enumerate(lengths)
    ]
    chosen = data.draw(st.lists(st.integers(0, len(everyone) - 1), min_size=1, unique=True))
    selected = select(collate(everyone, version=4, pad_id=PAD), chosen)
    assert_same(selected, collate([everyone[i] for i in chosen], version=4, pad_id=PAD))


def test_select_keeps_a_masked_hole_in_the_middle_of_a_response(experiences):
    batch = collate(experiences, version=3, pad_id=PAD)
    batch.response_mask[1, 1] = False
    assert select(batch, [1]).response_mask.tolist() == [[True, False, True]]


def test_select_refuses_no_rows(experiences):
    with pytest.raises(ValueError, match="at least one row"):
        select(collate(experiences, version=3, pad_id=PAD), [])


def test_micro_batches_put_like_lengths_together_longest_first():
    assert micro_batches([2, 9, 3, 8, 2, 3], max_tokens=18) == [[1, 3], [2, 5, 0, 4]]


def test_a_sequence_longer_than_the_budget_stands_alone():
    assert micro_batches([30, 4, 31, 4], max_tokens=8) == [[2], [0], [1, 3]]


def test_no_sequences_make_no_micro_batches():
    assert micro_batches([], max_tokens=8) == []


@pytest.mark.parametrize(("lengths", "max_tokens"), [([3, 0], 8), ([3, -1], 8), ([3], 0)])
def test_micro_batches_refuse_lengths_and_budgets_below_one(lengths, max_tokens):
    with pytest.raises(ValueError, match="tokens"):
        micro_batches(lengths, max_tokens=max_tokens)


@given(lengths=st.lists(st.integers(1, 60), max_size=40), max_tokens=st.integers(1, 200))
def test_micro_batches_hold_every_index_once_within_the_budget_and_as_full_as_the_order_allows(lengths, max_tokens):
    groups = micro_batches(lengths, max_tokens=max_tokens)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= max_tokens
    flat = [lengths[index] for group in groups for index in group]
    assert flat == sorted(lengths, reverse=True)
    for group, following in pairwise(groups):
        assert (len(group) + 1) * lengths[group[0]] > max_tokens, f"{following[0]} would have fitted"


def test_one_rank_has_the_micro_batches_of_all():
    lengths = [2, 9, 3, 8, 2, 3]
    assert micro_batches_of_ranks(lengths, max_tokens=18, ranks=1) == [micro_batches(lengths, max_tokens=18)]


def test_ranks_that_could_do_with_fewer_micro_batches_cut_theirs():
    # Rank 0 has the rows of 9, 2 and 2 tokens, rank 1 those of 8, 8 and 2.
    assert micro_batches_of_ranks([9, 8, 8, 2, 2, 2], max_tokens=9, ranks=2) == [[[0], [3], [4]], [[1], [2], [5]]]


def test_rows_that_do_not_divide_by_the_ranks_are_refused():
    with pytest.raises(ValueError, match="5 sequences cannot be shared evenly by 2 ranks"):
        micro_batches_of_ranks([1] * 5, max_tokens=8, ranks=2)


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12), max_tokens=st.integers(1, 200), data=st.data())
def test_ranks_share_every_index_once_in_equally_many_micro_batches_within_the_budget(lengths, max_tokens, data):
    ranks = data.draw(st.sampled_from([n for n in range(1, 5) if len(lengths) % n == 0]))
    of_ranks = micro_batches_of_ranks(lengths, max_tokens=max_tokens, ranks=ranks)
    assert len(of_ranks) == ranks
    assert len({len(groups) for groups in of_ranks}) == 1
    rows = [[index for group in groups for index in group] for groups in of_ranks]
    assert {len(of_rank) for of_rank in rows} == {len(lengths) // ranks}
    assert sorted(index for of_rank in rows for index in of_rank) == list(range(len(lengths)))
    for group in (group for groups in of_ranks for group in groups):
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= max_tokens
