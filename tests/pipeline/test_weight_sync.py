"""Weight sync: a generator that computes with the wrong weights is caught, and old weights are let go."""

from __future__ import annotations

import asyncio
import gc
import math
import weakref

import pytest

from rlhf_ray.errors import ParityError
from rlhf_ray.pipeline.pool import GeneratorPool
from rlhf_ray.pipeline.weight_sync import WeightSync
from rlhf_ray.testing import FakeGenerator, FakeLearner, FakePrompts, simulate, worker_factory
from rlhf_ray.types import VersionedWeights, WeightAck


def ack(parity: float, *, seconds: float = 0.0) -> WeightAck:
    return WeightAck(generator="generator-0", version=3, seconds=seconds, parity_max=parity)


def a_pool(count: int = 1) -> GeneratorPool:
    return GeneratorPool(
        worker_factory(FakeGenerator), count=count, max_concurrent=4, max_restarts=0, max_prompt_tries=1
    )


def test_a_gap_above_the_tolerance_names_the_causes_and_the_knob() -> None:
    sync = WeightSync(a_pool(), FakeLearner(), tolerance=1e-3)
    with pytest.raises(ParityError, match=r"differ by 0\.4 nats") as caught:
        sync.accept(ack(0.4))
    for word in ("generator-0", "version 3", "ppo.parity_tolerance is 0.001", "lm_head", "prefix cache", "temperature"):
        assert word in str(caught.value)


def test_nan_is_a_breach_too() -> None:
    with pytest.raises(ParityError, match="differ by NaN"):
        WeightSync(a_pool(), FakeLearner(), tolerance=1e9).accept(ack(math.nan))


def test_what_was_sampled_is_held_to_the_tolerance_too() -> None:
    sync = WeightSync(a_pool(), FakeLearner(), tolerance=1e-3)
    sync.check_rollouts(None, version=3)
    sync.check_rollouts(1e-3, version=3)
    for gap, shown in ((0.4, r"0\.4 nats"), (math.nan, "NaN")):
        with pytest.raises(ParityError, match=f"over a batch, the generators .* differ by {shown} .* version 3"):
            sync.check_rollouts(gap, version=3)


def test_the_largest_gap_and_the_slowest_update_are_kept() -> None:
    sync = WeightSync(a_pool(), FakeLearner(), tolerance=1e-3)
    assert sync.collect_metrics() == {}
    sync.accept(ack(2e-4, seconds=0.5))
    sync.accept(ack(1e-4, seconds=0.75))
    assert sync.collect_metrics() == {"parity_max": 2e-4, "seconds_sync": 0.75}
    sync.accept(ack(1e-5))
    assert sync.collect_metrics()["parity_max"] == 1e-5
    assert sync.parity_max == 2e-4


def test_every_generator_gets_the_published_version() -> None:
    async def publish_twice() -> list[int]:
        learner, pool = FakeLearner(), a_pool(count=2)
        sync = WeightSync(pool, learner, tolerance=1e-3)
        versions = [await sync.publish()]
        async with asyncio.TaskGroup() as group:
            pool.start(group)
            learner.version = 1
            versions.append(await sync.publish())
            ((receipt, _),) = await pool.generate(FakePrompts().prompt(0))
            await pool.close()
        return [*versions, receipt.oldest_version]

    assert simulate(publish_twice()) == [0, 1, 1]


def test_only_the_newest_weights_are_kept_alive() -> None:
    class Weights(dict):  # type: ignore[type-arg]
        """A plain dict cannot be watched."""

    watched: list[weakref.ref[Weights]] = []

    class Publisher(FakeLearner):
        async def publish(self) -> VersionedWeights:
            weights = Weights()
            watched.append(weakref.ref(weights))
            probe = (await super().publish()).probe
            return VersionedWeights(version=self.version, weights=weights, probe=probe)

    async def publish_thrice() -> list[bool]:
        learner, pool = Publisher(), a_pool()
        sync = WeightSync(pool, learner, tolerance=1e-3)
        async with asyncio.TaskGroup() as group:
            pool.start(group)
            for learner.version in range(3):
                await sync.publish()
                await pool.generate(FakePrompts().prompt(0))
            gc.collect()
            alive = [weights() is not None for weights in watched]
            await pool.close()
        return alive

    assert simulate(publish_thrice()) == [False, False, True]
