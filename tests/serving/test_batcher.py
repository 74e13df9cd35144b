"""Calls share forwards: one at a time, of like length, and nobody pays for another's failure."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from rlhf_ray.errors import ScorerError
from rlhf_ray.serving.batcher import Batcher, Verdict
from rlhf_ray.types import Score


def a_score(value: float) -> Score:
    return Score(value=value, raw=value, reward_version="fake@0")


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
        return [ScorerError("unlucky") if ids[0] == 13 else a_score(ids[0]) for ids in sequences]


async def test_calls_that_come_together_share_a_forward_and_get_their_own_scores() -> None:
    forward = FirstToken()
    batcher = Batcher(forward, max_batch_size=8, wait_seconds=0.05)
    scores = await asyncio.gather(*(batcher.score([[i]]) for i in range(5)))
    assert [score.value for (score,) in scores] == [0, 1, 2, 3, 4]
    assert len(forward.batches) == 1


async def test_a_full_batch_does_not_wait_for_more() -> None:
    batcher = Batcher(FirstToken(), max_batch_size=4, wait_seconds=3600)
    async with asyncio.timeout(10):
        assert [score.value for score in await batcher.score([[1], [2], [3], [4]])] == [1, 2, 3, 4]


async def test_what_arrives_during_a_forward_goes_into_the_next_one() -> None:
    forward = FirstToken()
    batcher = Batcher(forward, max_batch_size=8, wait_seconds=0)
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
    batcher = Batcher(forward, max_batch_size=2, wait_seconds=0)
    long, short = [5] * 100, [6] * 3
    scores = await batcher.score([long, short, [7] * 98, [8] * 4])
    assert [score.value for score in scores] == [5, 6, 7, 8]
    assert [[len(ids) for ids in batch] for batch in forward.batches] == [[100, 98], [3, 4]]


async def test_one_bad_sequence_fails_its_own_caller_only() -> None:
    forward = FirstToken()
    batcher = Batcher(forward, max_batch_size=8, wait_seconds=0.05)
    good, bad = await asyncio.gather(batcher.score([[1]]), batcher.score([[2], [13]]), return_exceptions=True)
    assert good == [a_score(1)]
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
        return [a_score(1.0) for _ in sequences]

    batcher = Batcher(forward, max_batch_size=8, wait_seconds=0.05)
    results = await asyncio.gather(batcher.score([[1]]), batcher.score([[2]]), return_exceptions=True)
    assert [str(r) for r in results] == ["the forward of the reward model failed: MemoryError: no room"] * 2
    assert all(isinstance(r, ScorerError) for r in results)
    assert await batcher.score([[3]]) == [a_score(1.0)]


async def test_a_caller_who_gave_up_is_not_forwarded() -> None:
    forward = FirstToken()
    batcher = Batcher(forward, max_batch_size=8, wait_seconds=0)
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
