"""Workers of one kind that come and go while a run goes on: who is there, who may be asked, who joins, leaves and dies.

A worker's life (``WorkerState``); DEAD can be reached from every living state::

    STARTING ──factory done──► STALE ──has what it must have──► READY
                                 ▲                                │
                                 └────────── ``make_stale`` ──────┘
    STARTING, STALE, READY ──told to leave──► DRAINING ──last call done──► GONE

The pool owns the wanted number. ``want`` changes it, and workers join or drain until as many stay (STARTING, STALE,
READY) as are wanted; a death is a missing worker, and so is replaced. Nobody waits for a worker that is not READY:
one that cannot be placed holds nobody up.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Generic, TypeVar

from rlhf_ray.errors import NodeLostError, PromptError, RlhfRayError, WorkerDiedError
from rlhf_ray.interfaces import Worker

log = logging.getLogger("rlhf_ray.pipeline")

W = TypeVar("W", bound=Worker)
R = TypeVar("R")


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

STAYING = (WorkerState.STARTING, WorkerState.STALE, WorkerState.READY)
"""Living and not leaving; in the order in which they are let go when there are too many."""


def advance(now: WorkerState, to: WorkerState) -> WorkerState:
    """The state after a transition. Raises ``RlhfRayError`` for one that the table does not have."""
    if to not in TRANSITIONS[now]:
        raise RlhfRayError(f"a {now.value} worker cannot become {to.value}")
    return to


@dataclass(eq=False)
class Member(Generic[W]):
    """A worker, as its pool knows it."""

    name: str
    restarts: int
    """Workers that died in this one's place before it."""
    state: WorkerState = WorkerState.STARTING
    worker: W | None = None
    making: asyncio.Future[W] | None = None
    version: int | None = None
    running: int = 0
    alone: bool = False
    """The one call that it has is to have no company."""
    done: int = 0
    news: asyncio.Event = field(default_factory=asyncio.Event)  # it has become stale, or is to leave
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.idle.set()

    @property
    def leaving(self) -> bool:
        """It was told to go: nobody waits any longer for a place that the cluster may never have for it."""
        return self.state is WorkerState.DRAINING

    def become(self, to: WorkerState) -> None:
        self.state = advance(self.state, to)

    def room(self, *, alone: bool, most: int) -> int:
        """Further calls that it can be given now, of those that share a worker or of those that are to be alone."""
        if self.state is not WorkerState.READY or self.alone:
            return 0
        return int(self.running == 0) if alone else most - self.running

    def start_one(self, *, alone: bool) -> None:
        self.running += 1
        self.alone = alone
        self.idle.clear()

    def end_one(self) -> None:
        self.running -= 1
        if self.running == 0:
            self.alone = False
            self.idle.set()


