"""The buffer's rule: staleness stays within the bound, nobody waits without need, and there is always a way on."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from itertools import combinations
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rlhf_ray.errors import RlhfRayError, StalenessError
from rlhf_ray.pipeline.buffer import ExperienceBuffer
from rlhf_ray.testing import simulate
from rlhf_ray.types import ExperienceRefs, RolloutReceipt, Score


def experience(prompt_id: int, version: int = 0) -> ExperienceRefs:
    receipt = RolloutReceipt(
        prompt_id=prompt_id,
        generator="generator-0",
        oldest_version=version,
        newest_version=version,
        response_tokens=1,
        truncated=False,
        seconds=0.0,
    )
    return ExperienceRefs(
        receipt=receipt, score=Score(value=0.0, raw=0.0, reward_version=""), rollout=None, ref_logprobs=None
    )


def at_once(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine that must not have to wait."""
    with pytest.raises(StopIteration):
        coroutine.send(None)


def admitted(buffer: ExperienceBuffer, *prompt_ids: int) -> ExperienceBuffer:
    for prompt_id in prompt_ids:
        at_once(buffer.acquire())
        buffer.admit(prompt_id, buffer.version)
    return buffer


def put(buffer: ExperienceBuffer, *prompt_ids: int) -> None:
    for prompt_id in prompt_ids:
        buffer.put(prompt_id, [experience(prompt_id, buffer.version)])


def ids(batch: list[ExperienceRefs] | None) -> list[int] | None:
    return None if batch is None else [e.receipt.prompt_id for e in batch]


def test_without_staleness_a_batch_is_exactly_what_was_admitted_at_its_version() -> None:
    buffer = admitted(ExperienceBuffer(batch_size=3, max_staleness=0), 0, 1, 2)
    put(buffer, 2, 0)
    assert buffer.try_take() is None
    put(buffer, 1)
    assert ids(buffer.try_take()) == [0, 1, 2]


def test_a_straggler_within_the_bound_is_not_waited_for() -> None:
    buffer = admitted(ExperienceBuffer(batch_size=2, max_staleness=1), 0, 1, 2, 3)
    put(buffer, 1, 3)
    assert ids(buffer.try_take()) == [1, 3]


def test_a_straggler_is_waited_for_where_the_bound_would_break() -> None:
    buffer = admitted(ExperienceBuffer(batch_size=2, max_staleness=1), 0, 1, 2, 3)
    put(buffer, 1, 3)
    buffer.try_take()
    buffer.release(1)
    admitted(buffer, 4, 5)
    put(buffer, 2, 4, 5)
    assert buffer.try_take() is None  # prompt 0 was admitted at version 0 and must be trained now
    buffer.put(0, [experience(0, version=0)])
    assert ids(buffer.try_take()) == [0, 2]


def test_earliest_deadlines_go_first_and_ties_go_by_prompt_id() -> None:
    buffer = admitted(ExperienceBuffer(batch_size=2, max_staleness=2), 0, 1, 2, 3)
    put(buffer, 3, 1)
    buffer.try_take()
    buffer.release(1)
    admitted(buffer, 4, 5)
    put(buffer, 5, 4, 2)
    assert ids(buffer.try_take()) == [2, 4]


def test_a_prompt_that_was_issued_again_goes_after_those_that_are_due_before_it() -> None:
    buffer = admitted(ExperienceBuffer(batch_size=1, max_staleness=2), 0, 1, 2)
    put(buffer, 2)
    buffer.try_take()
    buffer.withdraw(0)
    buffer.release(1)
    buffer.admit(0, 1)
    put(buffer, 0)
    buffer.put(1, [experience(1, version=0)])
    assert ids(buffer.try_take()) == [1]


