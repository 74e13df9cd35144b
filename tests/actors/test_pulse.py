"""What a worker tells of itself, without Ray."""

from __future__ import annotations

import asyncio

from rlhf_ray.actors.pulse import PulsingWorker


async def told(worker: PulsingWorker) -> tuple[str, int, bool, bool]:
    worker._calls_loop = asyncio.get_running_loop()
    pulse = await worker.pulse()
    assert pulse.peak_bytes > 1e6
    return pulse.phase, pulse.progress, pulse.busy, pulse.bounded


async def test_a_worker_is_busy_while_a_piece_of_work_is_under_way_and_each_end_is_progress() -> None:
    worker = PulsingWorker()
    assert await told(worker) == ("idle", 0, False, False)
    with worker._working("reading"):
        with worker._working("reading"):
            assert await told(worker) == ("reading", 0, True, False)
        worker._advance()
        assert await told(worker) == ("reading", 2, True, False)
    assert await told(worker) == ("idle", 3, False, False)


async def test_work_with_time_limits_of_its_own_is_none_that_must_get_on() -> None:
    worker = PulsingWorker()
    with worker._working("writing a checkpoint", bounded=True):
        assert await told(worker) == ("writing a checkpoint", 0, False, True)
        with worker._working("training"):
            assert await told(worker) == ("training", 0, True, True)
    assert await told(worker) == ("idle", 2, False, False)
