"""The weighted sum of scorers: its arithmetic, its parts, and whose fault a missing score is."""

from __future__ import annotations

import asyncio

import pytest

from rlhf_ray.errors import NoScoreError, ScorerError, WorkerDiedError
from rlhf_ray.interfaces import Scorer
from rlhf_ray.pipeline.weighted_scorer import WeightedScorer
from rlhf_ray.testing import simulate
from rlhf_ray.types import Ref, Score


class Fixed:
    """Gives one score, or an error, after some seconds."""

    def __init__(self, outcome: Score | Exception, *, seconds: float = 0.0) -> None:
        self._outcome = outcome
        self._seconds = seconds
        self.refs: list[Ref] = []
        self.cancelled = False

    async def score(self, rollout: Ref) -> Score:
        self.refs.append(rollout)
        try:
            await asyncio.sleep(self._seconds)
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome


def a_score(value: float, *, raw: float = 0.0, version: str = "m@1") -> Score:
    return Score(value=value, raw=raw, reward_version=version)


def test_the_score_is_the_weighted_sum_and_its_parts_are_unweighted() -> None:
    helpful, brief = Fixed(a_score(2.0, raw=5.0)), Fixed(a_score(0.5, raw=4.0, version="rewards:brief"))
    scorer: Scorer = WeightedScorer({"helpful": (1.5, helpful), "brief": (-2.0, brief)})
    score = simulate(scorer.score("ref"))
    assert (score.value, score.raw) == (1.5 * 2.0 - 2.0 * 0.5, 1.5 * 5.0 - 2.0 * 4.0)
    assert score.parts == {"helpful": 2.0, "brief": 0.5}
    assert score.reward_version == "m@1 + rewards:brief"
    assert helpful.refs == brief.refs == ["ref"], "handed on unopened"


def test_a_single_scorers_score_is_its_own_but_for_the_weight() -> None:
    own = a_score(2.0, raw=5.0)
    assert simulate(WeightedScorer({"reward": (1.0, Fixed(own))}).score("ref")) == own
    assert simulate(WeightedScorer({"reward": (0.5, Fixed(own))}).score("ref")).value == 1.0


def test_all_are_asked_at_once() -> None:
    async def seconds() -> float:
        scorers = {name: (1.0, Fixed(a_score(1.0), seconds=60)) for name in "abc"}
        await WeightedScorer(scorers).score("ref")
        return asyncio.get_running_loop().time()

    assert simulate(seconds()) == pytest.approx(60)


def test_one_that_fails_is_named_and_the_others_are_not_waited_for() -> None:
    cause = ScorerError("no score after 8 tries")
    slow = Fixed(a_score(1.0), seconds=3600)
    scorer = WeightedScorer({"slow": (1.0, slow), "remote": (1.0, Fixed(cause, seconds=1))})
    with pytest.raises(ScorerError, match=r"^scorer remote: no score after 8 tries$") as caught:
        simulate(scorer.score("ref"))
    assert caught.value.__cause__ is cause
    assert slow.cancelled


def test_a_response_without_a_score_stays_told_from_a_scorer_that_fails() -> None:
    scorer = WeightedScorer({"a": (1.0, Fixed(a_score(1.0))), "b": (1.0, Fixed(NoScoreError("gave nan")))})
    with pytest.raises(NoScoreError, match=r"^scorer b: gave nan$"):
        simulate(scorer.score("ref"))


def test_a_dead_process_stays_that() -> None:
    scorer = WeightedScorer({"a": (1.0, Fixed(a_score(1.0))), "b": (1.0, Fixed(WorkerDiedError("b is gone")))})
    with pytest.raises(WorkerDiedError, match=r"^b is gone$"):
        simulate(scorer.score("ref"))
