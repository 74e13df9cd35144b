"""Calls share forwards: one at a time, of like length, and nobody pays for another's failure."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence

import pytest

from rlhf_ray.errors import ScorerError
from rlhf_ray.roles.scorer import Reading
from rlhf_ray.serving.batcher import Batcher, Forward, OverloadedError, Verdict
from rlhf_ray.types import Score


def a_reading(value: float) -> Reading:
    return Reading(score=Score(value=value, raw=value, reward_version="fake@0"), logits=(value,))


def a_batcher(
    forward: Callable[[Sequence[Sequence[int]]], list[Verdict]],
    *,
    max_batch_size: int = 8,
    wait_seconds: float = 0,
    max_batch_tokens: int = 10**6,
    packs: bool = False,
) -> Batcher:
    return Batcher(
        forward,
        max_batch_size=max_batch_size,
        max_batch_tokens=max_batch_tokens,
        wait_seconds=wait_seconds,
        packs=packs,
    )


class FirstToken:
    """Scores a sequence by its first token, refuses 13, keeps what it was given, and can be held in a forward."""

    def __init__(self) -> None:
        self.batches: list[list[list[int]]] = []
        self.go = threading.Event()
        self.go.set()
        self.running = 0
        self.began = asyncio.Event()
        self.loop = asyncio.get_running_loop()

    def __call__(self, sequences: Sequence[Sequence[int]]) -> list[Verdict]:
        self.running += 1
        assert self.running == 1, "two forwards at once"
        self.batches.append([list(ids) for ids in sequences])
        self.loop.call_soon_threadsafe(self.began.set)
        assert self.go.wait(10)
        self.running -= 1
        return [ScorerError("unlucky") if ids[0] == 13 else a_reading(ids[0]) for ids in sequences]


async def test_calls_that_come_together_share_a_forward_and_get_their_own_scores() -> None:
    forward = FirstToken()
    batcher = a_batcher(forward, max_batch_size=8, wait_seconds=0.05)
    scores = await asyncio.gather(*(batcher.score([[i]]) for i in range(5)))
    assert [reading.score.value for (reading,) in scores] == [0, 1, 2, 3, 4]
    assert len(forward.batches) == 1


async def test_a_full_batch_does_not_wait_for_more() -> None:
    batcher = a_batcher(FirstToken(), max_batch_size=4, wait_seconds=3600)
    async with asyncio.timeout(10):
        assert [reading.score.value for reading in await batcher.score([[1], [2], [3], [4]])] == [1, 2, 3, 4]


async def test_what_arrives_during_a_forward_goes_into_the_next_one() -> None:
    forward = FirstToken()
    batcher = a_batcher(forward, max_batch_size=8, wait_seconds=0)
    forward.go.clear()
    first = asyncio.create_task(batcher.score([[1]]))
    await forward.began.wait()
    others = [asyncio.create_task(batcher.score([[i]])) for i in (2, 3, 4)]
    await asyncio.sleep(0)
    forward.go.set()
    await asyncio.gather(first, *others)
    assert forward.batches == [[[1]], [[2], [3], [4]]]


async def test_a_batch_is_the_oldest_item_with_those_nearest_to_it_in_length() -> None:
    forward = FirstToken()
    batcher = a_batcher(forward, max_batch_size=2, wait_seconds=0)
    long, short = [5] * 100, [6] * 3
    scores = await batcher.score([long, short, [7] * 98, [8] * 4])
    assert [reading.score.value for reading in scores] == [5, 6, 7, 8]
    assert [[len(ids) for ids in batch] for batch in forward.batches] == [[100, 98], [3, 4]]


async def test_no_item_is_overtaken_by_one_from_far_behind() -> None:
    forward = FirstToken()
    batcher = a_batcher(forward, max_batch_size=2)
    await batcher.score([[1] * 10, [2] * 20, [3] * 30, [4] * 40, [5] * 10, [6] * 20])
    assert [ids[0] for ids in forward.batches[0]] == [1, 2]


async def test_one_bad_sequence_fails_its_own_caller_only() -> None:
    forward = FirstToken()
    batcher = a_batcher(forward, max_batch_size=8, wait_seconds=0.05)
    good, bad = await asyncio.gather(batcher.score([[1]]), batcher.score([[2], [13]]), return_exceptions=True)
    assert good == [a_reading(1)]
    assert isinstance(bad, ScorerError)
    assert str(bad) == "unlucky"
    assert len(forward.batches) == 1


async def test_a_forward_that_fails_tells_every_caller_why_and_the_next_one_works() -> None:
    calls = 0

    def forward(sequences: Sequence[Sequence[int]]) -> list[Verdict]:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise MemoryError("no room")
        return [a_reading(1.0) for _ in sequences]

    batcher = a_batcher(forward, max_batch_size=8, wait_seconds=0.05)
    results = await asyncio.gather(batcher.score([[1]]), batcher.score([[2]]), return_exceptions=True)
    assert [str(r) for r in results] == ["the forward of the reward model failed: MemoryError: no room"] * 2
    assert all(isinstance(r, ScorerError) for r in results)
    assert await batcher.score([[3]]) == [a_reading(1.0)]


async def test_a_caller_who_gave_up_is_not_forwarded() -> None:
    forward = FirstToken()
    batcher = a_batcher(forward, max_batch_size=8, wait_seconds=0)
    forward.go.clear()
    first = asyncio.create_task(batcher.score([[1]]))
    await forward.began.wait()
    gone, stays = asyncio.create_task(batcher.score([[2]])), asyncio.create_task(batcher.score([[3]]))
    await asyncio.sleep(0)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    forward.go.set()
    await asyncio.gather(first, stays)
    assert forward.batches == [[[1]], [[3]]]


async def test_a_forward_holds_no_more_tokens_than_it_may_and_a_longer_sequence_goes_alone() -> None:
    forward = FirstToken()
    batcher = a_batcher(forward, max_batch_tokens=20)
    await batcher.score([[1] * 5, [2] * 5, [3] * 6, [4] * 4, [5] * 30, [6] * 2])
    assert sorted(len(ids) for batch in forward.batches for ids in batch) == [2, 4, 5, 5, 6, 30]
    for batch in forward.batches:
        assert len(batch) == 1 or len(batch) * max(map(len, batch)) <= 20
    assert [[5] * 30] in forward.batches


async def test_a_call_that_would_wait_too_long_is_refused_and_says_how_long() -> None:
    forward = FirstToken()
    batcher = a_batcher(forward)
    batcher._recent.append(Forward(rows=1, scored=1, tokens=100, padded_tokens=100, seconds=1.0, waited_seconds=0.0))
    forward.go.clear()
    first = asyncio.create_task(batcher.score([[1] * 200], max_wait_seconds=0.5))
    await forward.began.wait()
    assert batcher.expected_wait() == pytest.approx(2.0)
    with pytest.raises(OverloadedError) as refused:
        await batcher.score([[2]], max_wait_seconds=1.5)
    assert refused.value.wait_seconds == pytest.approx(2.0)
    patient = asyncio.create_task(batcher.score([[3]]))
    forward.go.set()
    await asyncio.gather(first, patient)
    assert [[2]] not in forward.batches
    assert batcher.expected_wait() == 0


async def test_each_forward_is_reported() -> None:
    seen: list[Forward] = []
    batcher = Batcher(FirstToken(), max_batch_size=4, max_batch_tokens=100, wait_seconds=0.02, on_forward=seen.append)
    await batcher.score([[1], [2, 2, 2]])
    (forward,) = seen
    assert (forward.rows, forward.scored, forward.tokens, forward.padded_tokens) == (2, 2, 4, 6)
    assert forward.waited_seconds >= 0.01


async def test_the_warm_up_keeps_a_few_short_calls_from_making_the_wait_look_long() -> None:
    warm_up = Forward(rows=16, scored=16, tokens=1000, padded_tokens=1000, seconds=1.0, waited_seconds=0.0)
    batcher = Batcher(FirstToken(), max_batch_size=8, max_batch_tokens=10**6, wait_seconds=0, warm_up=warm_up)
    batcher._recent.append(Forward(rows=1, scored=1, tokens=10, padded_tokens=10, seconds=0.1, waited_seconds=0.0))
    batcher._running_tokens = 1010
    assert batcher.expected_wait() == pytest.approx(1.1)


async def test_the_age_of_a_forward_under_way_is_told_and_ends_with_it() -> None:
    forward = FirstToken()
    batcher = a_batcher(forward)
    for first in (1, 13):
        forward.go.clear()
        forward.began.clear()
        scoring = asyncio.create_task(batcher.score([[first]]))
        await forward.began.wait()
        assert batcher.running_seconds() > 0
        forward.go.set()
        await asyncio.wait([scoring])
        await batcher.idle()
        assert batcher.running_seconds() == 0


async def test_failures_in_a_row_are_counted_and_a_score_ends_the_count() -> None:
    batcher = a_batcher(FirstToken())
    for expected in (1, 2):
        with pytest.raises(ScorerError):
            await batcher.score([[13]])
        await batcher.idle()
        assert batcher.failures == expected
    await batcher.score([[1]])
    await batcher.idle()
    assert batcher.failures == 0


async def test_a_forward_with_too_few_verdicts_leaves_nobody_waiting() -> None:
    short = a_batcher(lambda sequences: [a_reading(1.0)], wait_seconds=0.02)
    async with asyncio.timeout(10):
        with pytest.raises(ScorerError, match="1 verdicts on 2 sequences"):
            await short.score([[1], [2]])
        assert await short.score([[1]]) == [a_reading(1.0)]


async def test_a_meter_that_breaks_keeps_nobody_waiting_and_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    breaks = [True, True, False, True]

    def meter(forward: Forward) -> None:
        if breaks.pop(0):
            raise RuntimeError("meter")

    batcher = Batcher(FirstToken(), max_batch_size=1, max_batch_tokens=100, wait_seconds=0, on_forward=meter)
    async with asyncio.timeout(10):
        assert await batcher.score([[1], [2], [3], [4]]) == [a_reading(value) for value in (1, 2, 3, 4)]
        await batcher.idle()
    assert breaks == []
    told = [record for record in caplog.records if "forwards are not counted" in record.getMessage()]
    assert [str(record.exc_info and record.exc_info[1]) for record in told] == ["meter", "meter"]


async def test_a_forward_without_padding_takes_the_line_in_its_order_as_far_as_the_tokens_reach() -> None:
    forward = FirstToken()
    batcher = a_batcher(forward, max_batch_size=3, max_batch_tokens=110, packs=True)
    await batcher.score([[1] * 100, [2] * 3, [3] * 98, [4] * 4, [5], [6]])
    assert [[ids[0] for ids in batch] for batch in forward.batches] == [[1, 2], [3, 4, 5], [6]]
