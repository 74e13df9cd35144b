"""The ledger: nothing is lost and nothing is trained twice, whatever happens in between."""

from __future__ import annotations

import json

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from rlhf_ray.errors import RlhfRayError
from rlhf_ray.pipeline.ledger import Ledger


def scored_ledger(*ids: int) -> Ledger:
    ledger = Ledger()
    for prompt_id in ids:
        ledger.issue(prompt_id)
        ledger.scored(prompt_id)
    return ledger


def test_a_prompt_is_issued_scored_and_trained() -> None:
    ledger = scored_ledger(0, 1, 2)
    ledger.trained([2, 0])
    assert ledger.state_dict() == {"next_id": 3, "trained": [[0, 0], [2, 2]], "scored": [1], "quarantined": []}
    assert [ledger.is_trained(i) for i in range(4)] == [True, False, True, False]


def test_ids_go_out_in_order() -> None:
    ledger = scored_ledger(0)
    for wrong in (0, 2):
        with pytest.raises(RlhfRayError, match=f"prompt {wrong} cannot be issued.* 1 is next"):
            ledger.issue(wrong)
    assert ledger.next_id == 1


def test_only_what_was_issued_can_be_scored_and_only_once() -> None:
    ledger = scored_ledger(0)
    with pytest.raises(RlhfRayError, match="prompt 0 cannot be scored: it is scored"):
        ledger.scored(0)
    with pytest.raises(RlhfRayError, match="prompt 5 cannot be scored: it is not issued"):
        ledger.scored(5)


def test_a_scored_prompt_is_not_issued_again() -> None:
    with pytest.raises(RlhfRayError, match="prompt 0 cannot be issued again: it is scored"):
        scored_ledger(0).reissue(0)


def test_an_unscored_prompt_is_not_trained_and_nothing_of_its_batch_is_claimed() -> None:
    ledger = scored_ledger(0)
    ledger.issue(1)
    with pytest.raises(RlhfRayError, match="prompt 1 cannot be trained: it is issued"):
        ledger.trained([0, 1])
    assert ledger.state_dict() == {"next_id": 2, "trained": [], "scored": [0], "quarantined": []}
    assert ledger.trained_twice == 0


def test_a_second_training_is_counted_and_the_batch_refused() -> None:
    ledger = scored_ledger(0, 1, 2)
    ledger.trained([0, 1])
    with pytest.raises(RlhfRayError, match=r"prompts \[1\] were about to be trained a second time"):
        ledger.trained([1, 2])
    assert ledger.trained_twice == 1
    assert ledger.state_dict()["scored"] == [2]
    with pytest.raises(RlhfRayError, match=r"prompts \[2\]"):
        ledger.trained([2, 2])
    assert ledger.trained_twice == 2


def test_what_is_neither_trained_nor_in_flight_is_lost() -> None:
    ledger = scored_ledger(0, 1, 2, 3)
    ledger.trained([0, 2])
    assert ledger.close(in_flight=[3]) == [1]
    assert ledger.lost == 1


def test_the_state_is_compact_ranges() -> None:
    ledger = scored_ledger(*range(10))
    ledger.trained([0, 1, 2, 5, 6, 8])
    assert ledger.state_dict() == {
        "next_id": 10,
        "trained": [[0, 2], [5, 6], [8, 8]],
        "scored": [3, 4, 7, 9],
        "quarantined": [],
    }


def test_a_resumed_ledger_issues_again_what_was_in_flight_and_trains_what_was_scored() -> None:
    ledger = scored_ledger(0, 1, 2)
    ledger.issue(3)
    ledger.trained([1])
    resumed = Ledger()
    resumed.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    assert resumed.unfinished() == [3]
    assert resumed.next_id == 4
    with pytest.raises(RlhfRayError, match="prompt 0 cannot be issued again: it is scored"):
        resumed.reissue(0)
    with pytest.raises(RlhfRayError, match="second time"):
        resumed.trained([0, 1])
    resumed.trained([0, 2])
    assert resumed.unfinished() == [3]


def test_a_quarantined_prompt_is_neither_lost_nor_trained_nor_issued_again() -> None:
    ledger = scored_ledger(0, 1)
    for prompt_id in (2, 3, 4):
        ledger.issue(prompt_id)
    ledger.quarantine(2)
    ledger.quarantine(4)
    ledger.trained([0, 1])
    assert (ledger.quarantined, ledger.past_sampling(), ledger.unfinished()) == (2, 2, [3])
    assert not ledger.is_trained(2)
    assert ledger.close(in_flight=[3]) == []
    for forbidden, wanted in (
        (ledger.reissue, "issued again"),
        (ledger.scored, "scored"),
        (ledger.quarantine, "quarantined"),
        (lambda i: ledger.trained([i]), "trained"),
    ):
        with pytest.raises(RlhfRayError, match=f"prompt 2 cannot be {wanted}: it is quarantined, not"):
            forbidden(2)
    with pytest.raises(RlhfRayError, match="prompt 1 cannot be quarantined: it is trained"):
        ledger.quarantine(1)
    state = json.loads(json.dumps(ledger.state_dict()))
    assert state == {"next_id": 5, "trained": [[0, 1]], "scored": [], "quarantined": [2, 4]}
    resumed = Ledger()
    resumed.load_state_dict(state)
    assert (resumed.quarantined, resumed.past_sampling(), resumed.unfinished()) == (2, 2, [3])
    assert resumed.state_dict() == state


