"""The client of the reward service tries again what may pass, and gives up with the cause."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, OutOfMemoryError, RayTaskError
from ray.serve.exceptions import BackPressureError

from rlhf_ray.actors.scorer import RayScorers, ServedScorer, served_pool
from rlhf_ray.errors import ForwardFailedError, NoScoreError, PromptError, ScorerError
from rlhf_ray.pipeline.pool import ScorerPool
from rlhf_ray.pipeline.weighted_scorer import WeightedScorer
from rlhf_ray.types import Score

SCORE = Score(value=0.5, raw=1.0, reward_version="reward@0")
BUSY = BackPressureError(num_queued_requests=9, max_queued_requests=8)


class FakeHandle:
    """A Serve handle whose calls give the next of a list of outcomes."""

    def __init__(self, *outcomes: Any) -> None:
        self._outcomes = list(outcomes)
        self.calls: list[Any] = []
        self.score_rollout = self

    async def remote(self, rollout: Any) -> Score:
        self.calls.append(rollout)
        outcome = self._outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


async def test_a_rollouts_ref_is_handed_on_unopened_and_its_score_returned() -> None:
    ref = object()
    handle = FakeHandle(SCORE)
    assert await ServedScorer(handle).score(ref) is SCORE
    assert handle.calls == [ref]


async def test_an_overloaded_service_is_tried_again() -> None:
    handle = FakeHandle(BUSY, BUSY, SCORE)
    assert await ServedScorer(handle, tries=3, first_delay=0).score("ref") is SCORE
    assert handle.calls == ["ref"] * 3


FAILED = RayTaskError("score_rollout", "a long traceback", ForwardFailedError("out of memory")).as_instanceof_cause()
DEATHS = [
    ActorDiedError(),
    OutOfMemoryError("by Ray's memory monitor"),
    ActorUnavailableError("gone for a moment", None),
    FAILED,
]


@pytest.mark.parametrize("death", DEATHS)
async def test_what_a_replica_died_of_or_failed_on_is_scored_by_another_one(death: Exception) -> None:
    handle = FakeHandle(death, death, SCORE)
    async with running(handle, max_prompt_tries=3) as pool:
        assert await pool.score("ref") is SCORE
    assert handle.calls == ["ref"] * 3


@pytest.mark.parametrize("death", DEATHS)
async def test_a_response_that_no_replica_survives_is_given_up(death: Exception) -> None:
    handle = FakeHandle(death, death, SCORE)
    async with running(handle, max_prompt_tries=2) as pool:
        with pytest.raises(PromptError, match="2 processes of scorer reward and each died"):
            await pool.score("ref")
        assert await pool.score("another") is SCORE


@asynccontextmanager
async def running(handle: FakeHandle, *, max_prompt_tries: int) -> AsyncIterator[ScorerPool]:
    pool = served_pool(handle, name="reward", max_prompt_tries=max_prompt_tries)
    async with RayScorers(WeightedScorer({"reward": (1.0, pool)}), [pool], []).running():
        yield pool


async def test_a_service_that_keeps_failing_ends_in_an_error_with_the_cause() -> None:
    handle = FakeHandle(BUSY, BUSY, BUSY, SCORE)
    with pytest.raises(
        ScorerError, match=r"failed 3 times in a row, last with BackPressureError.*serve.replicas"
    ) as caught:
        await ServedScorer(handle, tries=3, first_delay=0).score("ref")
    assert caught.value.__cause__ is BUSY
    assert len(handle.calls) == 3


async def test_a_response_without_a_score_is_not_tried_again() -> None:
    handle = FakeHandle(ScorerError("gave nan"), SCORE)
    with pytest.raises(ScorerError, match="gave nan"):
        await ServedScorer(handle, first_delay=0).score("ref")
    assert len(handle.calls) == 1


async def test_a_replicas_own_error_comes_back_without_rays_account_of_it() -> None:
    wrapped = RayTaskError("score_rollout", "a long traceback", NoScoreError("gave nan")).as_instanceof_cause()
    with pytest.raises(NoScoreError) as caught:
        await ServedScorer(FakeHandle(wrapped)).score("ref")
    assert (type(caught.value), str(caught.value)) == (NoScoreError, "gave nan")


async def test_a_score_that_is_no_number_never_reaches_the_loop() -> None:
    handle = FakeHandle(Score(value=math.nan, raw=math.nan, reward_version="reward@0"))
    with pytest.raises(NoScoreError, match="reward@0 gave nan, which is no score"):
        await ServedScorer(handle).score("ref")
