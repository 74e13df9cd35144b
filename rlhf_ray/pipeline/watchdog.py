"""Ends a loop in which nothing moves any more, and says where it stands.

What a worker of a pool or the learner has in hand is not judged here: each of them is watched by its own client, which
can tell long work from none. What is left is a service that never answers, a disk that never finishes, and a loop that
waits for itself.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from rlhf_ray.errors import HangError
from rlhf_ray.pipeline.occupancy import Occupancy
from rlhf_ray.pipeline.workers import WorkerPool, WorkerState

log = logging.getLogger("rlhf_ray.pipeline")

LOOKS = 10
"""How often within the time allowed it looks."""

HEAD_START_SECONDS = 45.0
"""How much longer than the watch over one worker this one waits: a rank of the learner that hangs over a checkpoint is
found out first, its stacks are taken (``actors.evidence.NODE_SECONDS``), and the ranks begin again."""

OF_THE_LEARNER = ("train", "publish")
"""Stages whose calls the learner's own client watches."""


class Watchdog:
    """Watches the stages of one loop.

    Args:
        timeout_s: a loop in which no call of any stage begins or ends for so long, and ``HEAD_START_SECONDS`` more,
            hangs, unless a worker is at work.
        pools: those that are watched excuse it while a worker works, or while all of them start or wait for a place.
        state: of the run, JSON-ready; it goes to the log with the stacks of all tasks.

    Attributes:
        is_asked_to_wait: what the loop needs is being started elsewhere; it is excused.
    """

    def __init__(
        self,
        occupancy: Occupancy,
        pools: Sequence[WorkerPool[Any]],
        *,
        timeout_s: float,
        state: Callable[[], Mapping[str, Any]],
    ) -> None:
        self._occupancy = occupancy
        self._pools = pools
        self._timeout_s = timeout_s
        self._between_looks = (timeout_s + HEAD_START_SECONDS) / LOOKS
        self._state = state
        self.is_asked_to_wait = False

    async def watch(self) -> NoReturn:
        """Look again and again.

        Raises:
            HangError: naming the stage; state and stacks are in the log.
        """
        looks, moved = 0, self._occupancy.moved
        while looks < LOOKS:  # counted and not timed: while this process was stopped nobody could move
            await asyncio.sleep(self._between_looks)
            looks = 0 if self._is_excused() or self._occupancy.moved != moved else looks + 1
            moved = self._occupancy.moved
        raise self._hang()

    def _is_excused(self) -> bool:
        if self.is_asked_to_wait or any(stage in self._occupancy.under_way() for stage in OF_THE_LEARNER):
            return True
        return any(pool.is_watched and _works_or_starts(pool) for pool in self._pools)

    def _hang(self) -> HangError:
        waits = Counter(_stack(task) for task in asyncio.all_tasks())
        stacks = "\n".join(f"  {number} x {stack}" for stack, number in waits.items())
        log.error("nothing moves; the run's state: %s\nwhat its tasks wait for:\n%s", json.dumps(self._state()), stacks)
        calls = [f"{stage} ({number} under way)" for stage, number in self._occupancy.under_way().items()]
        where = f"in {' and '.join(calls)}" if calls else "with no stage at work, which is a bug of rlhf_ray"
        return HangError(
            f"the run hangs {where}: nothing has moved for over {self._timeout_s:g} s; the log has its state and "
            "stacks. Mend what does not answer and go on with --resume, or raise hang_timeout_s if it is only slow"
        )


def _works_or_starts(pool: WorkerPool[Any]) -> bool:
    """A worker has something in hand; or there is nobody yet who could."""
    workers = pool.status()["workers"]
    is_ready = any(worker["state"] == WorkerState.READY.value for worker in workers)
    return any(worker["in_hand"] for worker in workers) or not is_ready


def _stack(task: asyncio.Task[Any]) -> str:
    """From the task's outermost call to the one that waits."""
    calls: list[str] = []
    coroutine: Any = task.get_coro()
    while coroutine is not None:
        if (frame := getattr(coroutine, "cr_frame", None)) is not None:
            calls.append(f"{frame.f_code.co_qualname} line {frame.f_lineno}")
        coroutine = getattr(coroutine, "cr_await", None)
    return " > ".join(calls) or repr(task.get_coro())
