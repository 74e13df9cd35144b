"""A pool's actor that dies or hangs, on a real cluster: the driver hears of it, and of what the process left."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray

from rlhf_ray.actors.client import ActorClient
from rlhf_ray.actors.pulse import PULSE_GROUP, Pulse, PulsingWorker
from rlhf_ray.cluster import start_actor
from rlhf_ray.errors import NodeLostError, PromptError, WorkerDiedError

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(120)]


class Sleeper(PulsingWorker):
    """Does what the test asks for, in a thread."""

    async def ready(self) -> None:
        pass

    async def work(self, pieces: int, seconds: float) -> int:
        for _ in range(pieces):
            with self._working("sampling"):
                await asyncio.to_thread(oversleep, seconds)
        return pieces

    async def say(self, line: str) -> None:
        print(line, flush=True)

    async def refuse(self) -> None:
        raise PromptError("no worker can work on this")


class Speechless(Sleeper):
    """Never says how it is doing, though its process answers."""

    @ray.method(concurrency_group=PULSE_GROUP)
    async def pulse(self) -> Pulse:
        raise ValueError("no pulse")


def oversleep(seconds: float) -> None:
    time.sleep(seconds)


class SleeperClient(ActorClient):
    @classmethod
    def start(cls, name: str, *, hang_timeout_s: float, worker: type[Sleeper] = Sleeper) -> SleeperClient:
        actor = start_actor(worker, num_cpus=0, num_gpus=0, threads=1, concurrency=8)
        return cls(name, actor, hang_timeout_s=hang_timeout_s)

    @property
    def process(self) -> psutil.Process:
        assert self._place is not None
        return psutil.Process(self._place.pid)

    async def work(self, pieces: int, seconds: float) -> int:
        done: int = await self.answer(self._actor.work.remote(pieces, seconds))
        return done

    async def say(self, line: str) -> None:
        await self.answer(self._actor.say.remote(line))

    async def refuse(self) -> None:
        await self.answer(self._actor.refuse.remote())

    async def seen(self, phase: str) -> None:
        while self._pulse is None or self._pulse.phase != phase:  # noqa: ASYNC110 (nobody is told of a pulse)
            await asyncio.sleep(0.05)


@pytest.fixture(scope="module", autouse=True)
def cluster(ray_temp_dir: Path) -> Iterator[None]:
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, _temp_dir=str(ray_temp_dir))
    yield
    ray.shutdown()


async def death_of(*calls: asyncio.Task[int]) -> str:
    """What every one of the calls says of it, with nothing but an error among them."""
    answers = await asyncio.gather(*calls, return_exceptions=True)
    for answer in answers:
        assert isinstance(answer, WorkerDiedError)
        assert not isinstance(answer, NodeLostError)
    (message,) = {str(answer) for answer in answers}
    return message


async def test_the_error_of_a_killed_worker_says_what_it_was_at_its_memory_and_its_last_words() -> None:
    client = SleeperClient.start("generator-3", hang_timeout_s=60)
    await client.ready()
    await client.say("about to allocate the cache")
    calls = [asyncio.create_task(client.work(1, 600)) for _ in range(2)]
    await client.seen("sampling")
    client.process.send_signal(signal.SIGKILL)
    message = await death_of(*calls)
    assert message.startswith("generator-3 died while sampling (peak memory 0.")
    assert "its log ends:\n  about to allocate the cache" in message
    await client.close()


async def test_a_workers_own_error_comes_back_without_rays_account_of_it() -> None:
    client = SleeperClient.start("generator-0", hang_timeout_s=60)
    await client.ready()
    with pytest.raises(PromptError) as caught:
        await client.refuse()
    assert (type(caught.value), str(caught.value)) == (PromptError, "no worker can work on this")
    await client.close()


async def test_a_worker_that_gets_on_with_long_work_is_left_alone_and_an_idle_one_too() -> None:
    client = SleeperClient.start("generator-0", hang_timeout_s=6)
    await client.ready()
    assert await client.work(20, 0.5) == 20
    await asyncio.sleep(9)
    assert await client.work(1, 0) == 1
    await client.close()


async def test_a_worker_with_more_calls_than_it_takes_at_once_is_left_alone() -> None:
    client = SleeperClient.start("generator-0", hang_timeout_s=6)
    await client.ready()
    assert await asyncio.gather(*(client.work(16, 0.5) for _ in range(10))) == [16] * 10
    await client.close()


async def test_a_stopped_process_is_taken_for_dead_and_ended() -> None:
    client = SleeperClient.start("reference-0", hang_timeout_s=5)
    await client.ready()
    process = client.process
    call = asyncio.create_task(client.work(1, 600))
    await client.seen("sampling")
    os.kill(process.pid, signal.SIGSTOP)
    message = await death_of(call)
    assert message.startswith("reference-0 hung while sampling (peak memory 0.")
    assert "hang_timeout_s" in message
    await asyncio.to_thread(process.wait, 20)
    with pytest.raises(WorkerDiedError, match="hung"):
        await client.work(1, 0)
    await client.close()


async def test_a_worker_that_cannot_be_asked_how_it_is_doing_is_taken_for_dead_in_the_end() -> None:
    client = SleeperClient.start("generator-2", hang_timeout_s=4, worker=Speechless)
    await client.ready()
    assert await client.work(1, 0) == 1, "not at the first time"
    message = await death_of(asyncio.create_task(client.work(1, 600)))
    assert message.startswith("generator-2 hung while it started: it cannot be asked how it is doing")
    await client.close()


async def test_the_stacks_of_a_worker_that_makes_no_progress_name_the_function(
    caplog: pytest.LogCaptureFixture,
) -> None:
    client = SleeperClient.start("generator-1", hang_timeout_s=5)
    await client.ready()
    process = client.process
    with caplog.at_level(logging.WARNING, logger="rlhf_ray.cluster"):
        message = await death_of(asyncio.create_task(client.work(1, 600)))
    assert message.startswith("generator-1 hung while sampling (peak memory 0.")
    assert "no progress for 5 s" in message
    assert "in oversleep" in caplog.text
    await asyncio.to_thread(process.wait, 20)
    await client.close()