def test_a_withdrawn_prompt_is_not_waited_for_and_gets_a_later_deadline() -> None:
    buffer = admitted(ExperienceBuffer(batch_size=1, max_staleness=1), 0, 1)
    put(buffer, 1)
    buffer.try_take()
    buffer.release(1)
    admitted(buffer, 2)
    put(buffer, 2)
    assert buffer.try_take() is None
    buffer.withdraw(0)
    assert ids(buffer.try_take()) == [2]
    buffer.release(2)
    buffer.admit(0, 2)
    admitted(buffer, 3)
    put(buffer, 3)
    assert ids(buffer.try_take()) == [3]


def test_slots_run_out_and_are_freed_by_the_published_version() -> None:
    async def feed_two_batches() -> None:
        buffer = ExperienceBuffer(batch_size=2, max_staleness=0)
        admitted(buffer, 0, 1)
        third = asyncio.create_task(buffer.acquire())
        put(buffer, 0, 1)
        await buffer.take()
        await asyncio.sleep(1)
        assert not third.done()
        buffer.release(1)
        await third
        assert buffer.slots_in_use == 1

    simulate(feed_two_batches())


def test_a_waiting_learner_is_woken_by_the_experience_that_it_needs() -> None:
    async def put_later() -> list[int] | None:
        buffer = admitted(ExperienceBuffer(batch_size=2, max_staleness=0), 0, 1)
        batch = asyncio.create_task(buffer.take())
        for prompt_id in (1, 0):
            await asyncio.sleep(1)
            assert not batch.done()
            put(buffer, prompt_id)
        return ids(await batch)

    assert simulate(put_later()) == [0, 1]


def test_a_waiting_learner_is_woken_by_a_withdrawal() -> None:
    async def withdraw_later() -> list[int] | None:
        buffer = admitted(ExperienceBuffer(batch_size=1, max_staleness=1), 0, 1)
        put(buffer, 1)
        await buffer.take()
        buffer.release(1)
        admitted(buffer, 2)
        put(buffer, 2)
        batch = asyncio.create_task(buffer.take())
        await asyncio.sleep(1)
        assert not batch.done()
        buffer.withdraw(0)
        return ids(await batch)

    assert simulate(withdraw_later()) == [2]


def test_a_waiting_learner_is_woken_by_the_end() -> None:
    async def end_later() -> list[int] | None:
        buffer = ExperienceBuffer(batch_size=2, max_staleness=0)
        batch = asyncio.create_task(buffer.take())
        await asyncio.sleep(1)
        buffer.end()
        return ids(await batch)

    assert simulate(end_later()) == []


def test_a_generator_of_another_version_is_refused() -> None:
    buffer = ExperienceBuffer(batch_size=1, max_staleness=1, version=3)
    at_once(buffer.acquire())
    for version in (2, 4):
        with pytest.raises(StalenessError, match=f"version {version} while 3 is published"):
            buffer.admit(0, version)


def test_tokens_older_than_the_admission_are_refused() -> None:
    buffer = admitted(ExperienceBuffer(batch_size=1, max_staleness=1, version=3), 0)
    with pytest.raises(StalenessError, match="sampled prompt 0 under version 2 after it had acknowledged version 3"):
        buffer.put(0, [experience(0, version=2)])


def test_a_prompt_needs_a_slot_and_one_generator() -> None:
    buffer = ExperienceBuffer(batch_size=2, max_staleness=0)
    with pytest.raises(RlhfRayError, match="without holding a slot"):
        buffer.admit(0, 0)
    admitted(buffer, 0)
    with pytest.raises(RlhfRayError, match="two generators at once"):
        buffer.admit(0, 0)


def test_the_slots_of_a_batch_in_training_are_not_lent() -> None:
    buffer = admitted(ExperienceBuffer(batch_size=1, max_staleness=1), 0, 1)
    put(buffer, 0)
    buffer.try_take()
    with pytest.raises(RlhfRayError, match="prompt 2 was given to a generator without holding a slot"):
        buffer.admit(2, 0)


def test_an_experience_comes_once_and_only_when_awaited() -> None:
    buffer = admitted(ExperienceBuffer(batch_size=2, max_staleness=0), 0)
    put(buffer, 0)
    for prompt_id in (0, 7):
        with pytest.raises(RlhfRayError, match=f"prompt {prompt_id} is not awaited"):
            put(buffer, prompt_id)
    with pytest.raises(RlhfRayError, match="prompt 0 cannot be withdrawn"):
        buffer.withdraw(0)