class WorkerPool(Generic[W]):
    """Brings workers up, gives them calls, lets them go and replaces the dead; ``pool.py`` has one for each kind.

    Args:
        factory: makes a worker of the given name, ready to be asked. ``WorkerDiedError`` from it counts as a death; any
            other error ends the run, but for one of ours once a worker has been up: what could start before will start
            again, so that is a death too. When cancelled it frees what it has started.
        count: workers to begin with.
        max_concurrent: most calls that one worker has at once.
        max_restarts: replacements of dead workers, since ``forget_deaths`` was last called, before the run ends with
            the cause; None: as many as it takes. Workers that went with their node do not count, nor those that died of
            a call that was then given up; where there is room for ``max_prompt_tries`` of them, nor do those of calls
            that may yet be.
        max_prompt_tries: workers that may die on one call before it is given up; again without lost nodes.
        shrink_to: a worker that went with its node is replaced only where fewer than this are left. None: always.
    """

    kind: str
    """What workers' names begin with."""
    section: str
    """Of the configuration."""
    is_watched = True
    """Each worker's client notices by itself when it hangs."""

    def __init__(
        self,
        factory: Callable[[str], Awaitable[W]],
        *,
        count: int,
        max_concurrent: int,
        max_restarts: int | None,
        max_prompt_tries: int,
        shrink_to: int | None = None,
    ) -> None:
        self.wanted = count
        self._factory = factory
        self._max_concurrent = max_concurrent
        self._max_restarts = max_restarts
        self._max_prompt_tries = max_prompt_tries
        self._shrink_to = shrink_to
        self._group: asyncio.TaskGroup | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._members: dict[str, Member[W]] = {}
        self._named = 0
        self._closing = False
        self._restarts = 0
        self._on_trial: Counter[str] = Counter()
        """Dead workers → how many of the calls that they had are still being tried."""
        self._has_been_up = False
        self.deaths = 0
        """Workers that died, with their node or without, and were not leaving."""
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._suspects: deque[asyncio.Future[None]] = deque()  # wait for a worker of their own, and before all others

    def start(self, group: asyncio.TaskGroup) -> None:
        """Begin to bring up the wanted number, all at once; each is asked as soon as it is READY.

        Their lives are tasks of ``group``: an error that no restart can mend ends it.
        """
        self._group = group
        self._fit()

    def want(self, count: int) -> None:
        """Have so many workers from now on. Returns at once: they join and drain in their own time.

        Those that are not up yet leave first, then the least busy; each finishes the calls that it has.

        Raises:
            RlhfRayError: none would be left.
        """
        if count < 1:
            raise RlhfRayError(f"{count} {self.kind}s cannot be wanted: the run would stand still; keep at least 1")
        self.wanted = count
        if self._group is not None:
            self._fit()

    def forget_deaths(self) -> None:
        """The run has got on: count against ``max_restarts`` anew."""
        self._restarts = 0

    def states(self) -> dict[str, WorkerState]:
        """State of every worker that has not gone, by name."""
        return {name: member.state for name, member in self._members.items()}

    def size(self) -> int:
        """Workers that are up and not leaving."""
        return sum(m.state in (WorkerState.STALE, WorkerState.READY) for m in self._members.values())

    def status(self) -> dict[str, Any]:
        """For people and programs that look at the run; JSON-ready."""
        return {
            "wanted": self.wanted,
            "up": self.size(),
            "restarts": self._restarts,
            "max_restarts": self._max_restarts,
            "workers": [
                {
                    "name": member.name,
                    "state": member.state.value,
                    "version": member.version,
                    "in_hand": member.running,
                    "done": member.done,
                    "restarts": member.restarts,
                    "node": member.worker.node if member.worker else None,
                }
                for member in self._members.values()
            ],
        }

    async def close(self) -> None:
        """End every worker; calls under way are dropped. May be called again."""
        self._closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        members = list(self._members.values())
        results = await asyncio.gather(*(self._close(m) for m in members), return_exceptions=True)
        for member, result in zip(members, results, strict=True):
            if isinstance(result, Exception):  # the run's own outcome must not be hidden behind it
                log.warning("%s could not be closed: %s", member.name, result)
        self._members.clear()

    def make_stale(self) -> None:
        """From this moment nobody is given a call before ``_refresh`` has said that it may be."""
        for member in self._members.values():
            if member.state is WorkerState.READY:
                member.become(WorkerState.STALE)
            member.news.set()

    async def _refresh(self, member: Member[W], worker: W) -> bool:
        """Give a STALE worker what it must have before it is READY; False: not yet, try again after ``make_stale``."""
        return True

    async def _call(self, call: Callable[[Member[W], W], Awaitable[R]], hopeless: Callable[[int], str]) -> R:
        """Make a call on the least loaded READY worker; on another one if that dies.

        The calls that a worker had when it died are all suspects. One that has a single try left gets it on a worker
        of its own, so that no call is given up for what another one did.

        Args:
            call: may be made several times.
            hopeless: what to say when so many workers have died on it.

        Raises:
            PromptError: ``max_prompt_tries`` workers died on this call.
            WorkerDiedError: more workers died than ``max_restarts`` replaces.
        """
        died: list[str] = []  # of it, or of its company
        again = False
        try:
            while True:
                alone = 0 < len(died) == self._max_prompt_tries - 1
                member = await self._seat(first_in_line=again, alone=alone)
                assert member.worker is not None
                try:
                    result = await call(member, member.worker)
                    member.done += 1
                    return result
                except WorkerDiedError as error:
                    self._bury(member, error)
                    if not isinstance(error, NodeLostError):
                        died.append(member.name)
                        self._on_trial[member.name] += 1
                    if len(died) == self._max_prompt_tries:  # this call is the cause, and is not made again
                        self._restarts = max(0, self._restarts - len(died))
                        raise PromptError(f"{hopeless(len(died))}: {error}") from error
                    again = True
                finally:
                    member.end_one()
                    self._call_next()
        finally:
            self._on_trial -= Counter(died)

    async def _seat(self, *, first_in_line: bool, alone: bool) -> Member[W]:
        """Wait for a READY worker with room and take the place, with nothing happening between the two.

        While a call waits to be alone no other call begins, so that the workers become free for it.
        """
        line = self._suspects if alone else self._waiting
        while True:
            if (alone or not self._suspects) and (member := self._least_loaded(alone=alone)) is not None:
                member.start_one(alone=alone)
                if alone:
                    self._call_next()  # those who waited for it to go first
                return member
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            if first_in_line:
                line.appendleft(turn)
            else:
                line.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn in line:
                    line.remove(turn)
                self._call_next()  # it had been called, or others were waiting for it to go first
                raise
            first_in_line = True

    def _least_loaded(self, *, alone: bool) -> Member[W] | None:
        free = [m for m in self._members.values() if m.room(alone=alone, most=self._max_concurrent)]
        return min(free, key=lambda m: m.running, default=None)

    def _call_next(self) -> None:
        """Let as many waiting calls go as there are free places; one that comes too late goes back to the front."""
        line = self._suspects or self._waiting
        alone = line is self._suspects
        free = sum(m.room(alone=alone, most=self._max_concurrent) for m in self._members.values())
        for _ in range(min(free, len(line))):
            turn = line.popleft()
            if not turn.done():
                turn.set_result(None)

    def _fit(self, restarts: int = 0) -> None:
        """Let workers join or leave until as many stay as are wanted."""
        if self._closing:
            return
        staying = [m for m in self._members.values() if m.state in STAYING]
        for _ in range(self.wanted - len(staying)):
            self._join(restarts)
        staying.reverse()  # the sort is stable: among equals the newest leaves first
        staying.sort(key=lambda m: (STAYING.index(m.state), m.running))
        for member in staying[: max(0, len(staying) - self.wanted)]:
            member.become(WorkerState.DRAINING)
            member.news.set()
            if member.making is not None:
                member.making.cancel()

    def _join(self, restarts: int) -> None:
        member: Member[W] = Member(f"{self.kind}-{self._named}", restarts)
        self._named += 1
        self._members[member.name] = member
        self._spawn(self._live(member), member.name)

    async def _live(self, member: Member[W]) -> None:
        """One worker's whole life. Waits for ``news``: it has become stale, or is to leave."""
        try:
            member.worker = await self._make(member)
            if member.state is WorkerState.STARTING:
                member.become(WorkerState.STALE)
            while member.worker is not None and member.state in (WorkerState.STALE, WorkerState.READY):
                member.news.clear()
                if member.state is WorkerState.READY or not await self._refresh(member, member.worker):
                    await member.news.wait()
                elif member.state is WorkerState.STALE:
                    member.become(WorkerState.READY)
                    self._call_next()
            if member.state is WorkerState.DRAINING:
                await member.idle.wait()
        except WorkerDiedError as error:
            self._bury(member, error)
        if member.state is WorkerState.DRAINING:
            await self._close(member)
            member.become(WorkerState.GONE)
            del self._members[member.name]

    async def _make(self, member: Member[W]) -> W | None:
        """The worker; None if it was told to leave before it was up."""
        if member.leaving:
            return None
        member.making = asyncio.ensure_future(self._factory(member.name))
        try:
            worker = await member.making
            self._has_been_up = True
            return worker
        except WorkerDiedError:
            raise
        except RlhfRayError as error:
            if not self._has_been_up:
                raise
            raise WorkerDiedError(f"{member.name} could not start, as others did before: {error}") from error
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            return None  # only ``_fit`` cancels the making: the worker is to leave
        finally:
            member.making = None

    def _bury(self, member: Member[W], error: WorkerDiedError) -> None:
        """A worker died. Everyone who was waiting for it reports it; the first report counts."""
        if member.state is WorkerState.DEAD:
            return
        leaving, node_lost = member.leaving, isinstance(error, NodeLostError)
        member.become(WorkerState.DEAD)
        member.news.set()
        counts = not leaving and not node_lost
        self.deaths += not leaving
        if counts and self._max_restarts is not None and self._restarts >= self._max_restarts + self._pardoned():
            fatal = WorkerDiedError(
                f"{member.name} died and {self.section}.max_restarts = {self._max_restarts} replacements are used up; "
                f"mend the cause, or raise {self.section}.max_restarts: {error}"
            )
            # In a task of its own too: whoever reports it may be waited for by nobody any more.
            self._spawn(_raise(fatal), f"give up {self.kind}")
            raise fatal from error
        self._restarts += counts
        fate = f"replacing it ({self._restarts} of {self._max_restarts})" if self._max_restarts else "replacing it"
        if leaving:
            fate = "it was leaving"
        elif node_lost and self._shrink_to is not None and self.wanted > self._shrink_to:
            self.wanted -= 1
            fate = f"its node is gone, going on with {self.wanted}"
        elif node_lost:
            fate = "its node is gone, another one starts as soon as there is room"
        log.warning("%s died: %s; %s", member.name, error, fate)
        self._spawn(self._replace(member), f"replace {member.name}")

    def _pardoned(self) -> int:
        """Earlier deaths that do not count yet: quarantine may end what they come from."""
        assert self._max_restarts is not None
        return len(self._on_trial) if self._max_restarts >= self._max_prompt_tries else 0

    async def _replace(self, member: Member[W]) -> None:
        # What the dead worker still holds (its cores, its memory) is freed first: the new one may need it.
        await self._close(member)
        del self._members[member.name]
        self._fit(restarts=member.restarts + 1)

    async def _close(self, member: Member[W]) -> None:
        if member.worker is None:
            return
        try:
            await member.worker.close()
        except WorkerDiedError as error:
            log.debug("%s was dead when it was closed: %s", member.name, error)
        member.worker = None

    def _spawn(self, life: Coroutine[None, None, None], name: str) -> None:
        assert self._group is not None, "start() comes first"
        task = self._group.create_task(life, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _raise(error: Exception) -> None:
    raise error


def _is_cancelled() -> bool:
    """Whether this task itself was cancelled, and not only what it waited for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
