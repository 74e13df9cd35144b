"""The pool: who may be given prompts, and what becomes of them when a worker dies, joins or leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.errors import ModelError, PromptError, RlhfRayError, StalenessError, WorkerDiedError
from rlhf_ray.pipeline.pool import GeneratorPool, ReferencePool
from rlhf_ray.pipeline.workers import WorkerState, advance
from rlhf_ray.testing import FakeGenerator, FakePrompts, FakeReference, simulate, uniform_seconds, worker_factory
from rlhf_ray.types import Probe, VersionedWeights, WeightAck

Made = dict[str, FakeGenerator]
Scenario = Callable[[GeneratorPool, Made], Awaitable[None]]

LIVING = (WorkerState.STARTING, WorkerState.STALE, WorkerState.READY, WorkerState.DRAINING)


def published(version: int) -> VersionedWeights:
    return VersionedWeights(version=version, weights={}, probe=Probe(token_ids=(1, 2), logprobs=(-1.0,)))


def accept(ack: WeightAck) -> None:
    """Every acknowledgement is fine."""


def in_pool(
    scenario: Scenario,
    make: Callable[[str], FakeGenerator] = FakeGenerator,
    *,
    count: int = 1,
    max_concurrent: int = 4,
    max_restarts: int = 3,
    max_prompt_tries: int = 3,
    shrink_to: int | None = None,
) -> Made:
    """Play a scenario on a pool that has version 0; returns the generators that were made, by name."""
    made: Made = {}

    def remember(name: str) -> FakeGenerator:
        made[name] = make(name)
        return made[name]

    async def play() -> None:
        pool = GeneratorPool(
            worker_factory(remember),
            count=count,
            max_concurrent=max_concurrent,
            max_restarts=max_restarts,
            max_prompt_tries=max_prompt_tries,
            shrink_to=shrink_to,
        )
        async with asyncio.TaskGroup() as group:
            pool.update_all(published(0), accept)
            pool.start(group)
            await scenario(pool, made)
            await pool.close()

    simulate(play())
    return made


async def generate(pool: GeneratorPool, *prompt_ids: int) -> list[str]:
    """Names of the generators that the prompts ended on."""
    outcomes = await asyncio.gather(*(pool.generate(FakePrompts().prompt(i)) for i in prompt_ids))
    return [receipt.generator for ((receipt, _),) in outcomes]


def failing_in_pool(scenario: Scenario, make: Callable[[str], FakeGenerator], **options: int) -> BaseException:
    with pytest.raises(BaseExceptionGroup) as caught:
        in_pool(scenario, make, **options)
    return caught.value.exceptions[0]


# The state machine


def test_a_life_runs_from_starting_to_gone() -> None:
    life = (WorkerState.STARTING, WorkerState.STALE, WorkerState.READY, WorkerState.STALE, WorkerState.READY)
    for now, to in pairwise((*life, WorkerState.DRAINING, WorkerState.GONE)):
        assert advance(now, to) is to


def test_a_worker_cannot_serve_before_it_has_the_newest_policy() -> None:
    allowed = [now for now in WorkerState if _can(now, WorkerState.READY)]
    assert allowed == [WorkerState.STALE]


def test_every_living_worker_can_die_and_nobody_comes_back() -> None:
    for state in LIVING:
        assert advance(state, WorkerState.DEAD) is WorkerState.DEAD
    for ended in (WorkerState.GONE, WorkerState.DEAD):
        assert not any(_can(ended, to) for to in WorkerState)


@given(st.lists(st.sampled_from(WorkerState), max_size=30))
def test_any_attempted_life_ends_for_good_and_is_ready_only_after_stale(wishes: list[WorkerState]) -> None:
    lived = [WorkerState.STARTING]
    for wish in wishes:
        if _can(lived[-1], wish):
            lived.append(wish)
    for before, after in pairwise(lived):
        assert before in LIVING
        assert after is not WorkerState.STARTING
        assert before is WorkerState.STALE or after is not WorkerState.READY
        assert before is WorkerState.DRAINING or after is not WorkerState.GONE


def _can(now: WorkerState, to: WorkerState) -> bool:
    try:
        advance(now, to)
    except RlhfRayError:
        return False
    return True


# Giving out prompts


def test_prompts_go_to_the_least_loaded_generator() -> None:
    async def four_prompts(pool: GeneratorPool, made: Made) -> None:
        assert sorted(await generate(pool, 0, 1, 2, 3)) == ["generator-0"] * 2 + ["generator-1"] * 2

    in_pool(four_prompts, lambda name: FakeGenerator(name, seconds=1.0), count=2)


def test_no_generator_gets_more_prompts_than_it_may_work_on_and_the_queue_keeps_its_order() -> None:
    running: list[int] = []

    class Counting(FakeGenerator):
        async def generate(self, prompt):  # type: ignore[no-untyped-def]
            running.append(prompt.prompt_id)
            assert len(running) <= 2
            try:
                return await super().generate(prompt)
            finally:
                running.remove(prompt.prompt_id)

    async def seven_prompts(pool: GeneratorPool, made: Made) -> None:
        await generate(pool, *range(7))
        assert made["generator-0"].prompt_ids == list(range(7))

    in_pool(seven_prompts, lambda name: Counting(name, seconds=1.0), max_concurrent=2)


def test_a_cancelled_prompt_leaves_its_place_to_the_next() -> None:
    async def cancel_those_waiting(pool: GeneratorPool, made: Made) -> None:
        first, second, third = (asyncio.create_task(generate(pool, i)) for i in range(3))
        await asyncio.sleep(0.5)
        second.cancel()
        await asyncio.gather(first, third)
        assert made["generator-0"].prompt_ids == [0, 2]

    in_pool(cancel_those_waiting, lambda name: FakeGenerator(name, seconds=1.0), max_concurrent=1)


def test_a_prompt_cancelled_in_the_moment_it_is_called_passes_the_call_on() -> None:
    asked: list[asyncio.Task[object]] = []

    class Cancelling(FakeGenerator):
        async def generate(self, prompt):  # type: ignore[no-untyped-def]
            outcome = await super().generate(prompt)
            if prompt.prompt_id == 0:  # runs after prompt 1 is called and before it hears of it
                asyncio.get_running_loop().call_soon(asked[1].cancel)
            return outcome

    async def cancel_the_called(pool: GeneratorPool, made: Made) -> None:
        asked.extend(asyncio.create_task(pool.generate(FakePrompts().prompt(i))) for i in range(3))
        await asyncio.gather(*asked, return_exceptions=True)
        assert asked[1].cancelled()
        assert made["generator-0"].prompt_ids == [0, 2]

    in_pool(cancel_the_called, lambda name: Cancelling(name, seconds=1.0), max_concurrent=1)


# Versions


def test_a_generator_gets_no_prompt_until_it_has_acknowledged_the_newest_version() -> None:
    async def publish_and_ask(pool: GeneratorPool, made: Made) -> None:
        await generate(pool, 0)
        admissions: list[tuple[int, int]] = []
        pool.update_all(published(1), accept)
        assert pool.states() == {"generator-0": WorkerState.STALE}
        await pool.generate(FakePrompts().prompt(1), on_admit=lambda i, v: admissions.append((i, v)))
        assert admissions == [(1, 1)]

    in_pool(publish_and_ask, lambda name: FakeGenerator(name, update_seconds=5.0))


def test_a_slow_weight_update_holds_up_nobody_else() -> None:
    def make(name: str) -> FakeGenerator:
        return FakeGenerator(name, update_seconds=1000.0 if name == "generator-0" else 1.0)

    async def ask_at_once(pool: GeneratorPool, made: Made) -> None:
        assert await generate(pool, 0, 1, 2) == ["generator-1"] * 3
        assert asyncio.get_running_loop().time() < 10
        assert pool.states()["generator-0"] is WorkerState.STALE

    in_pool(ask_at_once, make, count=2)


def test_versions_published_during_an_update_are_skipped_but_the_last() -> None:
    async def publish_thrice(pool: GeneratorPool, made: Made) -> None:
        await generate(pool, 0)
        pool.update_all(published(1), accept)
        await asyncio.sleep(1)
        pool.update_all(published(2), accept)
        pool.update_all(published(3), accept)
        await generate(pool, 1)
        assert made["generator-0"].versions == [0, 1, 3]

    in_pool(publish_thrice, lambda name: FakeGenerator(name, update_seconds=5.0))


def test_a_joining_worker_loads_the_newest_version_first() -> None:
    async def join_late(pool: GeneratorPool, made: Made) -> None:
        await generate(pool, 0)
        pool.update_all(published(4), accept)
        pool.want(2)
        await generate(pool, *range(1, 5))
        assert made["generator-1"].versions == [4]
        assert pool.size() == 2

    in_pool(join_late, lambda name: FakeGenerator(name, seconds=1.0))


def test_an_acknowledgement_of_another_version_ends_the_run() -> None:
    class Liar(FakeGenerator):
        async def update_weights(self, published: VersionedWeights) -> WeightAck:
            return WeightAck(generator=self.name, version=published.version + 1, seconds=0.0, parity_max=0.0)

    async def ask(pool: GeneratorPool, made: Made) -> None:
        await generate(pool, 0)

    error = failing_in_pool(ask, Liar)
    assert isinstance(error, StalenessError)
    assert "generator-0 was sent version 0 and acknowledged 1" in str(error)


# Death


def test_prompts_of_a_dead_generator_are_issued_again_and_it_is_replaced() -> None:
    def make(name: str) -> FakeGenerator:
        return FakeGenerator(name, seconds=1.0, die_at_generate=3 if name == "generator-0" else None)

    async def ask(pool: GeneratorPool, made: Made) -> None:
        assert await generate(pool, 0, 1, 2) == ["generator-1"] * 3
        assert pool.states() == {"generator-1": WorkerState.READY}
        assert made["generator-0"].closed, "what the dead worker held must be freed"

    in_pool(ask, make)


def test_the_caller_learns_of_each_admission_and_each_withdrawal() -> None:
    events: list[tuple[str, int]] = []

    async def ask(pool: GeneratorPool, made: Made) -> None:
        pool.update_all(published(2), accept)
        await pool.generate(
            FakePrompts().prompt(0),
            on_admit=lambda i, version: events.append(("admit", version)),
            on_withdraw=lambda i: events.append(("withdraw", i)),
        )

    in_pool(ask, lambda name: FakeGenerator(name, die_at_generate=1 if name == "generator-0" else None))
    assert events == [("admit", 2), ("withdraw", 0), ("admit", 2)]


def test_an_issued_again_prompt_goes_before_those_that_wait() -> None:
    def make(name: str) -> FakeGenerator:
        return FakeGenerator(name, seconds=1.0, die_at_generate=1 if name == "generator-0" else None)

    async def ask(pool: GeneratorPool, made: Made) -> None:
        await generate(pool, 0, 1, 2)
        assert made["generator-1"].prompt_ids == [0, 1, 2]

    in_pool(ask, make, max_concurrent=1)


def test_a_worker_that_dies_in_a_weight_update_is_replaced() -> None:
    async def ask(pool: GeneratorPool, made: Made) -> None:
        assert await generate(pool, 0) == ["generator-1"]

    in_pool(ask, lambda name: FakeGenerator(name, die_at_update=1 if name == "generator-0" else None))


def test_a_crash_loop_ends_with_the_cause_once_the_restarts_are_used_up() -> None:
    async def ask(pool: GeneratorPool, made: Made) -> None:
        await generate(pool, 0)

    error = failing_in_pool(ask, lambda name: FakeGenerator(name, die_at_update=1), max_restarts=2)
    assert isinstance(error, WorkerDiedError)
    assert "generator-2 died" in str(error)
    assert "generator.max_restarts = 2" in str(error)
    assert "fault injection" in str(error.__cause__)


def test_a_prompt_that_kills_every_worker_is_named() -> None:
    async def ask(pool: GeneratorPool, made: Made) -> None:
        await generate(pool, 7)

    error = failing_in_pool(
        ask, lambda name: FakeGenerator(name, die_at_generate=1), max_restarts=9, max_prompt_tries=2
    )
    assert type(error) is PromptError
    assert "prompt 7 ('prompt 7') was given to 2 generators and each died" in str(error)
    assert isinstance(error.__cause__, WorkerDiedError)


def test_a_last_try_is_given_a_worker_of_its_own_before_others_begin() -> None:
    async def ask(pool: GeneratorPool, made: Made) -> None:
        order: list[int] = []

        async def one(prompt_id: int) -> None:
            await generate(pool, prompt_id)
            order.append(prompt_id)

        async with asyncio.TaskGroup() as calls:
            for prompt_id in range(40):
                calls.create_task(one(prompt_id))
            await asyncio.sleep(1)
            victims = list(made["generator-0"].prompt_ids)
            made["generator-0"].kill()
        assert len(victims) == 2
        assert sorted(order[2:4]) == victims, "after the two that the other worker had"

    def make(name: str) -> FakeGenerator:
        never = 0.0 if name != "generator-2" else 1e6  # the replacement does not come up in time
        return FakeGenerator(name, seconds=uniform_seconds(3, 9), update_seconds=never)

    in_pool(ask, make, count=2, max_concurrent=2, max_prompt_tries=2)


def test_a_worker_that_cannot_be_made_ends_the_run() -> None:
    def make(name: str) -> FakeGenerator:
        raise ModelError("no such model")

    async def ask(pool: GeneratorPool, made: Made) -> None:
        await generate(pool, 0)

    assert str(failing_in_pool(ask, make)) == "no such model"


# Growing and shrinking


def test_a_pool_grows_to_what_is_wanted_and_shrinks_back() -> None:
    async def grow_and_shrink(pool: GeneratorPool, made: Made) -> None:
        pool.want(3)
        assert sorted(set(await generate(pool, *range(6)))) == ["generator-0", "generator-1", "generator-2"]
        pool.want(1)
        await generate(pool, 6)
        assert pool.states() == {"generator-0": WorkerState.READY}
        assert [g.closed for g in made.values()] == [False, True, True]

    in_pool(grow_and_shrink, lambda name: FakeGenerator(name, seconds=1.0))


def test_a_leaving_worker_finishes_what_it_has_and_is_closed() -> None:
    async def drain_one(pool: GeneratorPool, made: Made) -> None:
        under_way = asyncio.create_task(generate(pool, 0, 1))
        await asyncio.sleep(0.5)
        pool.want(1)
        await asyncio.sleep(0.1)
        assert pool.states()["generator-1"] is WorkerState.DRAINING
        assert await generate(pool, 2, 3) == ["generator-0"] * 2
        assert sorted(await under_way) == ["generator-0", "generator-1"]
        assert made["generator-1"].closed
        assert pool.states() == {"generator-0": WorkerState.READY}

    in_pool(drain_one, lambda name: FakeGenerator(name, seconds=1.0), count=2)


def test_the_least_busy_leave_first() -> None:
    async def shrink(pool: GeneratorPool, made: Made) -> None:
        busy = [asyncio.create_task(generate(pool, i)) for i in (0, 1, 2)]
        await asyncio.sleep(4)  # prompts 0 and 2 are still under way
        pool.want(2)
        await asyncio.sleep(0.1)
        assert sorted(pool.states()) == ["generator-0", "generator-2"]
        await asyncio.gather(*busy)

    in_pool(shrink, lambda name: FakeGenerator(name, seconds=lambda i: 1.0 if i == 1 else 9.0), count=3)


def test_a_worker_that_is_still_starting_leaves_before_one_that_serves_and_what_it_began_is_freed() -> None:
    freed: list[str] = []

    async def play() -> None:
        async def factory(name: str) -> FakeGenerator:
            try:
                await asyncio.sleep(0 if name == "generator-0" else 1e6)  # the others wait for a place
            except asyncio.CancelledError:
                freed.append(name)
                raise
            return FakeGenerator(name)

        pool = GeneratorPool(factory, count=2, max_concurrent=4, max_restarts=0, max_prompt_tries=1)
        async with asyncio.TaskGroup() as group:
            pool.update_all(published(0), accept)
            pool.start(group)
            await asyncio.sleep(5)
            assert await generate(pool, 0) == ["generator-0"], "one that has no place holds nobody up"
            pool.want(1)
            await asyncio.sleep(1)
            assert pool.states() == {"generator-0": WorkerState.READY}
            assert freed == ["generator-1"]
            pool.want(2)
            pool.want(1)
            await asyncio.sleep(1)
            assert pool.states() == {"generator-0": WorkerState.READY}
            assert freed == ["generator-1"], "generator-2 was not even begun"
            await pool.close()

    simulate(play())


def test_a_worker_that_dies_while_leaving_is_not_replaced_and_its_prompt_is_issued_again() -> None:
    async def die_while_draining(pool: GeneratorPool, made: Made) -> None:
        asked = asyncio.create_task(generate(pool, 0, 1))
        await asyncio.sleep(1)
        pool.want(1)
        await asyncio.sleep(1)
        made["generator-1"].kill()
        assert await asked == ["generator-0"] * 2
        assert list(made) == ["generator-0", "generator-1"]

    in_pool(die_while_draining, lambda name: FakeGenerator(name, seconds=10.0), count=2, max_restarts=0)


def test_the_last_worker_is_not_let_go() -> None:
    async def drain_wrongly(pool: GeneratorPool, made: Made) -> None:
        with pytest.raises(RlhfRayError, match=r"0 generators cannot be wanted.*keep at least 1"):
            pool.want(0)

    in_pool(drain_wrongly)


def test_a_worker_that_went_with_its_node_is_replaced_and_does_not_count() -> None:
    async def lose_nodes(pool: GeneratorPool, made: Made) -> None:
        for n in range(4):
            asked = asyncio.create_task(generate(pool, n))
            await asyncio.sleep(0.5)
            made[f"generator-{n}"].kill(with_node=True)
            assert await asked == [f"generator-{n + 1}"]
        (worker,) = pool.status()["workers"]
        assert (worker["name"], worker["restarts"], worker["done"]) == ("generator-4", 4, 1)
        assert pool.status()["restarts"] == 0

    in_pool(lose_nodes, lambda name: FakeGenerator(name, seconds=1.0), max_restarts=0, max_prompt_tries=1)


def test_a_pool_that_follows_the_cluster_shrinks_with_lost_nodes_down_to_its_least() -> None:
    async def lose_nodes(pool: GeneratorPool, made: Made) -> None:
        for n, left in ((0, 2), (1, 2)):
            asked = asyncio.create_task(generate(pool, 0, 1, 2))
            await asyncio.sleep(0.5)
            made[f"generator-{n}"].kill(with_node=True)
            await asked
            assert (pool.wanted, pool.size()) == (left, left)

    in_pool(lose_nodes, lambda name: FakeGenerator(name, seconds=1.0), count=3, shrink_to=2)


def test_the_status_says_what_each_worker_is_doing() -> None:
    async def look(pool: GeneratorPool, made: Made) -> None:
        await generate(pool, 0, 1, 2)
        asked = asyncio.create_task(generate(pool, 3))
        await asyncio.sleep(0.5)
        pool.want(2)
        await asyncio.sleep(0)
        assert pool.status() == {
            "wanted": 2,
            "up": 1,
            "restarts": 0,
            "max_restarts": 3,
            "workers": [
                {
                    "name": "generator-0",
                    "state": "ready",
                    "version": 0,
                    "in_hand": 1,
                    "done": 3,
                    "restarts": 0,
                    "node": "nowhere",
                },
                {
                    "name": "generator-1",
                    "state": "starting",
                    "version": None,
                    "in_hand": 0,
                    "done": 0,
                    "restarts": 0,
                    "node": None,
                },
            ],
        }
        await asked

    in_pool(look, lambda name: FakeGenerator(name, seconds=1.0))


def test_closing_ends_every_worker_and_a_failure_to_close_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    class Stubborn(FakeGenerator):
        async def close(self) -> None:
            await super().close()
            raise OSError("stuck")

    async def ask(pool: GeneratorPool, made: Made) -> None:
        await generate(pool, 0)

    made = in_pool(ask, lambda name: Stubborn(name) if name == "generator-0" else FakeGenerator(name), count=2)
    assert all(g.closed for g in made.values())
    assert "generator-0 could not be closed: stuck" in caplog.text


# References


def test_the_work_of_a_dead_reference_is_done_again_by_another() -> None:
    made: list[FakeReference] = []

    def make(name: str) -> FakeReference:
        made.append(FakeReference(name, seconds=1.0, die_at=2 if name == "reference-0" else None))
        return made[-1]

    async def play() -> None:
        pool = ReferencePool(worker_factory(make), count=1, max_concurrent=1000, max_restarts=1, max_prompt_tries=2)
        generator = FakeGenerator()
        await generator.update_weights(published(0))
        async with asyncio.TaskGroup() as group:
            pool.start(group)
            rollouts = [rollout for i in range(3) for _, rollout in await generator.generate(FakePrompts().prompt(i))]
            found = await asyncio.gather(*(pool.logprobs(rollout.prompt, rollout) for rollout in rollouts))
            for rollout, logprobs in zip(rollouts, found, strict=True):
                assert logprobs == pytest.approx([x - 0.01 for x in rollout.rollout_logprobs], abs=1e-6)
            assert pool.states() == {"reference-1": WorkerState.READY}
            assert made[0].closed
            await pool.close()

    simulate(play())


def test_a_reference_that_always_dies_ends_the_run_with_the_knob_to_turn() -> None:
    async def play() -> None:
        pool = ReferencePool(
            worker_factory(lambda name: FakeReference(name, die_at=1)),
            count=1,
            max_concurrent=1000,
            max_restarts=2,
            max_prompt_tries=9,
        )
        async with asyncio.TaskGroup() as group:
            pool.start(group)
            await pool.logprobs(FakePrompts().prompt(0), None)

    with pytest.raises(BaseExceptionGroup) as caught:
        simulate(play())
    assert "reference.max_restarts = 2 replacements are used up" in str(caught.value.exceptions[0])