def test_the_ranges_of_what_is_trained_leave_the_quarantined_out() -> None:
    ledger = Ledger()
    for prompt_id in range(10):
        ledger.issue(prompt_id)
        if prompt_id in (0, 3, 4, 9):
            ledger.quarantine(prompt_id)
        else:
            ledger.scored(prompt_id)
    ledger.trained([1, 2, 5, 7])
    assert ledger.state_dict() == {
        "next_id": 10,
        "trained": [[1, 2], [5, 5], [7, 7]],
        "scored": [6, 8],
        "quarantined": [0, 3, 4, 9],
    }


def test_a_prompt_whose_responses_cannot_be_used_any_more_is_sampled_again() -> None:
    ledger = scored_ledger(0, 1)
    ledger.unscored(1)
    assert ledger.unfinished() == [1]
    ledger.reissue(1)
    ledger.scored(1)
    ledger.trained([0, 1])
    with pytest.raises(RlhfRayError, match="prompt 1 cannot be sampled again: it is trained"):
        ledger.unscored(1)


def test_a_state_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(RlhfRayError, match="trains prompts 0 to 7 of 4 issued"):
        Ledger().load_state_dict({"next_id": 4, "trained": [[0, 7]], "scored": []})
    with pytest.raises(RlhfRayError, match="prompt 1 cannot be quarantined: it is trained"):
        Ledger().load_state_dict({"next_id": 4, "trained": [[0, 1]], "scored": [], "quarantined": [1]})
    with pytest.raises(RlhfRayError, match="prompt 1 cannot be scored: it is trained"):
        Ledger().load_state_dict({"next_id": 4, "trained": [[0, 1]], "scored": [1, 2]})


class AnyHistory(RuleBasedStateMachine):
    """Issue, score, train, quarantine and resume in any order, beside a model made of plain sets."""

    issued = Bundle("issued")
    scored = Bundle("scored")

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.trained: set[int] = set()
        self.untrained: set[int] = set()
        self.waiting: set[int] = set()
        self.left_out: set[int] = set()

    @rule(target=issued)
    def issue(self) -> int:
        prompt_id = self.ledger.next_id
        self.ledger.issue(prompt_id)
        self.untrained.add(prompt_id)
        return prompt_id

    @rule(target=scored, prompt_id=consumes(issued))
    def score(self, prompt_id: int) -> int:
        self.ledger.reissue(prompt_id)
        self.ledger.scored(prompt_id)
        self.waiting.add(prompt_id)
        return prompt_id

    @rule(target=issued, prompt_id=consumes(scored))
    def sample_again(self, prompt_id: int) -> int:
        self.ledger.unscored(prompt_id)
        self.waiting.discard(prompt_id)
        return prompt_id

    @rule(prompt_id=consumes(issued))
    def quarantine(self, prompt_id: int) -> None:
        self.ledger.quarantine(prompt_id)
        self.untrained.discard(prompt_id)
        self.left_out.add(prompt_id)

    @rule(prompt_id=consumes(scored))
    def train(self, prompt_id: int) -> None:
        self.ledger.trained([prompt_id])
        self.untrained.discard(prompt_id)
        self.waiting.discard(prompt_id)
        self.trained.add(prompt_id)

    @rule()
    def resume(self) -> None:
        state = json.loads(json.dumps(self.ledger.state_dict()))
        self.ledger = Ledger()
        self.ledger.load_state_dict(state)

    @rule(data=st.data())
    def train_again(self, data: st.DataObject) -> None:
        if self.trained:
            before = self.ledger.trained_twice
            with pytest.raises(RlhfRayError):
                self.ledger.trained([data.draw(st.sampled_from(sorted(self.trained)))])
            assert self.ledger.trained_twice == before + 1

    @invariant()
    def every_issued_prompt_is_accounted_for(self) -> None:
        assert set(self.ledger.unfinished()) == self.untrained - self.waiting
        assert self.ledger.close(in_flight=self.untrained) == []
        assert self.ledger.close(in_flight=[]) == sorted(self.untrained)

    @invariant()
    def the_state_says_where_every_prompt_stands(self) -> None:
        assert self.ledger.state_dict()["scored"] == sorted(self.waiting)
        assert self.ledger.state_dict()["quarantined"] == sorted(self.left_out)
        assert {i for i in range(self.ledger.next_id) if self.ledger.is_trained(i)} == self.trained
        ranges = self.ledger.state_dict()["trained"]
        assert [i for first, last in ranges for i in range(first, last + 1)] == sorted(self.trained)
        assert self.ledger.past_sampling() == len(self.trained) + len(self.waiting)


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
