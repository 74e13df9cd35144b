"""The whole loop on fakes and simulated time."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.algorithms.kl import AdaptiveKL
from rlhf_ray.errors import (
    CheckpointError,
    DataLostError,
    NoScoreError,
    NumericalError,
    ParityError,
    RlhfRayError,
    ScorerError,
    WorkerDiedError,
)
from rlhf_ray.pipeline import loop
from rlhf_ray.pipeline.loop import RunSummary
from rlhf_ray.pipeline.pool import ScorerPool
from rlhf_ray.pipeline.weighted_scorer import WeightedScorer
from rlhf_ray.testing import (
    FakeCheckpoint,
    FakeCheckpoints,
    FakeGenerator,
    FakeLearner,
    FakePrompts,
    FakeReference,
    FakeScorer,
    simulate,
    uniform_seconds,
    worker_factory,
)
from rlhf_ray.types import Ref, Score, StepReport, VersionedWeights

SYNCHRONOUS = {"max_staleness": 0}


def in_order(steps: int, batch: int) -> list[tuple[int, list[int]]]:
    """What a plain loop would train: at version v the prompts v·B … v·B + B − 1."""
    return [(v, list(range(v * batch, (v + 1) * batch))) for v in range(steps)]


# Synchronous and asynchronous


def test_without_staleness_the_batches_are_those_of_a_plain_synchronous_loop(make_run) -> None:
    run = make_run(
        make_generator=lambda name: FakeGenerator(name, seconds=uniform_seconds(1, 9)),
        scorer=FakeScorer(seconds=0.5),
        count=3,
        ppo={"steps": 6, "batch_size": 4} | SYNCHRONOUS,
    )
    summary = run.go()
    assert run.learner.batches == in_order(6, 4)
    assert set(run.learner.stalenesses) == {0}
    assert summary.staleness_max == 0
    assert (summary.status, summary.steps, summary.samples) == ("finished", 6, 24)


def test_without_staleness_a_death_does_not_change_the_batches(make_run) -> None:
    def make(name: str) -> FakeGenerator:
        return FakeGenerator(name, seconds=uniform_seconds(1, 9), die_at_generate=5 if name == "generator-1" else None)

    run = make_run(make_generator=make, count=2, ppo={"steps": 6, "batch_size": 4} | SYNCHRONOUS)
    run.go()
    assert "generator-2" in run.generators
    assert run.learner.batches == in_order(6, 4)


@pytest.mark.parametrize("bound", [1, 2, 3])
def test_staleness_reaches_the_bound_and_never_passes_it(make_run, bound: int) -> None:
    run = make_run(
        make_generator=lambda name: FakeGenerator(name, seconds=uniform_seconds(1, 30)),
        learner=FakeLearner(seconds=2.0),
        count=2,
        ppo={"steps": 20, "batch_size": 4, "max_staleness": bound},
    )
    summary = run.go()
    assert max(run.learner.stalenesses) == bound == summary.staleness_max
    assert summary.staleness_mean == pytest.approx(sum(run.learner.stalenesses) / 80)
    assert sorted(run.trained_ids) == list(range(80))


def test_sampling_goes_on_while_the_learner_learns(make_run) -> None:
    def seconds(max_staleness: int) -> float:
        run = make_run(
            make_generator=lambda name: FakeGenerator(name, seconds=10.0),
            learner=FakeLearner(seconds=10.0),
            ppo={"steps": 10, "batch_size": 4, "max_staleness": max_staleness},
        )
        return run.go().seconds

    assert seconds(0) == pytest.approx(200.0)
    assert seconds(1) == pytest.approx(110.0)


def test_a_straggler_does_not_stall_the_learner_until_the_bound_would_break(make_run) -> None:
    run = make_run(
        make_generator=lambda name: FakeGenerator(name, seconds=lambda i: 1000.0 if i == 0 else 1.0),
        ppo={"steps": 6, "batch_size": 2, "max_staleness": 3},
    )
    run.go()
    waits = [row["seconds_wait"] for row in run.rows]
    assert max(waits[:3]) < 10  # versions 0 to 2 are trained without it
    assert waits[3] > 900  # version 3 is its deadline
    assert 0 in run.learner.batches[3][1]


def test_exactly_the_prompts_that_the_steps_need_are_issued(make_run) -> None:
    run = make_run(count=2, ppo={"steps": 5, "batch_size": 3, "max_staleness": 2})
    run.go()
    assert sorted(i for g in run.generators.values() for i in g.prompt_ids) == list(range(15))


def test_the_responses_to_a_prompt_stand_together_and_differ(make_run) -> None:
    run = make_run(prompts=FakePrompts(completions=2), ppo={"steps": 3, "batch_size": 4, "completions": 2})
    summary = run.go()
    assert [ids for _, ids in run.learner.batches] == [[0, 0, 1, 1], [2, 2, 3, 3], [4, 4, 5, 5]]
    assert (summary.samples, summary.lost, summary.trained_twice) == (12, 0, 0)
    first, second = run.samples[:2]
    assert first["prompt_id"] == second["prompt_id"] == 0
    assert first["response"] != second["response"]


def test_two_generators_share_the_work(make_run) -> None:
    run = make_run(make_generator=lambda name: FakeGenerator(name, seconds=1.0), count=2)
    run.go()
    shares = [len(g.prompt_ids) for g in run.generators.values()]
    assert sum(shares) == 16
    assert min(shares) >= 4
    assert all(g.closed for g in run.generators.values())


# Faults


def test_when_a_generator_dies_nothing_is_lost_or_trained_twice_and_it_is_replaced(make_run) -> None:
    def make(name: str) -> FakeGenerator:
        return FakeGenerator(name, seconds=uniform_seconds(1, 5), die_at_generate=6 if name == "generator-0" else None)

    run = make_run(make_generator=make, count=2, learner=FakeLearner(max_staleness=1), ppo={"steps": 8})
    summary = run.go()
    assert sorted(run.trained_ids) == list(range(32))
    assert (summary.lost, summary.trained_twice) == (0, 0)
    assert run.generators["generator-2"].prompt_ids
    assert run.rows[-1]["generators"] == 2


def test_a_crash_loop_ends_the_run_with_its_cause(make_run) -> None:
    run = make_run(
        make_generator=lambda name: FakeGenerator(name, die_at_generate=1), max_restarts=2, max_prompt_tries=9
    )
    with pytest.raises(WorkerDiedError, match=r"generator\.max_restarts = 2") as caught:
        run.go()
    assert "fault injection" in str(caught.value.__cause__)


def test_a_scorer_that_fails_ends_the_run_with_its_error_and_closes_the_generators(make_run) -> None:
    run = make_run(scorer=FakeScorer(fail_at=6), make_reference=lambda name: FakeReference(name, seconds=3.0))
    with pytest.raises(ScorerError, match="no score for prompt"):
        run.go()
    assert all(g.closed for g in run.generators.values())


def test_a_learner_that_fails_ends_the_run_with_its_error(make_run) -> None:
    with pytest.raises(NumericalError, match="NaN in step 3"):
        make_run(learner=FakeLearner(fail_at=3)).go()


@pytest.mark.parametrize("fault", [{"parity": 0.3}, {"nan_parity_at_update": 2}])
def test_a_parity_breach_stops_the_run(make_run, fault: dict[str, Any]) -> None:
    run = make_run(make_generator=lambda name: FakeGenerator(name, **fault), ppo={"steps": 50})
    with pytest.raises(ParityError, match=r"ppo\.parity_tolerance"):
        run.go()
    assert len(run.rows) < 5


def test_a_learner_whose_versions_do_not_follow_each_other_is_refused(make_run) -> None:
    class Skipping(FakeLearner):
        async def train_step(self, batch, *, kl_coef: float) -> StepReport:
            report = await super().train_step(batch, kl_coef=kl_coef)
            return StepReport(version=report.version + 1, metrics=report.metrics)

    class Stuck(FakeLearner):
        async def publish(self) -> VersionedWeights:
            return VersionedWeights(version=0, weights={}, probe=(await super().publish()).probe)

    with pytest.raises(RlhfRayError, match="a step at version 0 made version 2"):
        make_run(learner=Skipping()).go()
    with pytest.raises(RlhfRayError, match="made version 1 and published version 0"):
        make_run(learner=Stuck()).go()


@pytest.mark.parametrize("reader", ["scorer", "reference"])
def test_a_response_that_is_lost_before_it_is_scored_is_sampled_again(
    make_run, caplog: pytest.LogCaptureFixture, reader: str
) -> None:
    lost = {2, 5, 9}

    class LosingScorer(FakeScorer):
        async def score(self, rollout: Ref) -> Score:
            prompt_id = rollout.prompt.prompt_id
            if prompt_id in lost:
                lost.remove(prompt_id)
                raise DataLostError("it went with its node")
            return await super().score(rollout)

    class LosingReference(FakeReference):
        async def logprobs(self, rollout: Ref) -> Ref:
            prompt_id = rollout.prompt.prompt_id
            if prompt_id in lost:
                lost.remove(prompt_id)
                raise DataLostError("it went with its node")
            return await super().logprobs(rollout)

    losing = {"scorer": LosingScorer()} if reader == "scorer" else {"make_reference": LosingReference}
    run = make_run(make_generator=lambda name: FakeGenerator(name, seconds=1.0), **losing, ppo={"steps": 4})
    summary = run.go()
    assert lost == set()
    assert sorted(run.trained_ids) == list(range(16))
    assert (summary.status, summary.lost, summary.trained_twice, summary.quarantined) == ("finished", 0, 0, 0)
    assert caplog.text.count("is sampled again: it went with its node") == 3


def test_a_scorer_whose_process_dies_is_replaced_and_every_response_gets_its_score(make_run) -> None:
    class Process(FakeScorer):
        node = "here"

        def __init__(self, name: str) -> None:
            super().__init__(seconds=1.0)
            self.name = name
            self.closed = False

        async def score(self, rollout: Ref) -> Score:
            if self.name == "scorer judge-0" and self.calls == 3:
                raise WorkerDiedError(f"{self.name} died (fault injection)")
            return await super().score(rollout)

        async def close(self) -> None:
            self.closed = True

    processes: list[Process] = []

    def make(name: str) -> Process:
        processes.append(Process(name))
        return processes[-1]

    pool = ScorerPool(
        worker_factory(make),
        name="judge",
        section="scorers.0",
        max_concurrent=4,
        max_restarts=1,
        max_prompt_tries=2,
    )
    summary = make_run(scorer=pool, scorer_pools=[pool]).go()
    assert [process.name for process in processes] == ["scorer judge-0", "scorer judge-1"]
    assert processes[1].calls > 3
    assert processes[1].closed
    assert (summary.status, summary.lost, summary.trained_twice, summary.quarantined) == ("finished", 0, 0, 0)


def test_a_response_that_is_lost_after_it_was_scored_ends_the_loop(make_run) -> None:
    class Losing(FakeLearner):
        async def train_step(self, batch, *, kl_coef: float) -> StepReport:
            raise DataLostError("it went with its node")

    with pytest.raises(DataLostError):
        make_run(learner=Losing()).go()


def test_cancelling_the_run_closes_the_generators(make_run) -> None:
    run = make_run(make_generator=lambda name: FakeGenerator(name, seconds=100.0))

    async def cancel() -> None:
        running = asyncio.create_task(run.pipeline.run())
        await asyncio.sleep(10)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    simulate(cancel())
    assert run.generators["generator-0"].closed


# Poison


def poisoned(name: str) -> FakeGenerator:
    return FakeGenerator(name, seconds=1.0, poison={2})


@pytest.mark.parametrize("bound", [0, 1, 2])
@pytest.mark.parametrize(
    ("faults", "cause"),
    [
        ({"make_generator": poisoned}, r"prompt 2 \('prompt 2'\) was given to 3 generators and each died; .*"),
        (
            {"make_reference": lambda name: FakeReference(name, poison={2}), "scorer": FakeScorer(seconds=1.0)},
            r"a response to prompt 2 \('prompt 2'\) was given to 3 references and each died; .*",
        ),
        (
            {"make_generator": lambda name: FakeGenerator(name, seconds=1.0, nan={2})},
            r"a log-probability of prompt 2 was NaN \(fault injection\)",
        ),
        (
            {"scorer": FakeScorer(poison={2}), "make_reference": lambda name: FakeReference(name, seconds=1.0)},
            r"fake gave nan for prompt 2 \(fault injection\)",
        ),
    ],
    ids=["generator", "reference", "log-probability", "score"],
)
def test_a_prompt_that_nobody_can_work_on_is_quarantined_and_a_fresh_one_takes_its_slot(
    make_run, faults: dict[str, Any], cause: str, bound: int
) -> None:
    run = make_run(
        **faults, max_concurrent=1, learner=FakeLearner(seconds=2.0, max_staleness=bound), ppo={"max_staleness": bound}
    )
    summary = run.go()
    assert sorted(run.trained_ids) == [i for i in range(17) if i != 2]
    assert (summary.status, summary.lost, summary.trained_twice, summary.quarantined) == ("finished", 0, 0, 1)
    (row,) = run.quarantine
    assert re.fullmatch(cause, row["cause"])
    assert row == {"prompt_id": 2, "prompt": "prompt 2", "cause": row["cause"], "step": 0}
    assert run.rows[-1]["quarantined"] == 1
    assert run.pipeline.state_dict()["ledger"]["quarantined"] == [2]
    if bound == 0:
        assert sorted(run.learner.batches[0][1]) == [0, 1, 3, 4], "the fresh prompt is one of the same batch"


def test_those_that_shared_a_worker_with_a_deadly_prompt_are_not_quarantined_with_it(make_run) -> None:
    run = make_run(make_generator=poisoned, max_concurrent=8, ppo={"steps": 3, "batch_size": 8})
    summary = run.go()
    assert [row["prompt_id"] for row in run.quarantine] == [2]
    assert (summary.status, summary.lost) == ("finished", 0)
    assert sorted(run.trained_ids) == [i for i in range(25) if i != 2]


def test_the_deaths_of_a_quarantined_prompt_do_not_use_up_the_restarts(make_run) -> None:
    poison = {2, 9, 16, 23}
    run = make_run(
        make_generator=lambda name: FakeGenerator(name, poison=poison),
        max_restarts=3,
        max_prompt_tries=3,
        ppo={"steps": 8},
    )
    summary = run.go()
    assert (summary.status, summary.quarantined) == ("finished", 4)
    assert len(run.generators) == 1 + 4 * 3
    with pytest.raises(WorkerDiedError, match=r"generator\.max_restarts = 2"):
        make_run(
            make_generator=lambda name: FakeGenerator(name, poison=poison), max_restarts=2, max_prompt_tries=3
        ).go()


def test_prompts_that_kill_at_the_same_time_or_after_another_death_are_quarantined_all_the_same(make_run) -> None:
    run = make_run(
        make_generator=lambda name: FakeGenerator(name, poison={1, 2}, die_at_generate=3 * (name == "generator-0")),
        count=2,
        max_concurrent=1,
        max_restarts=3,
        max_prompt_tries=3,
    )
    summary = run.go()
    assert (summary.status, summary.quarantined, summary.lost) == ("finished", 2, 0)
    assert sorted(run.trained_ids) == [i for i in range(18) if i not in (1, 2)]


def test_a_worker_that_died_with_many_calls_in_hand_is_pardoned_once(make_run) -> None:
    def make(name: str) -> FakeGenerator:
        return (
            FakeGenerator(name, seconds=1.0, die_at_generate=1)
            if name == "generator-0"
            else FakeGenerator(name, die_at_update=1)
        )

    run = make_run(make_generator=make, max_concurrent=8, max_restarts=3, max_prompt_tries=3, ppo={"batch_size": 8})
    with pytest.raises(WorkerDiedError, match=r"generator\.max_restarts = 3"):
        run.go()
    assert len(run.generators) == 1 + 3 + 1


def test_a_checkpoint_lets_the_deaths_before_it_be_forgotten(make_run) -> None:
    def dying(name: str) -> FakeGenerator:
        return FakeGenerator(name, die_at_generate=6)  # each, after five prompts

    def options(every: int) -> dict[str, Any]:
        ppo = {"steps": 12, "batch_size": 4, "checkpoint_every": every} | SYNCHRONOUS
        return {"make_generator": dying, "max_concurrent": 1, "ppo": ppo}

    summary = make_run(max_restarts=2, **options(every=2)).go()
    assert (summary.status, summary.lost) == ("finished", 0)
    assert summary.deaths["generator"] == 9
    with pytest.raises(WorkerDiedError, match=r"generator\.max_restarts = 2"):
        make_run(max_restarts=2, **options(every=0)).go()


def test_one_prompt_more_than_may_be_quarantined_ends_the_run_with_its_cause(make_run) -> None:
    run = make_run(scorer=FakeScorer(poison={1, 5, 9}), ppo={"max_quarantined": 2} | SYNCHRONOUS)
    with pytest.raises(
        RlhfRayError,
        match=r"prompt 9 \('prompt 9'\) is quarantined.* number 3 where ppo\.max_quarantined = 2: fake gave nan for "
        r"prompt 9 .*quarantine\.jsonl.* raise ppo\.max_quarantined",
    ) as caught:
        run.go()
    assert isinstance(caught.value.__cause__, NoScoreError)
    assert [row["prompt_id"] for row in run.quarantine] == [1, 5, 9]
    assert all(g.closed for g in run.generators.values())


def test_a_quarantined_prompt_leaves_nothing_behind_in_the_queue_and_the_stages(make_run) -> None:
    seen: list[dict[str, Any]] = []

    def look(run: Any, row: dict[str, float]) -> None:
        seen.append(run.pipeline.status())

    run = make_run(
        make_generator=lambda name: FakeGenerator(name, seconds=1.0, poison={1}),
        scorer=FakeScorer(seconds=1.0, poison={2}),
        learner=FakeLearner(seconds=1000.0),
        after_step=look,
        ppo=SYNCHRONOUS,
    )
    run.go()
    assert [status["quarantined"]["prompts"] for status in seen] == [2, 2, 2, 2]
    stages = ("waiting_for_a_generator", "being_generated", "being_scored", "finished")
    assert [seen[-1]["queue"][stage] for stage in stages] == [0, 0, 0, 0]
    assert seen[-1]["occupancy"]["generate"] == seen[-1]["occupancy"]["score"] == 0
    assert run.pipeline.state_dict()["tally"]["rollouts"] == {}


def test_a_scorer_that_cannot_be_reached_is_nobodys_poison(make_run) -> None:
    run = make_run(scorer=FakeScorer(fail_at=2, poison={0}), ppo=SYNCHRONOUS)
    with pytest.raises(ScorerError, match="no score for prompt 1") as caught:
        run.go()
    assert not isinstance(caught.value, NoScoreError)


def test_the_learner_does_not_wait_for_a_response_that_gets_no_score(make_run) -> None:
    class Late(FakeScorer):
        async def score(self, rollout: Ref) -> Score:
            await asyncio.sleep(100.0 if rollout.prompt.prompt_id == 0 else 0.0)
            return await super().score(rollout)

    run = make_run(scorer=Late(poison={0}), ppo={"steps": 6, "batch_size": 2, "max_staleness": 1})
    summary = run.go()
    assert 0 not in run.trained_ids
    assert summary.seconds == pytest.approx(100.0), "it was due at version 1, and nobody awaits it once it has failed"
    assert (summary.quarantined, summary.lost, summary.staleness_max <= 1) == (1, 0, True)


# Joining and leaving


def test_workers_join_and_leave_in_mid_run(make_run) -> None:
    run = make_run(
        make_generator=lambda name: FakeGenerator(name, seconds=uniform_seconds(1, 5)),
        learner=FakeLearner(max_staleness=1),
        max_concurrent=2,
        ppo={"steps": 12},
    )

    async def elastic() -> RunSummary:
        running = asyncio.create_task(run.pipeline.run())
        await asyncio.sleep(10)
        run.pool.want(3)
        run.reference_pool.want(2)
        await asyncio.sleep(10)
        assert run.pool.size() == 3
        assert run.reference_pool.size() == 2
        run.pool.want(1)
        run.reference_pool.want(1)
        await asyncio.sleep(6)
        assert run.pool.size() == run.reference_pool.size() == 1
        assert not running.done()
        return await running

    def ledger(run: Any) -> dict[str, Any]:
        return run.pipeline.state_dict()["ledger"]

    summary = simulate(elastic())
    assert (summary.status, summary.lost, summary.trained_twice) == ("finished", 0, 0)
    assert sorted(run.trained_ids) == list(range(48))
    assert [g.closed for g in run.generators.values()] == [True] * 3
    assert all(g.versions[0] > 0 and g.prompt_ids for name, g in run.generators.items() if name != "generator-0")
    fixed = make_run(ppo={"steps": 12})
    fixed.go()
    assert ledger(run) == ledger(fixed) == {"next_id": 48, "scored": [], "trained": [[0, 47]], "quarantined": []}


def test_without_staleness_a_pool_that_grows_and_shrinks_does_not_change_the_batches(make_run) -> None:
    def resize(run: Any, row: dict[str, float]) -> None:
        run.pool.want([3, 1, 2, 1, 3, 1][int(row["step"]) - 1])

    run = make_run(
        make_generator=lambda name: FakeGenerator(name, seconds=uniform_seconds(1, 9)),
        after_step=resize,
        ppo={"steps": 6, "batch_size": 4} | SYNCHRONOUS,
    )
    run.go()
    assert len(run.generators) > 3
    assert run.learner.batches == in_order(6, 4)


def test_a_dead_reference_is_replaced_and_nothing_is_lost(make_run) -> None:
    run = make_run(
        make_reference=lambda name: FakeReference(name, seconds=1.0, die_at=5 if name == "reference-0" else None)
    )
    summary = run.go()
    assert (summary.status, summary.lost, summary.trained_twice) == ("finished", 0, 0)
    assert sorted(run.trained_ids) == list(range(16))
    assert list(run.references) == ["reference-0", "reference-1"]
    assert all(reference.closed for reference in run.references.values())


def test_the_status_shows_the_pools_the_queue_and_where_the_time_goes(make_run) -> None:
    def scorer_pool(name: str, *, is_watched: bool) -> ScorerPool:
        options: dict[str, Any] = {"max_concurrent": 4, "max_restarts": 1, "max_prompt_tries": 2}
        factory = worker_factory(FakeReference)  # it is asked nothing
        return ScorerPool(factory, name=name, section="scorers.0", is_watched=is_watched, **options)

    run = make_run(
        scorer_pools=[scorer_pool("judge", is_watched=True), scorer_pool("served", is_watched=False)],
        make_generator=lambda name: FakeGenerator(name, seconds=4.0),
        scorer=FakeScorer(seconds=1.0),
        learner=FakeLearner(seconds=2.0),
        max_concurrent=2,
        ppo={"steps": 10, "batch_size": 4},
    )

    async def look() -> dict[str, Any]:
        running = asyncio.create_task(run.pipeline.run())
        await asyncio.sleep(22.5)  # pairs of rollouts end every 4 s and are scored for 1 s; steps begin at 9, 17, ...
        status: dict[str, Any] = run.pipeline.status()
        run.pipeline.request_stop()
        await running
        return status

    status = simulate(look())
    assert {key: status[key] for key in ("step", "steps", "version")} == {"step": 2, "steps": 10, "version": 2}
    assert status["staleness"]["bound"] == 1
    assert status["queue"] == {
        "slots_in_use": 8,
        "slots": 8,
        "waiting_for_a_generator": 4,
        "being_generated": 2,
        "being_scored": 0,
        "finished": 2,
    }
    occupancy = status["occupancy"]
    assert occupancy["generate"] == pytest.approx(1.0)
    assert occupancy["score"] == pytest.approx(5 / 22.5)
    assert occupancy["train"] == pytest.approx(4 / 22.5)
    assert status["generators"]["workers"][0]["in_hand"] == 2
    assert status["references"]["up"] == 1
    assert {name: pool["up"] for name, pool in status["scorers"].items()} == {"scorer judge": 1}, "no service's"
    assert status["quarantined"] == {"prompts": 0, "bound": 10}
    json.dumps(status, allow_nan=False)


# Stopping, checkpoints, resuming


def saved_steps(run) -> list[int]:
    return [checkpoint.step for checkpoint in run.checkpoints.marked]


def resume_from(run, checkpoint: FakeCheckpoint) -> None:
    run.learner.version = checkpoint.version
    run.pipeline.load_state_dict(checkpoint.state, checkpoint.scored)


def test_a_stop_during_a_step_finishes_it_and_writes_a_checkpoint(make_run) -> None:
    run = make_run(
        make_generator=lambda name: FakeGenerator(name, seconds=1.0),
        learner=FakeLearner(seconds=10.0, publish_seconds=1.0),
        ppo={"steps": 100},
    )

    async def stop_at(seconds: float) -> RunSummary:
        running = asyncio.create_task(run.pipeline.run())
        await asyncio.sleep(seconds)
        run.pipeline.request_stop()
        return await running

    summary = simulate(stop_at(25.0))
    assert (summary.status, summary.steps, summary.samples) == ("interrupted", 3, 12)
    assert (summary.lost, summary.trained_twice) == (0, 0)
    assert summary.seconds == pytest.approx(34.0)  # three publications and no fourth: nobody would sample from it
    assert saved_steps(run) == [3]
    assert run.generators["generator-0"].closed


def test_a_stop_while_the_learner_waits_does_not_wait_for_the_batch(make_run) -> None:
    run = make_run(make_generator=lambda name: FakeGenerator(name, hang_at_generate=1), ppo=SYNCHRONOUS)

    async def stop() -> RunSummary:
        running = asyncio.create_task(run.pipeline.run())
        await asyncio.sleep(5)
        run.pipeline.request_stop()
        return await running

    summary = simulate(stop())
    assert (summary.status, summary.steps, summary.score_first, summary.lost) == ("interrupted", 0, None, 0)
    assert summary.seconds == pytest.approx(5.0)
    assert saved_steps(run) == [0], "there is something to resume from"


def test_checkpoints_come_every_so_many_steps_and_at_the_end(make_run) -> None:
    for every, steps, expected in ((3, 7, [3, 6, 7]), (2, 4, [2, 4]), (0, 4, [4])):
        run = make_run(ppo={"steps": steps, "checkpoint_every": every})
        run.go()
        assert saved_steps(run) == expected
        assert [c.state["step"] for c in run.checkpoints.marked] == expected
        assert [c.version for c in run.checkpoints.marked] == expected


def test_training_goes_on_while_a_checkpoint_is_written_and_the_end_waits_for_it(make_run) -> None:
    def run_with(seconds: float, every: int) -> Any:
        return make_run(
            make_generator=lambda name: FakeGenerator(name, seconds=1.0),
            learner=FakeLearner(seconds=9.0),
            make_checkpoints=lambda learner: FakeCheckpoints(learner, seconds=seconds),
            ppo={"steps": 4, "checkpoint_every": every} | SYNCHRONOUS,
        )

    quick, slow, slower = run_with(0.0, 2), run_with(15.0, 2), run_with(15.0, 1)
    assert quick.go().seconds == pytest.approx(40.0)
    summary = slow.go()
    assert summary.seconds == pytest.approx(55.0)  # the first one fits into two steps, the last one is waited for
    assert summary.stage_seconds["checkpoint"] == pytest.approx(15.0)
    assert slower.go().seconds == pytest.approx(40.0 + 3 * 5.0 + 15.0)  # the next one waits for the one before
    assert (saved_steps(slow), saved_steps(slower)) == ([2, 4], [1, 2, 3, 4])


def test_a_checkpoint_that_cannot_be_written_is_reported_and_the_next_one_tried(
    make_run, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(
        make_checkpoints=lambda learner: FakeCheckpoints(learner, fail_at=2), ppo={"steps": 4, "checkpoint_every": 1}
    )
    with caplog.at_level(logging.ERROR, logger=loop.log.name):
        assert run.go().status == "finished"
    assert saved_steps(run) == [1, 3, 4]
    assert caplog.messages == [
        "the checkpoint of step 2 is missing, and training goes on: step 2 could not be written (fault injection)"
    ]


def test_without_its_last_checkpoint_a_run_has_not_ended_well(make_run) -> None:
    run = make_run(
        make_checkpoints=lambda learner: FakeCheckpoints(learner, fail_at=2), ppo={"steps": 4, "checkpoint_every": 2}
    )
    with pytest.raises(CheckpointError, match="step 4 could not be written"):
        run.go()
    assert saved_steps(run) == [2]


def test_a_resumed_run_trains_every_prompt_once_and_issues_the_interrupted_ones_again(make_run) -> None:
    ppo = {"steps": 8, "kl": {"controller": "adaptive"}}

    def controller() -> AdaptiveKL:
        return AdaptiveKL(coef=0.05, target=0.001, horizon=100)

    def stop_after_three(run: Any, row: dict[str, float]) -> None:
        if row["step"] == 3:
            run.pipeline.request_stop()

    slow = {"make_generator": lambda name: FakeGenerator(name, seconds=uniform_seconds(1, 20))}
    first = make_run(**slow, controller=controller(), after_step=stop_after_three, ppo=ppo)
    interrupted = first.go()
    (checkpoint,) = first.checkpoints.marked
    second = make_run(**slow, controller=controller(), ppo=ppo)
    resume_from(second, checkpoint)
    finished = second.go()

    assert sorted(first.trained_ids + second.trained_ids) == list(range(32))
    scored = {prompt.prompt_id for prompt in checkpoint.scored}
    assert scored, "something must have been scored and not trained"
    again = sorted(set(first.generators["generator-0"].prompt_ids) - set(first.trained_ids) - scored)
    assert again, "something must have been in flight"
    issued = second.generators["generator-0"].prompt_ids
    assert issued[: len(again)] == again
    assert sorted(issued) == sorted(set(range(32)) - set(first.trained_ids) - scored)
    assert [row["step"] for row in second.rows] == [4, 5, 6, 7, 8]
    assert second.rows[0]["kl_coef"] > first.rows[0]["kl_coef"]
    assert (finished.steps, finished.samples, finished.lost) == (8, 32, 0)
    assert finished.tokens > interrupted.tokens
    assert finished.score_first == interrupted.score_first


def test_a_resumed_run_that_needs_fewer_prompts_than_were_issued_loses_none(make_run) -> None:
    first = make_run(
        make_generator=lambda name: FakeGenerator(name, seconds=uniform_seconds(1, 20)),
        learner=FakeLearner(max_staleness=3),
        ppo={"steps": 8, "checkpoint_every": 3, "max_staleness": 3},
    )
    first.go()
    checkpoint = first.checkpoints.marked[0]
    assert checkpoint.state["ledger"]["next_id"] > 20, "more are issued than four steps need"
    second = make_run(learner=FakeLearner(max_staleness=3), ppo={"steps": 4, "max_staleness": 3})
    resume_from(second, checkpoint)
    summary = second.go()
    assert (summary.status, summary.steps, summary.lost, summary.trained_twice) == ("finished", 4, 0, 0)


def test_resuming_a_finished_run_does_nothing(make_run) -> None:
    first = make_run()
    first.go()
    second = make_run()
    resume_from(second, first.checkpoints.marked[-1])
    summary = second.go()
    assert (summary.status, summary.steps, summary.samples) == ("finished", 4, 16)
    assert second.learner.batches == []
    assert saved_steps(second) == []


def test_a_resumed_run_that_trains_at_once_on_a_batch_scored_before_issues_no_prompt_too_many(make_run) -> None:
    first = make_run(
        make_generator=lambda name: FakeGenerator(name, seconds=1.0),
        learner=FakeLearner(seconds=10.0, max_staleness=3),
        ppo={"steps": 8, "checkpoint_every": 3, "max_staleness": 3},
    )
    first.go()
    checkpoint = first.checkpoints.marked[0]
    assert len(checkpoint.scored) >= 4, "a whole batch waits"
    second = make_run(learner=FakeLearner(max_staleness=3), ppo={"steps": 8, "max_staleness": 3})
    resume_from(second, checkpoint)
    assert second.go().lost == 0
    assert second.pipeline.state_dict()["ledger"] == {
        "next_id": 32,
        "trained": [[0, 31]],
        "scored": [],
        "quarantined": [],
    }


def test_under_a_lower_bound_a_resumed_run_samples_again_what_would_be_too_stale(make_run) -> None:
    first = make_run(
        make_generator=lambda name: FakeGenerator(name, seconds=1.0),
        learner=FakeLearner(seconds=10.0),
        ppo={"steps": 8, "checkpoint_every": 3, "max_staleness": 3},
    )
    first.go()
    checkpoint = first.checkpoints.marked[0]
    scored = {prompt.prompt_id for prompt in checkpoint.scored}
    trained = set(first.trained_ids[: 3 * 4])
    second = make_run(learner=FakeLearner(max_staleness=0), ppo={"steps": 8} | SYNCHRONOUS)
    resume_from(second, checkpoint)
    summary = second.go()
    assert scored <= set(second.generators["generator-0"].prompt_ids)
    assert set(second.trained_ids) == set(range(32)) - trained
    assert (summary.lost, summary.trained_twice, summary.staleness_max) == (0, 0, 0)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_killed_and_resumed_again_and_again_a_run_trains_every_prompt_once_within_the_bound(make_run, data) -> None:
    """The process is gone without a word at any time; what is left is the newest checkpoint that was marked."""
    bound = data.draw(st.integers(0, 3), label="max_staleness")
    steps, batch = data.draw(st.integers(1, 8), label="steps"), data.draw(st.integers(1, 4), label="batch_size")
    every = data.draw(st.integers(1, 3), label="checkpoint_every")
    kills = data.draw(st.lists(st.floats(0, 60), max_size=4), label="seconds until each kill")
    slowness = data.draw(st.integers(0, 99), label="seed of the durations")
    writing = data.draw(st.floats(0, 10), label="seconds that a checkpoint takes")
    deadly = data.draw(st.sets(st.integers(0, 20), max_size=2), label="prompts that kill generators")
    scoreless = data.draw(st.sets(st.integers(0, 20), max_size=2), label="prompts whose responses get no score")
    poison = deadly | scoreless
    expected = [i for i in range(steps * batch + len(poison)) if i not in poison][: steps * batch]

    def start(checkpoint: FakeCheckpoint | None) -> Any:
        run = make_run(
            make_generator=lambda name: FakeGenerator(
                name, seconds=uniform_seconds(0, 10, seed=slowness), poison=deadly
            ),
            count=2,
            max_concurrent=1,
            max_restarts=99,
            scorer=FakeScorer(seconds=0.5, poison=scoreless),
            learner=FakeLearner(seconds=2.0, max_staleness=bound),
            make_checkpoints=lambda learner: FakeCheckpoints(learner, seconds=writing),
            ppo={"steps": steps, "batch_size": batch, "max_staleness": bound, "checkpoint_every": every},
        )
        if checkpoint is not None:
            resume_from(run, checkpoint)
        return run

    async def killed(run: Any, seconds: float) -> None:
        running = asyncio.create_task(run.pipeline.run())
        await asyncio.wait({running}, timeout=seconds)
        running.cancel()
        await asyncio.wait({running})

    newest: FakeCheckpoint | None = None
    trained: list[int] = []
    for seconds in kills:
        run = start(newest)
        simulate(killed(run, seconds))
        if run.checkpoints.marked:
            before = newest.step if newest else 0
            newest = run.checkpoints.marked[-1]
            trained += run.trained_ids[: (newest.step - before) * batch]
            held = {prompt.prompt_id for prompt in newest.scored}
            assert held.isdisjoint(trained)
            assert sorted(held) == newest.state["ledger"]["scored"]
            assert poison >= set(newest.state["ledger"]["quarantined"])
    last = start(newest)
    summary = last.go()
    trained += last.trained_ids
    assert (trained if bound == 0 else sorted(trained)) == expected
    assert summary.quarantined == len([i for i in poison if i < expected[-1]])
    if newest is not None:
        held = {prompt.prompt_id for prompt in newest.scored}
        assert held.isdisjoint({i for g in last.generators.values() for i in g.prompt_ids}), "scored once, not again"
    assert (summary.status, summary.steps, summary.samples) == ("finished", steps, steps * batch)
    assert (summary.lost, summary.trained_twice) == (0, 0)
    assert summary.staleness_max <= bound


# What is reported


def test_a_row_has_the_learners_metrics_and_the_pipelines(make_run) -> None:
    run = make_run(
        make_generator=lambda name: FakeGenerator(name, seconds=4.0, update_seconds=0.5, parity=1e-4),
        scorer=FakeScorer(seconds=1.0),
        make_reference=lambda name: FakeReference(name, seconds=2.0),
        learner=FakeLearner(seconds=3.0, publish_seconds=0.25),
        ppo={"steps": 3} | SYNCHRONOUS,
    )
    summary = run.go()
    row = run.rows[1]
    tokens = sum(r["response_length"] * 4 for r in run.rows)
    assert {"score_mean", "kl", "kl_k3", "entropy", "kl_coef"} <= set(row)
    expected = {
        "step": 2,
        "version": 2,
        "samples": 8,
        "seconds_generate": 4.0,
        "seconds_score": 1.0,
        "seconds_reference": 2.0,
        "seconds_wait": 6.5,  # the weight update, then a rollout, then the slower of its two readers
        "seconds_train": 3.0,
        "seconds_publish": 0.25,
        "seconds_step": 9.75,
        "seconds_sync": 0.5,
        "samples_per_second": 4 / 9.75,
        "tokens_per_second": row["response_length"] * 4 / 9.75,
        "parity_max": 1e-4,
        "slots_in_use": 4,
        "generators": 1,
    }
    assert {key: row[key] for key in expected} == pytest.approx(expected)
    totals = asdict(summary)
    assert totals.pop("deaths") == {}
    assert totals.pop("stage_seconds") == pytest.approx(
        {
            "wait": 19.5,
            "train": 9.0,
            "publish": 0.5,
            "checkpoint": 0.0,
            "generate": 4.0,
            "score": 1.0,
            "reference": 2.0,
            "sync": 0.5,
        }
    )
    assert totals == pytest.approx(
        {
            "status": "finished",
            "steps": 3,
            "samples": 12,
            "tokens": tokens,
            "seconds": 29.25,
            "samples_per_second": 12 / 28.5,
            "tokens_per_second": tokens / 28.5,
            "score_first": run.rows[0]["score_mean"],
            "score_last": run.rows[2]["score_mean"],
            "kl_last": run.rows[2]["kl"],
            "staleness_mean": 0.0,
            "staleness_max": 0,
            "sampler_parity_max": 1e-4,
            "skipped": 0,
            "lost": 0,
            "trained_twice": 0,
            "quarantined": 0,
        }
    )


def test_deaths_are_counted_by_kind_in_rows_status_and_summary(make_run) -> None:
    def make(name: str) -> FakeGenerator:
        return FakeGenerator(name, seconds=1.0, die_at_generate=5 if name == "generator-0" else None)

    seen: list[Any] = []
    run = make_run(
        make_generator=make,
        after_step=lambda run, row: seen.append(run.pipeline.status()["deaths"]),
        ppo={"steps": 4} | SYNCHRONOUS,
    )
    assert run.go().deaths == {"generator": 1}
    assert [row["deaths"] for row in run.rows] == [0, 1, 1, 1]
    assert seen == [{}, *[{"generator": 1}] * 3]


def test_the_learners_sample_rows_are_passed_on(make_run) -> None:
    run = make_run(ppo={"steps": 2} | SYNCHRONOUS)
    run.go()
    assert [row["prompt"] for row in run.samples] == ["prompt 0", "prompt 1", "prompt 4", "prompt 5"]


def test_the_kl_controller_learns_from_each_step_but_a_skipped_one(make_run) -> None:
    seen: list[tuple[float, int]] = []

    class Watching(AdaptiveKL):
        def update(self, kl: float, samples: int) -> None:
            seen.append((kl, samples))
            super().update(kl, samples)

    run = make_run(controller=Watching(coef=0.05, target=1e-6, horizon=10), learner=FakeLearner(skip_at=2))
    summary = run.go()
    assert summary.skipped == 1
    assert [samples for _, samples in seen] == [4, 4, 4]
    assert not any(math.isnan(kl) for kl, _ in seen)
    assert [row["kl_coef"] for row in run.rows] == pytest.approx([0.05, 0.054, 0.054, 0.05832])


def test_what_was_sampled_must_agree_with_the_learner(make_run) -> None:
    run = make_run(learner=FakeLearner(sampler_gap=1e-3), parity_tolerance=1e-3)
    assert run.go().status == "finished"
    run = make_run(learner=FakeLearner(sampler_gap=2e-3), parity_tolerance=1e-3)
    with pytest.raises(ParityError, match=r"over a batch, the generators and the learner differ by 0\.002 nats"):
        run.go()
    assert len(run.learner.batches) == 1


def test_a_long_wait_says_what_is_waited_for(make_run, caplog: pytest.LogCaptureFixture) -> None:
    def make(name: str) -> FakeGenerator:
        return FakeGenerator(name, seconds=lambda i: 25.0 if i == 1 else 1.0)

    run = make_run(make_generator=make, max_concurrent=2, ppo={"steps": 1} | SYNCHRONOUS)
    with caplog.at_level(logging.INFO, logger=loop.log.name):
        run.go()
    assert [record.message for record in caplog.records] == [
        f"the learner has waited {seconds} s for a batch: prompts: 1 being generated, 3 finished of a batch of 4; "
        "generators: generator-0 ready"
        for seconds in (10, 20)
    ]


# Any weather


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_dies_joins_or_dawdles_every_prompt_is_trained_once_within_the_bound(make_run, data) -> None:
    bound = data.draw(st.integers(0, 3), label="max_staleness")
    steps, batch = data.draw(st.integers(1, 6), label="steps"), data.draw(st.integers(1, 4), label="prompts a batch")
    completions = data.draw(st.integers(1, 3), label="completions")
    calls = st.none() | st.integers(1, 6)
    deaths = data.draw(st.lists(st.tuples(calls, calls), max_size=4), label="(die_at_generate, die_at_update)")
    slowness = data.draw(st.integers(0, 99), label="seed of the durations")
    sizes = data.draw(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 4)), max_size=4), label="(after, wanted)")

    class Watched(FakeGenerator):
        async def generate(self, prompt):
            assert self.version == newest[-1], "it was given a prompt before it acknowledged the newest version"
            return await super().generate(prompt)

    class Publishing(FakeLearner):
        async def publish(self) -> VersionedWeights:
            published = await super().publish()
            newest.append(published.version)
            return published

    def make(name: str) -> FakeGenerator:
        number = int(name.removeprefix("generator-"))
        generate, update = deaths[number] if number < len(deaths) else (None, None)
        seconds = uniform_seconds(0, 10, seed=slowness)
        return Watched(name, seconds=seconds, update_seconds=number % 3, die_at_generate=generate, die_at_update=update)

    newest: list[int] = []
    run = make_run(
        make_generator=make,
        count=data.draw(st.integers(1, 3), label="generators"),
        max_concurrent=data.draw(st.integers(1, 4), label="max_concurrent"),
        max_restarts=9,
        max_prompt_tries=9,
        start_seconds=1.0,
        scorer=FakeScorer(seconds=0.5),
        learner=Publishing(seconds=2.0, max_staleness=bound),
        prompts=FakePrompts(completions=completions),
        ppo={
            "steps": steps,
            "batch_size": batch * completions,
            "completions": completions,
            "max_staleness": bound,
        },
    )

    async def with_sizes() -> RunSummary:
        running = asyncio.create_task(run.pipeline.run())
        for seconds, number in sizes:
            await asyncio.wait({running}, timeout=seconds)
            if not running.done():
                run.pool.want(number)
                run.reference_pool.want(number)
        return await running

    summary = simulate(with_sizes())
    assert sorted(run.trained_ids) == sorted([*range(steps * batch)] * completions)
    assert all(len(ids) == batch * completions and len(set(ids)) == batch for _, ids in run.learner.batches)
    assert (summary.status, summary.lost, summary.trained_twice) == ("finished", 0, 0)
    assert summary.staleness_max == max(run.learner.stalenesses) <= bound
    if bound == 0:
        assert [(version, ids[::completions]) for version, ids in run.learner.batches] == in_order(steps, batch)
    assert all(g.closed for g in run.generators.values())


# Several scorers


def test_the_parts_of_a_sum_are_logged_apart_and_one_score_has_none(make_run) -> None:
    class Ten:
        async def score(self, rollout: Ref) -> Score:
            return Score(value=10.0, raw=10.0, reward_version="ten")

    run = make_run(scorer=WeightedScorer({"fake": (1.0, FakeScorer()), "ten": (0.5, Ten())}))
    run.go()
    for row in run.rows:
        assert row["score_ten_mean"] == 10
        assert row["score_mean"] == pytest.approx(row["score_fake_mean"] + 5)
    assert run.samples
    for sample in run.samples:
        assert sample["score_parts"]["ten"] == 10
        assert sample["score"] == pytest.approx(sample["score_parts"]["fake"] + 5)

    alone = make_run(scorer=WeightedScorer({"fake": (1.0, FakeScorer())}))
    alone.go()
    plain = make_run()
    plain.go()
    assert (alone.rows, alone.samples) == (plain.rows, plain.samples)
