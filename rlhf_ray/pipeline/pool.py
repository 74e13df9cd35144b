"""The generator pool: who samples, who has which policy, and what happens when one of them dies.

A worker's life (``WorkerState``); DEAD can be reached from every living state::

    STARTING ──factory done──► STALE ──acknowledged the newest version──► READY
                                 ▲                                          │
                                 └────────── a new version is out ──────────┘
    STARTING, STALE, READY ──drain──► DRAINING ──last rollout done──► GONE

Only READY workers are given prompts, so whoever joins or comes back serves nobody until it has acknowledged the newest
policy, and a worker that is slow to load it holds up itself alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from rlhf_ray.errors import RlhfRayError, StalenessError, WorkerDiedError
from rlhf_ray.interfaces import Generator
from rlhf_ray.types import Prompt, Ref, RolloutReceipt, VersionedWeights, WeightAck

log = logging.getLogger("rlhf_ray.pipeline")


class WorkerState(Enum):
    """Where a worker is in its life."""

    STARTING = "starting"
    STALE = "stale"
    READY = "ready"
    DRAINING = "draining"
    GONE = "gone"
    DEAD = "dead"


TRANSITIONS: Mapping[WorkerState, frozenset[WorkerState]] = {
    WorkerState.STARTING: frozenset({WorkerState.STALE, WorkerState.DRAINING, WorkerState.DEAD}),
    WorkerState.STALE: frozenset({WorkerState.READY, WorkerState.DRAINING, WorkerState.DEAD}),
    WorkerState.READY: frozenset({WorkerState.STALE, WorkerState.DRAINING, WorkerState.DEAD}),
    WorkerState.DRAINING: frozenset({WorkerState.GONE, WorkerState.DEAD}),
    WorkerState.GONE: frozenset(),
    WorkerState.DEAD: frozenset(),
}


def advance(now: WorkerState, to: WorkerState) -> WorkerState:
    """The state after a transition. Raises ``RlhfRayError`` for one that the table does not have."""
    if to not in TRANSITIONS[now]:
        raise RlhfRayError(f"a {now.value} worker cannot become {to.value}")
    return to


@dataclass(eq=False)
class _Worker:
    name: str
    state: WorkerState = WorkerState.STARTING
    generator: Generator | None = None
    version: int | None = None
    running: int = 0
    news: asyncio.Event = field(default_factory=asyncio.Event)  # a version is out, or the worker is to leave
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)  # GONE or DEAD

    def __post_init__(self) -> None:
        self.idle.set()

    def become(self, to: WorkerState) -> None:
        self.state = advance(self.state, to)
        if to in (WorkerState.GONE, WorkerState.DEAD):
            self.left.set()

    def start_one(self) -> None:
        self.running += 1
        self.idle.clear()

    def end_one(self) -> None:
        self.running -= 1
        if self.running == 0:
            self.idle.set()


class GeneratorPool:
    """Owns the generators: brings them up, gives them prompts, keeps them on the newest policy, replaces the dead.

    Args:
        factory: makes a generator of the given name, ready to be asked. ``WorkerDiedError`` from it counts as a death;
            any other error ends the run. When cancelled it frees what it has started.
        count: generators to begin with.
        max_concurrent: most prompts that one generator works on at once.
        max_restarts: replacements of dead generators before the run ends with the cause.
        max_prompt_tries: workers that may die on one prompt before the run ends.
    """

    def __init__(
        self,
        factory: Callable[[str], Awaitable[Generator]],
        *,
        count: int,
        max_concurrent: int,
        max_restarts: int,
        max_prompt_tries: int,
    ) -> None:
        self._factory = factory
        self._count = count
        self._max_concurrent = max_concurrent
        self._max_restarts = max_restarts
        self._max_prompt_tries = max_prompt_tries
        self._group: asyncio.TaskGroup | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._workers: dict[str, _Worker] = {}
        self._named = 0
        self._restarts = 0
        self._newest: VersionedWeights | None = None
        self._accept: Callable[[WeightAck], None] = lambda ack: None
        self._waiting: deque[asyncio.Future[None]] = deque()

    def start(self, group: asyncio.TaskGroup) -> None:
        """Begin to bring up ``count`` workers, all at once; each serves as soon as it has the newest policy.

        Their lives are tasks of ``group``: an error that no restart can mend ends it.
        """
        self._group = group
        for _ in range(self._count):
            self.join()

    def join(self) -> str:
        """Add a worker, at any time; returns its name."""
        worker = _Worker(f"generator-{self._named}")
        self._named += 1
        self._workers[worker.name] = worker
        self._spawn(self._live(worker), worker.name)
        return worker.name

    async def drain(self, name: str) -> None:
        """Let a worker finish what it has, then close it; returns once it is gone.

        Raises:
            RlhfRayError: there is no such worker, or it is the last one and the run would stand still.
        """
        staying = [
            w for w in self._workers.values() if w.state in (WorkerState.STARTING, WorkerState.STALE, WorkerState.READY)
        ]
        worker = self._workers.get(name)
        if worker not in staying:
            raise RlhfRayError(f"no generator {name} can be drained; there are: {', '.join(w.name for w in staying)}")
        if len(staying) == 1:
            raise RlhfRayError(f"generator {name} is the last one; let another join before it is drained")
        worker.become(WorkerState.DRAINING)
        worker.news.set()
        await worker.left.wait()

    def states(self) -> dict[str, WorkerState]:
        """State of every worker that has not gone, by name."""
        return {name: worker.state for name, worker in self._workers.items()}

    def size(self) -> int:
        """Workers that are up and not leaving."""
        return sum(w.state in (WorkerState.STALE, WorkerState.READY) for w in self._workers.values())

    def update_all(self, published: VersionedWeights, accept: Callable[[WeightAck], None]) -> None:
        """A policy is out: from this moment nobody is given a prompt before having acknowledged it.

        Returns at once; each worker loads it in its own time and skips versions that it missed.

        Args:
            accept: is shown each acknowledgement, of later joiners too; an error from it ends the run.
        """
        self._newest, self._accept = published, accept
        for worker in self._workers.values():
            if worker.state is WorkerState.READY:
                worker.become(WorkerState.STALE)
            worker.news.set()

    async def generate(
        self,
        prompt: Prompt,
        *,
        on_admit: Callable[[int, int], None] = lambda prompt_id, version: None,
        on_withdraw: Callable[[int], None] = lambda prompt_id: None,
    ) -> Sequence[tuple[RolloutReceipt, Ref]]:
        """Sample the prompt's responses on the least loaded READY generator; on another one if that dies.

        Args:
            on_admit: called with (prompt id, version) as a generator that serves ``version`` gets the prompt.
            on_withdraw: called with the prompt id when that generator has died; another ``on_admit`` follows.

        Raises:
            RlhfRayError: ``max_prompt_tries`` workers died on this prompt.
            WorkerDiedError: more workers died than ``max_restarts`` replaces.
        """
        for attempt in range(self._max_prompt_tries):
            worker = await self._seat(first_in_line=attempt > 0)
            assert worker.generator is not None
            assert worker.version is not None
            try:
                on_admit(prompt.prompt_id, worker.version)
                return await worker.generator.generate(prompt)
            except WorkerDiedError as error:
                on_withdraw(prompt.prompt_id)
                cause = error
                self._bury(worker, error)
            finally:
                worker.end_one()
                self._call_next()
        raise RlhfRayError(
            f"prompt {prompt.prompt_id} ({prompt.text[:60]!r}) was given to {self._max_prompt_tries} generators and "
            "each died; remove it from prompts.path, or raise ppo.max_prompt_tries if the deaths have another cause"
        ) from cause

    async def close(self) -> None:
        """End every worker; rollouts under way are dropped. May be called again."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        results = await asyncio.gather(*(self._close(w) for w in self._workers.values()), return_exceptions=True)
        for worker, result in zip(list(self._workers.values()), results, strict=True):
            if isinstance(result, Exception):  # the run's own outcome must not be hidden behind it
                log.warning("%s could not be closed: %s", worker.name, result)
        self._workers.clear()

    async def _seat(self, *, first_in_line: bool) -> _Worker:
        """Wait for a READY worker with room and take the place, with nothing happening between the two."""
        while True:
            if (worker := self._least_loaded()) is not None:
                worker.start_one()
                return worker
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            if first_in_line:
                self._waiting.appendleft(turn)
            else:
                self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn in self._waiting:
                    self._waiting.remove(turn)
                else:  # it had been called: the place goes to the next in line
                    self._call_next()
                raise
            first_in_line = True

    def _least_loaded(self) -> _Worker | None:
        free = [w for w in self._workers.values() if w.state is WorkerState.READY and w.running < self._max_concurrent]
        return min(free, key=lambda w: w.running, default=None)

    def _call_next(self) -> None:
        """Call as many waiting prompts as there are free places; one that comes too late goes back to the front."""
        free = sum(self._max_concurrent - w.running for w in self._workers.values() if w.state is WorkerState.READY)
        for _ in range(min(free, len(self._waiting))):
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)

    async def _live(self, worker: _Worker) -> None:
        """One worker's whole life. Waits for ``news``: a version (``update_all``) or the wish to leave (``drain``)."""
        try:
            worker.generator = await self._factory(worker.name)
            if worker.state is WorkerState.STARTING:
                worker.become(WorkerState.STALE)
            while worker.state in (WorkerState.STALE, WorkerState.READY):
                if self._newest is not None and worker.version != self._newest.version:
                    await self._catch_up(worker, worker.generator, self._newest)
                else:
                    worker.news.clear()
                    await worker.news.wait()
            if worker.state is WorkerState.DRAINING:
                await worker.idle.wait()
        except WorkerDiedError as error:
            self._bury(worker, error)
        if worker.state is WorkerState.DRAINING:
            await self._close(worker)
            worker.become(WorkerState.GONE)
            del self._workers[worker.name]

    async def _catch_up(self, worker: _Worker, generator: Generator, published: VersionedWeights) -> None:
        ack = await generator.update_weights(published)
        if ack.version != published.version:
            raise StalenessError(f"{worker.name} was sent version {published.version} and acknowledged {ack.version}")
        self._accept(ack)
        worker.version = ack.version
        if worker.state is WorkerState.STALE and self._newest is published:
            worker.become(WorkerState.READY)
            self._call_next()

    def _bury(self, worker: _Worker, error: WorkerDiedError) -> None:
        """A worker died. Everyone who was waiting for it reports it; the first report counts."""
        if worker.state is WorkerState.DEAD:
            return
        leaving = worker.state is WorkerState.DRAINING
        worker.become(WorkerState.DEAD)
        worker.news.set()
        if not leaving and self._restarts >= self._max_restarts:
            raise WorkerDiedError(
                f"{worker.name} died ({error}) and generator.max_restarts = {self._max_restarts} replacements are used "
                "up; mend the cause, or raise generator.max_restarts"
            ) from error
        self._restarts += not leaving
        fate = "it was leaving" if leaving else f"replacing it ({self._restarts} of {self._max_restarts})"
        log.warning("%s died: %s; %s", worker.name, error, fate)
        self._spawn(self._replace(worker, leaving), f"replace {worker.name}")

    async def _replace(self, worker: _Worker, leaving: bool) -> None:
        # What the dead worker still holds (its cores, its memory) is freed first: the new one may need it.
        await self._close(worker)
        del self._workers[worker.name]
        if not leaving:
            self.join()

    async def _close(self, worker: _Worker) -> None:
        if worker.generator is None:
            return
        try:
            await worker.generator.close()
        except WorkerDiedError as error:
            log.debug("%s was dead when it was closed: %s", worker.name, error)
        worker.generator = None

    def _spawn(self, life: Coroutine[None, None, None], name: str) -> None:
        assert self._group is not None, "start() comes first"
        task = self._group.create_task(life, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
