"""The fakes behave as their protocols say, and the simulated clock as a clock."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

import numpy as np
import pytest

from rlhf_ray.errors import NumericalError, ScorerError, StalenessError, WorkerDiedError
from rlhf_ray.interfaces import Generator, Learner, Reference, Scorer
from rlhf_ray.testing import (
    FakeGenerator,
    FakeLearner,
    FakePrompts,
    FakeReference,
    FakeScorer,
    simulate,
    uniform_seconds,
)
from rlhf_ray.types import ExperienceRefs, Probe, Rollout, VersionedWeights

generator: Generator = FakeGenerator()
reference: Reference = FakeReference()
scorer: Scorer = FakeScorer()
learner: Learner = FakeLearner()


def published(version: int) -> VersionedWeights:
    return VersionedWeights(version=version, weights={}, probe=Probe(token_ids=(1,), logprobs=()))


async def rollout_of(generator: FakeGenerator, prompt_id: int) -> Rollout:
    ((_, rollout),) = await generator.generate(FakePrompts().prompt(prompt_id))
    assert isinstance(rollout, Rollout)
    return rollout


async def experience(prompt_id: int, version: int = 0) -> ExperienceRefs:
    generator = FakeGenerator()
    await generator.update_weights(published(version))
    ((receipt, rollout),) = await generator.generate(FakePrompts().prompt(prompt_id))
    ref_logprobs = await FakeReference().logprobs(rollout)
    return ExperienceRefs(
        receipt=receipt, score=await FakeScorer().score(rollout), rollout=rollout, ref_logprobs=ref_logprobs
    )


def test_simulated_hours_take_no_time_and_keep_their_order() -> None:
    async def three_sleepers() -> tuple[list[int], float]:
        woken: list[int] = []

        async def sleeper(hours: int) -> None:
            await asyncio.sleep(hours * 3600)
            woken.append(hours)

        await asyncio.gather(*(sleeper(h) for h in (30, 1, 20)))
        return woken, asyncio.get_running_loop().time()

    woken, clock = simulate(three_sleepers())
    assert woken == [1, 20, 30]
    assert clock == pytest.approx(30 * 3600)


def test_a_deadlock_is_an_error_and_not_a_hang() -> None:
    async def wait_for_nobody() -> None:
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="deadlock"):
        simulate(wait_for_nobody())


def test_the_same_prompt_and_policy_give_the_same_response() -> None:
    async def sample_twice() -> list[Rollout]:
        rollouts = []
        for _ in range(2):
            generator = FakeGenerator()
            await generator.update_weights(published(1))
            rollouts.append(await rollout_of(generator, 5))
        await generator.update_weights(published(2))
        return [*rollouts, await rollout_of(generator, 5)]

    first, second, under_the_next_policy = simulate(sample_twice())
    assert first == second
    assert first.response_ids != under_the_next_policy.response_ids


def test_a_rollout_under_way_goes_on_under_newer_weights() -> None:
    async def update_meanwhile() -> Rollout:
        generator = FakeGenerator(seconds=10.0)
        await generator.update_weights(published(3))
        under_way = asyncio.create_task(rollout_of(generator, 0))
        await asyncio.sleep(5)
        await generator.update_weights(published(4))
        return await under_way

    versions = simulate(update_meanwhile()).policy_versions
    assert set(versions) == {3, 4}
    assert list(versions) == sorted(versions)


def test_a_death_takes_every_call_under_way_with_it_and_every_later_one() -> None:
    async def die_at_the_third() -> list[object]:
        generator = FakeGenerator(seconds=10.0, die_at_generate=3)
        await generator.update_weights(published(0))
        outcomes = await asyncio.gather(*(rollout_of(generator, i) for i in range(3)), return_exceptions=True)
        later = await asyncio.gather(generator.update_weights(published(1)), return_exceptions=True)
        return [*outcomes, *later]

    assert [type(o) for o in simulate(die_at_the_third())] == [WorkerDiedError] * 4


def test_a_hung_call_ends_only_with_its_worker() -> None:
    async def hang() -> None:
        generator = FakeGenerator(hang_at_generate=1)
        await generator.update_weights(published(0))
        hung = asyncio.create_task(rollout_of(generator, 0))
        await asyncio.sleep(1)
        assert (await rollout_of(generator, 1)).prompt.prompt_id == 1
        await asyncio.sleep(1e6)
        assert not hung.done()
        generator.kill()
        with pytest.raises(WorkerDiedError):
            await hung

    simulate(hang())


def test_nan_parity_comes_at_the_update_asked_for() -> None:
    async def update_thrice() -> list[float]:
        generator = FakeGenerator(nan_parity_at_update=2, parity=0.5)
        return [(await generator.update_weights(published(v))).parity_max for v in range(3)]

    first, second, third = simulate(update_thrice())
    assert (first, third) == (0.5, 0.5)
    assert math.isnan(second)


def test_the_reference_finds_each_token_a_little_less_likely() -> None:
    row = simulate(experience(0))
    assert row.ref_logprobs.dtype == np.float32
    np.testing.assert_allclose(np.asarray(row.rollout.rollout_logprobs) - row.ref_logprobs, 0.01, atol=1e-6)


def test_the_scorer_fails_at_the_call_asked_for() -> None:
    async def score_twice() -> None:
        scorer, rollout = FakeScorer(fail_at=2), (await experience(0)).rollout
        await scorer.score(rollout)
        with pytest.raises(ScorerError):
            await scorer.score(rollout)

    simulate(score_twice())


def test_the_learner_reports_what_it_was_given_and_refuses_what_is_too_old() -> None:
    async def train() -> None:
        learner = FakeLearner(max_staleness=0, fail_at=2)
        batch = [await experience(i) for i in (4, 9)]
        report = await learner.train_step(batch, kl_coef=0.25)
        assert (report.version, learner.version, learner.batches) == (1, 1, [(0, [4, 9])])
        assert report.metrics["kl"] == pytest.approx(0.01 * report.metrics["response_length"], rel=1e-4)
        assert report.metrics["kl_coef"] == 0.25
        with pytest.raises(StalenessError):
            await learner.train_step(batch, kl_coef=0.25)
        with pytest.raises(NumericalError):
            await learner.train_step([await experience(0, version=1)], kl_coef=0.25)

    simulate(train())


def test_the_learner_saves_loads_and_exports_its_version(tmp_path: Path) -> None:
    async def save_and_load() -> int:
        learner = FakeLearner()
        learner.version = 7
        await learner.save(tmp_path / "checkpoint")
        await learner.export(tmp_path / "policy")
        return await FakeLearner().load(tmp_path / "checkpoint")

    assert simulate(save_and_load()) == 7
    assert '"version": 7' in (tmp_path / "policy" / "config.json").read_text()


def test_uniform_seconds_are_the_same_for_the_same_seed() -> None:
    draws = [uniform_seconds(2, 5, seed=seed)(prompt_id) for seed in (0, 0, 1) for prompt_id in range(50)]
    assert draws[:50] == draws[50:100] != draws[100:]
    assert min(draws) >= 2
    assert max(draws) <= 5
    assert len(set(draws[:50])) == 50
