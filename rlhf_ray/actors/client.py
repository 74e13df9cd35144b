"""The driver's side of an actor of ours: where it is, whether it still gets on with its work, and why it is gone."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import ray
from ray.exceptions import NodeDiedError, ObjectLostError, RayError, RayTaskError

from rlhf_ray.actors.evidence import Evidence, gather_evidence
from rlhf_ray.actors.pulse import LOADING, Place, Pulse
from rlhf_ray.cluster import DEATHS, node_is_gone, raise_own
from rlhf_ray.errors import DataLostError, NodeLostError, WorkerDiedError

log = logging.getLogger("rlhf_ray.cluster")

PULSE_SECONDS = 2.0
"""How often a worker is asked how it is doing."""

DOUBT_SECONDS = 2.0
REFUSALS = 2
"""While a worker does not answer, its node is looked at so often; one that refuses so many times in a row is gone. Ray
takes several times as long to notice."""

LOADING_FACTOR = 6
"""How many times longer than other work the loading of a model may go on without a sign of progress."""

CAUSE_CHARACTERS = 300
"""Of Ray's account of a death that a message repeats."""

WITH_ITS_NODE = "its node has died"
"""How Ray says so of an actor that it had sent to a node which was gone already, and that has no place yet."""


class ActorClient:
    """What the clients of our actors have in common. The actor is a ``PulsingWorker``.

    From the moment it is placed it is watched: one that has work and makes no progress for ``hang_timeout_s`` (loading:
    six times that), or does not answer for so long, is ended, and every call under way raises ``WorkerDiedError``. Time
    in which this process did not run itself, as after Ctrl-Z, does not count.
    """

    def __init__(self, name: str, actor: Any, *, hang_timeout_s: float) -> None:
        self.name = name
        self.node = ""
        self._actor = actor
        self._hang_timeout_s = hang_timeout_s
        self._calls = 0
        self._place: Place | None = None
        self._pulse: Pulse | None = None
        self._watching: asyncio.Task[None] | None = None
        self._verdict: asyncio.Task[WorkerDiedError] | None = None

    @property
    def is_dying(self) -> bool:
        """It is being found out why it is gone; every call of it ends soon."""
        return self._verdict is not None and not self._verdict.done()

    @property
    def is_placed(self) -> bool:
        """The process was seen running."""
        return self._place is not None

    async def placed(self) -> None:
        """Wait until the actor's process runs somewhere."""
        if self._place is None:
            self._place = await self.answer(self._actor.place.remote())
        if self._watching is None or self._watching.cancelled():  # one ends with the event loop that it began in
            self._watching = asyncio.create_task(self._watch(), name=f"watch {self.name}")
        self.node = f"{self._place.address}/{self._place.node_id[:8]}"

    async def ready(self, *args: Any) -> None:
        """Wait until the actor has loaded what it needs; ``args`` go to its own ``ready``."""
        await self.placed()
        await self.answer(self._actor.ready.remote(*args))

    async def close(self) -> None:
        """End the actor, placed or not."""
        self.kill()

    def kill(self) -> None:
        """End the process at once."""
        if self._watching is not None:
            self._watching.cancel()
        ray.kill(self._actor)

    async def answer(self, ref: Any) -> Any:
        """The result of a call.

        Raises:
            WorkerDiedError: the actor is gone, or hung and was ended; ``NodeLostError`` if its node is gone.
            DataLostError: an argument of the call is.
            RlhfRayError: one that the actor raised.
        """
        answer = asyncio.wrap_future(ref.future())
        self._calls += 1
        try:
            if self._watching is not None:
                await asyncio.wait({answer, self._watching}, return_when=asyncio.FIRST_COMPLETED)
                if not answer.done() and self._verdict is not None:
                    raise await asyncio.shield(self._verdict)
                if self._watching.done() and not self._watching.cancelled():
                    self._watching.result()  # a watch that failed is not swallowed
            return await answer
        except DEATHS as error:
            raise await asyncio.shield(self._judge(str(error), hung=False)) from error
        except ObjectLostError as error:
            raise DataLostError(f"what {self.name} was to read went with the node that held it") from error
        except RayTaskError as error:
            raise_own(error)
            raise
        finally:
            self._calls -= 1
            answer.cancel()

    async def _watch(self) -> None:
        """Returns when the worker has died or hangs, with ``_verdict`` set."""
        quiet = unasked = 0.0
        while True:
            began = time.monotonic()
            try:
                pulse = await self._next_pulse()
            except TimeoutError:
                self._judge(f"its process did not answer for {self._hang_timeout_s:g} s (hang_timeout_s)", hung=True)
                return
            except DEATHS as error:
                self._judge(str(error), hung=False)
                return
            except RayError as error:
                log.warning("%s could not be asked how it is doing, and is asked again: %s", self.name, error)
                await asyncio.sleep(PULSE_SECONDS)
                unasked += _lived(began)
                if unasked > self._hang_timeout_s:
                    self._judge(f"it cannot be asked how it is doing ({error})", hung=True)
                    return
                continue
            unasked = 0.0
            before, self._pulse = self._pulse, pulse
            idle = not pulse.busy and (pulse.bounded or not self._calls)
            if before is None or idle or pulse.progress != before.progress:
                quiet = 0.0
            limit = self._hang_timeout_s * (LOADING_FACTOR if pulse.phase.startswith(LOADING) else 1)
            if quiet > limit:
                self._judge(f"no progress for {limit:g} s (hang_timeout_s = {self._hang_timeout_s:g})", hung=True)
                return
            await asyncio.sleep(min(PULSE_SECONDS, self._hang_timeout_s / 4))
            quiet += _lived(began)

    async def _next_pulse(self) -> Pulse:
        """What the worker says of itself.

        Raises:
            TimeoutError: it says nothing for ``hang_timeout_s``.
            NodeDiedError: its node does not answer, twice in a row.
        """
        assert self._place is not None
        pulse: asyncio.Future[Pulse] = asyncio.wrap_future(self._actor.pulse.remote().future())
        refusals, waited, began = 0, 0.0, time.monotonic()
        try:
            while not (await asyncio.wait({pulse}, timeout=min(DOUBT_SECONDS, self._hang_timeout_s)))[0]:
                refusals = refusals + 1 if await asyncio.to_thread(node_is_gone, self._place.node_id) else 0
                if refusals == REFUSALS:
                    raise NodeDiedError("its node does not answer")
                waited, began = waited + _lived(began), time.monotonic()
                if waited >= self._hang_timeout_s:
                    raise TimeoutError
            return pulse.result()
        finally:
            pulse.cancel()

    def _judge(self, cause: str, *, hung: bool) -> asyncio.Task[WorkerDiedError]:
        """Find out what became of the worker, once; whoever waits for it is told the same."""
        if self._verdict is None:
            self._verdict = asyncio.create_task(self._find_out(cause, hung=hung), name=f"what became of {self.name}")
        return self._verdict

    async def _find_out(self, cause: str, *, hung: bool) -> WorkerDiedError:
        told = " ".join(cause.split())[:CAUSE_CHARACTERS]
        if self._place is None:
            kind = NodeLostError if WITH_ITS_NODE in cause else WorkerDiedError
            return kind(f"{self.name} died while it started: {told}")
        if await asyncio.to_thread(node_is_gone, self._place.node_id):
            return NodeLostError(f"{self.name} died{self._last_seen()}: its node is gone, and its log with it; {told}")
        found = await gather_evidence(self._place, hung=hung)
        if hung:
            log.warning("%s hung; its stacks: %s", self.name, found.stacks or "none, the process does not run")
        return WorkerDiedError(f"{self.name} {'hung' if hung else 'died'}{self._last_seen()}: {told}{_account(found)}")

    def _last_seen(self) -> str:
        if self._pulse is None:
            return " while it started"
        doing = "while it had nothing to do" if self._pulse.phase == "idle" else f"while {self._pulse.phase}"
        return f" {doing} (peak memory {self._pulse.peak_bytes / 1e9:.2f} GB)"


def _lived(began: float) -> float:
    """Seconds since then, but for time in which this process cannot have run."""
    return min(time.monotonic() - began, DOUBT_SECONDS + 2 * PULSE_SECONDS)


def _account(found: Evidence) -> str:
    """The evidence as the end of a message."""
    full = f"; {found.full_shm}" if found.full_shm else ""
    lines = "".join(f"\n  {line}" for line in found.log)
    return full + (f"; its log ends:{lines}" if lines else "; its log is empty")