def test_batches_and_publications_alternate() -> None:
    buffer = admitted(ExperienceBuffer(batch_size=1, max_staleness=1), 0, 1)
    with pytest.raises(RlhfRayError, match="no batch was trained since"):
        buffer.release(1)
    put(buffer, 0, 1)
    buffer.try_take()
    with pytest.raises(RlhfRayError, match="before the version that the last one made was published"):
        buffer.try_take()


def restored(buffer: ExperienceBuffer, *, max_staleness: int | None = None) -> tuple[ExperienceBuffer, list[int]]:
    """A new buffer with what waits in ``buffer``, and the prompts that did not fit."""
    stale = buffer.max_staleness if max_staleness is None else max_staleness
    copy = ExperienceBuffer(batch_size=buffer.batch_size, max_staleness=stale, version=buffer.version)
    return copy, copy.restore(buffer.finished())


def test_what_waited_is_restored_with_its_deadline_and_its_slot() -> None:
    buffer = admitted(ExperienceBuffer(batch_size=2, max_staleness=1), 0, 1, 2, 3)
    put(buffer, 3, 1, 0)
    buffer.try_take()
    buffer.release(1)
    admitted(buffer, 4)
    put(buffer, 4)
    again, left_out = restored(buffer)
    assert left_out == []
    assert again.finished() == buffer.finished()
    assert again.slots_in_use == 2
    assert ids(again.try_take()) == [3, 4], "prompt 2 was in flight: it is issued again, and nobody waits for it"


def test_under_a_lower_bound_what_can_no_longer_be_trained_in_time_is_left_out() -> None:
    buffer = admitted(ExperienceBuffer(batch_size=1, max_staleness=2), 0, 1, 2)
    put(buffer, 0, 1, 2)
    buffer.try_take()
    buffer.release(1)
    admitted(buffer, 3)
    put(buffer, 3)
    assert restored(buffer, max_staleness=3)[1] == []
    again, left_out = restored(buffer, max_staleness=1)
    assert left_out == [2], "prompts 1 and 2 are both due at version 1, which trains one of them"
    assert ids(again.try_take()) == [1]
    again.release(2)
    assert ids(again.try_take()) == [3]
    assert restored(buffer, max_staleness=0)[1] == [1, 2]


def test_a_snapshot_of_a_later_version_is_refused() -> None:
    buffer = admitted(ExperienceBuffer(batch_size=1, max_staleness=1, version=3), 0)
    buffer.put(0, [experience(0, version=3)])
    with pytest.raises(RlhfRayError, match="prompt 0 was admitted at version 3 and cannot be restored at version 2"):
        ExperienceBuffer(batch_size=1, max_staleness=1, version=2).restore(buffer.finished())


