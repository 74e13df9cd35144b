"""A loop in which nothing moves any more ends, and one that is only slow does not; on fakes and simulated time."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest

from rlhf_ray.errors import HangError, LearnerDiedError
from rlhf_ray.testing import FakeCheckpoints, FakeGenerator, FakeLearner, FakeReference, FakeScorer

FOR_EVER = 1e6


def test_a_service_that_never_answers_is_named_and_the_log_has_state_and_stacks(
    make_run, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(scorer=FakeScorer(seconds=FOR_EVER), ppo={"max_staleness": 1, "batch_size": 4})
    with (
        caplog.at_level(logging.ERROR, logger="rlhf_ray.pipeline"),
        pytest.raises(
            HangError, match=r"hangs in score \(8 under way\): nothing has moved for over 600 s.*hang_timeout_s"
        ),
    ):
        run.go()
    (told,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    state = json.loads(told.split("state: ")[1].splitlines()[0])
    assert state["queue"]["being_scored"] == 8
    assert "  8 x " in told
    assert "FakeScorer.score line" in told
    assert "ExperienceBuffer.take line" in told
    assert run.generators["generator-0"].closed


def test_a_call_that_never_ends_among_others_that_do_is_found_too(make_run) -> None:
    class Forgetful(FakeScorer):
        async def score(self, rollout):
            self._seconds = FOR_EVER if rollout.prompt.prompt_id == 5 else 1.0
            return await super().score(rollout)

    run = make_run(scorer=Forgetful(), ppo={"steps": 50})
    with pytest.raises(HangError, match=r"hangs in score \(1 under way\)"):
        run.go()
    assert run.rows


def test_a_checkpoint_that_is_never_written_is_named(make_run) -> None:
    run = make_run(
        make_checkpoints=lambda learner: FakeCheckpoints(learner, seconds=FOR_EVER),
        ppo={"steps": 20, "checkpoint_every": 2},
    )
    with pytest.raises(HangError, match=r"hangs in checkpoint \(1 under way\)"):
        run.go()


def test_a_learner_that_is_found_out_over_a_checkpoint_is_told_as_such(make_run) -> None:
    """Its own watch and this one begin at the same moment, and only the first knows which rank hangs."""

    class Hanging(FakeCheckpoints):
        async def begin(self, step, state, scored):
            await asyncio.sleep(640.0)  # the time allowed, and what it takes to look at the process
            raise LearnerDiedError("rank 1 of the learner hung")

    learner = FakeLearner(seconds=29.5)  # the checkpoint begins just before one of the watch's looks
    run = make_run(learner=learner, make_checkpoints=Hanging, ppo={"steps": 20, "checkpoint_every": 2})
    with pytest.raises(LearnerDiedError, match="rank 1"):
        run.go()


def test_a_loop_that_waits_for_what_is_being_started_elsewhere_is_no_hang_until_that_is_over(make_run) -> None:
    class Away(FakeScorer):
        async def score(self, rollout):
            run.pipeline.may_stand_still(True)
            await asyncio.sleep(5000.0)
            run.pipeline.may_stand_still(False)
            await asyncio.sleep(self.after)
            return await super().score(rollout)

    scorer = Away()
    scorer.after = 0.0
    run = make_run(scorer=scorer, ppo={"steps": 2})
    assert run.go().status == "finished"
    scorer.after = FOR_EVER
    run = make_run(scorer=scorer, ppo={"steps": 2})
    with pytest.raises(HangError, match="hangs in score"):
        run.go()


@pytest.mark.parametrize(
    "slow",
    [
        {"make_generator": lambda name: FakeGenerator(name, seconds=5000.0)},
        {"make_reference": lambda name: FakeReference(name, seconds=5000.0)},
        {"learner": FakeLearner(seconds=5000.0, publish_seconds=5000.0)},
        {"start_seconds": 5000.0},
        {"scorer": FakeScorer(seconds=590.0)},
    ],
    ids=["sampling", "reading", "learning", "starting", "scoring within the time"],
)
def test_long_work_is_no_hang(make_run, slow) -> None:
    summary = make_run(**slow).go()
    assert (summary.status, summary.lost, summary.trained_twice) == ("finished", 0, 0)
