"""Calls that share the next call: each gets its own result, and the cause when there is none."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from rlhf_ray.pipeline.shared_calls import SharedCalls
from rlhf_ray.testing import simulate


class Doubler:
    """Takes a minute for a list of any length; refuses one that holds a negative number."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    async def __call__(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        await asyncio.sleep(60)
        if min(items) < 0:
            raise ValueError(f"{min(items)} is negative")
        return [2 * item for item in items]


def test_what_comes_in_while_a_call_runs_shares_the_next_one() -> None:
    doubler = Doubler()

    async def callers() -> list[int]:
        calls = SharedCalls(doubler)
        first = asyncio.create_task(calls(1))
        await asyncio.sleep(1)
        second = [asyncio.create_task(calls(n)) for n in (2, 3, 4)]
        await asyncio.sleep(100)
        third = asyncio.create_task(calls(5))
        return list(await asyncio.gather(first, *second, third))

    assert simulate(callers()) == [2, 4, 6, 8, 10]
    assert doubler.batches == [[1], [2, 3, 4], [5]]


def test_an_error_reaches_every_caller_of_its_call_and_no_other() -> None:
    doubler = Doubler()

    async def callers() -> list[int | BaseException]:
        calls = SharedCalls(doubler)
        first = asyncio.create_task(calls(1))
        await asyncio.sleep(1)
        later = [asyncio.create_task(calls(n)) for n in (-2, 3)]
        await asyncio.sleep(60)
        last = asyncio.create_task(calls(4))
        return list(await asyncio.gather(first, *later, last, return_exceptions=True))

    first, refused, beside_it, last = simulate(callers())
    assert (first, last) == (2, 8)
    assert str(refused) == str(beside_it) == "-2 is negative"


def test_a_caller_who_gives_up_leaves_the_others_their_results() -> None:
    async def callers() -> int:
        calls = SharedCalls(Doubler())
        gives_up, stays = asyncio.create_task(calls(1)), asyncio.create_task(calls(2))
        await asyncio.sleep(1)
        gives_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gives_up
        return await stays

    assert simulate(callers()) == 4