class AnyOrder(RuleBasedStateMachine):
    """Finishing, dying, joining late, publishing and resuming in any order, beside a model that keeps its own books."""

    @initialize(batch_size=st.integers(1, 3), max_staleness=st.integers(0, 3))
    def begin(self, batch_size: int, max_staleness: int) -> None:
        self.B, self.S = batch_size, max_staleness
        self.buffer = ExperienceBuffer(batch_size=batch_size, max_staleness=max_staleness)
        self.version = 0
        self.issued = 0
        self.again: list[int] = []  # to be issued again after a resume
        self.seatless: list[int] = []  # hold a slot, no generator has them
        self.running: dict[int, int] = {}  # prompt id -> version of admission
        self.finished: dict[int, int] = {}
        self.training = False
        self.resumed = False
        self.trained: list[int] = []

    @precondition(lambda self: self.buffer.slots_in_use < self.buffer.capacity)
    @rule()
    def issue(self) -> None:
        at_once(self.buffer.acquire())
        if self.again:
            self.seatless.append(self.again.pop(0))
            return
        self.seatless.append(self.issued)
        self.issued += 1

    @precondition(lambda self: self.seatless)
    @rule(data=st.data())
    def dispatch(self, data: st.DataObject) -> None:
        prompt_id = data.draw(st.sampled_from(self.seatless))
        self.seatless.remove(prompt_id)
        self.buffer.admit(prompt_id, self.version)
        self.running[prompt_id] = self.version

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        prompt_id = data.draw(st.sampled_from(sorted(self.running)))
        oldest = data.draw(st.integers(self.running[prompt_id], self.version))
        self.finished[prompt_id] = self.running.pop(prompt_id)
        self.buffer.put(prompt_id, [experience(prompt_id, version=oldest)])

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        prompt_id = data.draw(st.sampled_from(sorted(self.running)))
        del self.running[prompt_id]
        self.buffer.withdraw(prompt_id)
        self.seatless.append(prompt_id)

    @precondition(lambda self: not self.training)
    @rule()
    def take(self) -> None:
        self.take_or_wait()

    @precondition(lambda self: self.training)
    @rule()
    def publish(self) -> None:
        self.version += 1
        self.buffer.release(self.version)
        self.training = False

    @precondition(lambda self: not self.training)
    @rule(change=st.sampled_from([-1, 0, 0, 0, 1]))
    def resume(self, change: int) -> None:
        """The process was killed after a step. What was scored comes back; all else is issued again."""
        self.resumed = True
        self.S = max(0, self.S + change)
        self.buffer, left_out = restored(self.buffer, max_staleness=self.S)
        assert change == -1 or left_out == []
        for prompt_id in left_out:
            del self.finished[prompt_id]
        self.again = sorted({*self.again, *self.seatless, *self.running, *left_out})
        self.seatless.clear()
        self.running.clear()

    def take_or_wait(self) -> bool:
        batch = self.buffer.try_take()
        if batch is None:
            assert not any(self.keeps_the_bound(set(c)) for c in combinations(self.finished, self.B)), "waited in vain"
            return False
        chosen = [e.receipt.prompt_id for e in batch]
        assert len(chosen) == self.B
        assert self.keeps_the_bound(set(chosen))
        assert max(self.version - e.receipt.oldest_version for e in batch) <= self.S
        if self.S == 0 and not self.resumed:
            assert chosen == list(range(self.version * self.B, (self.version + 1) * self.B))
        for prompt_id in chosen:
            del self.finished[prompt_id]
        self.trained += chosen
        self.training = True
        return True

    def due(self, k: int) -> set[int]:
        """Admitted, untrained, and to be trained at version k at the latest."""
        return {i for i, version in (self.running | self.finished).items() if version + self.S <= k}

    def keeps_the_bound(self, chosen: set[int]) -> bool:
        j = self.version
        return all(len(self.due(k) - chosen) <= (k - j) * self.B for k in range(j, j + self.S + 1))

    @invariant()
    def what_is_due_fits_into_the_steps_that_are_left(self) -> None:
        if hasattr(self, "buffer"):
            first = self.version + self.training  # of the steps to come
            for k in range(self.version, self.version + self.S + 2):
                assert len(self.due(k)) <= max(k - first + 1, 0) * self.B

    @invariant()
    def nothing_is_trained_twice(self) -> None:
        if hasattr(self, "buffer"):
            assert len(set(self.trained)) == len(self.trained)

    def teardown(self) -> None:
        """Once all that is in flight has finished there is a batch, again and again."""
        if not hasattr(self, "buffer"):
            return
        for _ in range(self.S + 3):
            if self.training:
                self.publish()
            while self.buffer.slots_in_use < self.buffer.capacity:
                self.issue()
            for prompt_id in self.seatless:
                self.buffer.admit(prompt_id, self.version)
                self.running[prompt_id] = self.version
            self.seatless.clear()
            for prompt_id, version in list(self.running.items()):
                self.buffer.put(prompt_id, [experience(prompt_id, version=version)])
                self.finished[prompt_id] = self.running.pop(prompt_id)
            assert self.take_or_wait(), "deadlock"


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
