"""The pool in any weather: whatever is wanted, published, asked and killed, in any order."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from rlhf_ray.errors import NodeLostError, PromptError, WorkerDiedError
from rlhf_ray.pipeline.pool import GeneratorPool
from rlhf_ray.pipeline.workers import STAYING, WorkerState
from rlhf_ray.testing import FakeGenerator, FakePrompts, simulation, uniform_seconds, worker_factory
from rlhf_ray.types import Probe, VersionedWeights

MAX_CONCURRENT = 2


class PoolMachine(RuleBasedStateMachine):
    """Time passes only in ``wait`` and in the blink after each rule."""

    @initialize(
        count=st.integers(1, 3),
        shrink_to=st.none() | st.integers(1, 2),
        start_seconds=st.integers(0, 5),
        max_prompt_tries=st.sampled_from([1, 2, 3, 1000]),
    )
    def open(self, count: int, shrink_to: int | None, start_seconds: int, max_prompt_tries: int) -> None:
        self.max_prompt_tries = max_prompt_tries
        self.made: dict[str, _Watched] = {}
        self.version = 0
        self.asked: list[asyncio.Task[Any]] = []
        self.in_hands: Counter[int] = Counter()
        self.deaths: Counter[int] = Counter()
        """Of workers that had the prompt, lost nodes not counted."""
        self.wanted, self.shrink_to = count, shrink_to
        self.runner = simulation()
        self.pool = GeneratorPool(
            worker_factory(self._make, seconds=start_seconds),
            count=count,
            max_concurrent=MAX_CONCURRENT,
            max_restarts=1000,
            max_prompt_tries=max_prompt_tries,
            shrink_to=shrink_to,
        )
        self.runner.run(self._open())

    @rule(count=st.integers(1, 4))
    def want(self, count: int) -> None:
        self.wanted = count
        self.runner.run(self._do(lambda: self.pool.want(count)))

    @rule()
    def publish(self) -> None:
        self.version += 1
        self.runner.run(self._do(self._publish))

    @rule(prompts=st.integers(1, 4))
    def ask(self, prompts: int) -> None:
        async def ask() -> None:
            for _ in range(prompts):
                prompt = FakePrompts().prompt(len(self.asked))
                call = self.pool.generate(prompt, on_admit=self._admit, on_withdraw=self._withdraw)
                self.asked.append(asyncio.create_task(call))
            await asyncio.sleep(0.001)

        self.runner.run(ask())

    @rule(which=st.integers(0, 3), with_node=st.booleans())
    def kill(self, which: int, with_node: bool) -> None:
        alive = sorted(
            (self.made[name] for name in self.pool.states() if name in self.made), key=lambda g: -len(g.running)
        )
        if which < len(alive):
            self.runner.run(self._do(lambda: alive[which].kill(with_node=with_node)))

    @rule(seconds=st.floats(0, 12))
    def wait(self, seconds: float) -> None:
        self.runner.run(asyncio.sleep(seconds))

    @invariant()
    def as_many_stay_as_are_wanted(self) -> None:
        if not hasattr(self, "pool"):
            return
        assert not self.host.done(), "no fault here is one that ends the run"
        staying = [state for state in self.pool.states().values() if state in STAYING]
        assert len(staying) == self.pool.wanted
        least = self.wanted if self.shrink_to is None else min(self.shrink_to, self.wanted)
        assert least <= self.pool.wanted <= self.wanted
        assert all(0 <= hands <= 1 for hands in self.in_hands.values())

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        with self.runner:
            self.runner.run(self._finish())

    def _make(self, name: str) -> _Watched:
        number = int(name.removeprefix("generator-"))
        seconds = uniform_seconds(0, 10, seed=number)
        self.made[name] = _Watched(self, name, seconds=seconds, update_seconds=number % 3)
        return self.made[name]

    def _publish(self) -> None:
        weights = VersionedWeights(version=self.version, weights={}, probe=Probe(token_ids=(1, 2), logprobs=(-1.0,)))
        self.pool.update_all(weights, lambda ack: None)

    def _admit(self, prompt_id: int, version: int) -> None:
        assert version == self.version
        self.in_hands[prompt_id] += 1

    def _withdraw(self, prompt_id: int) -> None:
        self.in_hands[prompt_id] -= 1

    async def _open(self) -> None:
        self.closing = asyncio.Event()

        async def host() -> None:
            async with asyncio.TaskGroup() as group:
                self._publish()
                self.pool.start(group)
                await self.closing.wait()
                await self.pool.close()

        self.host = asyncio.create_task(host())
        await asyncio.sleep(0.001)

    async def _do(self, act: Any) -> None:
        act()
        await asyncio.sleep(0.001)

    async def _finish(self) -> None:
        if self.asked:
            await asyncio.wait(self.asked, timeout=10_000)
        assert all(call.done() for call in self.asked), "whoever asks is answered"
        for prompt_id, call in enumerate(self.asked):
            given_up = isinstance(call.exception(), PromptError)
            assert given_up == (self.deaths[prompt_id] == self.max_prompt_tries)
            assert self.in_hands[prompt_id] == (not given_up)
            if not given_up:
                ((receipt, _),) = call.result()
                assert receipt.prompt_id == prompt_id
        await asyncio.sleep(100)  # whoever was leaving is gone
        assert all(state in STAYING for state in self.pool.states().values())
        self.closing.set()
        await self.host
        assert self.pool.states() == {}
        assert all(generator.closed for generator in self.made.values())


class _Watched(FakeGenerator):
    """Checks each prompt as it is handed over."""

    def __init__(self, machine: PoolMachine, name: str, **options: Any) -> None:
        super().__init__(name, **options)
        self._machine = machine
        self.running: set[int] = set()
        self._killed = False

    async def generate(self, prompt):  # type: ignore[no-untyped-def]
        assert self._machine.pool.states()[self.name] is WorkerState.READY
        assert self.version == self._machine.version, "it was given a prompt before it acknowledged the newest version"
        assert not self.closed
        self.running.add(prompt.prompt_id)
        assert len(self.running) <= MAX_CONCURRENT
        last_try = [i for i in self.running if 0 < self._machine.deaths[i] == self._machine.max_prompt_tries - 1]
        assert not last_try or len(self.running) == 1, "the last try has no company"
        try:
            return await super().generate(prompt)
        except NodeLostError:
            raise
        except WorkerDiedError:
            self._machine.deaths[prompt.prompt_id] += 1
            raise
        finally:
            self.running.discard(prompt.prompt_id)

    def kill(self, *, with_node: bool = False) -> None:
        self._killed = True
        super().kill(with_node=with_node)

    async def close(self) -> None:
        assert self._killed or not self.running, "whoever leaves finishes what it has"
        await super().close()


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
