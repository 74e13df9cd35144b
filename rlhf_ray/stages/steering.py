"""The run's side of ``live.py``: it says how it stands, takes wishes, and lets its pools follow the cluster.

    every second        control/scale.json ──► the pools' wanted numbers
    every other one     room on the nodes ──► pools with a ``max`` grow     everything ──► status.json

A pool with a ``max`` grows into room that is free at the moment, after all other workers have theirs; it never queues
up for more, so it takes nothing that a dead worker's successor waits for. What it has no room for yet it asks Ray's
autoscaler for. A pool without a ``max`` does queue up; where it got the place of another pool's last worker, it lends
one back. A worker that goes with its node is let go (``WorkerPool.shrink_to``) until there is room again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from rlhf_ray.actors.starting import ActorStarter
from rlhf_ray.cluster import Need, ask_autoscaler, room_for, worker_needs
from rlhf_ray.config import PoolSection, RunConfig
from rlhf_ray.metrics import STATUS_FILE, read_json, write_json
from rlhf_ray.pipeline.groups import task_group
from rlhf_ray.pipeline.loop import Pipeline
from rlhf_ray.pipeline.workers import WorkerPool, WorkerState
from rlhf_ray.stages.live import POOLS, SCALE_FILE, refusal_of
from rlhf_ray.stages.serve import Replicas, replicas_of

log = logging.getLogger("rlhf_ray.ppo")

TICK_SECONDS = 1.0

STARVED_TICKS = 30
"""So long a pool may have nobody, and nowhere to start one, before another one makes room."""

SERVE_SECONDS = 5.0
"""Serve's word on its replicas is not waited for any longer."""

DISK_SECONDS = 10.0
"""A status that takes longer to write is not waited for."""

PASSING = (OSError, RayError, RayServeException)
"""A file that cannot be written, a cluster that does not answer: said, and tried again."""


@dataclass
class ElasticPool:
    """A pool, its section of the configuration, and what starts its workers."""

    section: PoolSection
    pool: WorkerPool[Any]
    starter: ActorStarter[Any]

    def __post_init__(self) -> None:
        self.ceiling = self.section.max
        """Most that a pool which follows the cluster grows to; None: it does not."""
        self.before_loan: int | None = None
        """What was wanted before it lent another pool a place; None: it has not."""

    def lend(self) -> None:
        """Do without one worker, and without those that wait for a place: they would take that one again."""
        if self.before_loan is None:
            self.before_loan = self.pool.wanted
        self.pool.want(self.pool.size() - 1)

    def take_back(self) -> None:
        """Want as many as before; a pool that follows the cluster grows by itself."""
        if self.before_loan is not None and self.ceiling is None:
            self.pool.want(self.before_loan)
        self.before_loan = None

    def scale(self, number: int) -> None:
        """Take a person's wish."""
        self.before_loan = None
        if self.ceiling is None:
            self.pool.want(number)
        else:
            self.ceiling = number
            self.pool.want(min(number, self.pool.wanted))

    def status(self) -> dict[str, Any]:
        """What people may ask for, and how many wait for a place."""
        return {
            "min": self.section.min or 1,
            "max": self.section.max,
            "asked": next(n for n in (self.ceiling, self.before_loan, self.pool.wanted) if n is not None),
            "unplaced": len(self.starter.unplaced),
        }


class Steering:
    """Keeps a run's status and steers its pools while the run goes on.

    Args:
        pools: by their names in ``live.POOLS``.
        service: name of the Serve application that scores; None where there is none.
    """

    def __init__(
        self, config: RunConfig, pipeline: Pipeline, pools: dict[str, ElasticPool], *, service: str | None
    ) -> None:
        self._config = config
        self._pipeline = pipeline
        self._pools = pools
        self._service = service
        self._taken: dict[str, Any] = {}
        self._replicas = Replicas()
        self._look_at_replicas: asyncio.Task[Replicas] | None = None
        self._starved = 0
        """Ticks in a row in which a pool had nobody and no place."""
        self._over = asyncio.Event()
        self._writing = threading.Lock()  # a thread may still write while the last status is written
        self._follows = any(pool.ceiling is not None for pool in pools.values())

    @contextlib.asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Steer for the block, and leave a last status."""
        (self._config.run_dir / SCALE_FILE).unlink(missing_ok=True)  # a wish to an earlier run
        try:
            async with task_group() as tasks:
                tasks.create_task(self._keep(), name="steering")
                try:
                    yield
                finally:
                    self._over.set()
        finally:
            try:
                self._write(self._status() | {"ended": True})
                if self._follows:
                    ask_autoscaler([])
            except PASSING as error:  # the run's own outcome must not be hidden behind it
                log.warning("the run's last status was not written, or its request to the autoscaler stands: %s", error)

    def word_of_serve(self) -> str:
        """On a reward model that nobody serves, to be added to what is said of a run that stands still."""
        if self._service is None or "RUNNING" in self._replicas.states:
            return ""
        if not self._replicas.states:
            return ". Ray Serve says nothing of the reward model"
        return f". The reward model has no replica that is up; Ray Serve says: {self._replicas.message or 'nothing'}"

    async def _keep(self) -> None:
        tick = 0
        if self._follows:
            await asyncio.to_thread(ask_autoscaler, self._needs())
        while not self._over.is_set():
            try:
                taken = await self._take_wish()
                self._make_room()
                if taken or tick % 2 == 0:
                    await self._follow()
                    if self._service is not None:
                        await self._see_replicas(self._service)
                    await asyncio.to_thread(self._write, self._status())
            except PASSING as error:
                self._pipeline.may_stand_still(False)  # what was seen of the replicas may be old
                log.warning("the run's status could not be kept this time: %s", error)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), TICK_SECONDS)
            tick += 1

    async def _take_wish(self) -> bool:
        """Do what ``scale`` asked for, once; whether there was something."""
        path = self._config.run_dir / SCALE_FILE
        try:
            wish = await asyncio.to_thread(read_json, path)
        except (ValueError, TypeError) as error:
            log.warning("%s is no wish that `rlhf-ray scale` wrote, and was removed: %s", path, error)
            path.unlink(missing_ok=True)
            return False
        if not wish or wish.get("id") == self._taken.get("id"):
            return False
        wanted = {name: wish[name] for name in POOLS if name in wish}
        refusal = refusal_of(wanted, {name: pool.status() for name, pool in self._pools.items()})
        self._taken = wish | {"refused": refusal}
        if refusal:
            log.warning("scale was refused: %s", refusal)
            return True
        log.info("scale: %s", ", ".join(f"{number} {name}" for name, number in wanted.items()))
        for name, number in wanted.items():
            self._pools[name].scale(number)
        if self._follows:
            await asyncio.to_thread(ask_autoscaler, self._needs())
        return True

    async def _follow(self) -> None:
        """Let pools grow into the room that there is; references first, since generators are of no use without."""
        for name in reversed([name for name in POOLS if name in self._pools]):
            grown = self._pools[name]
            if grown.ceiling is None or grown.pool.wanted >= grown.ceiling:
                continue
            room = await asyncio.to_thread(room_for, self._need(name))
            # Whoever is not placed yet will take room that counts as free now.
            room -= sum(len(pool.starter.unplaced) for pool in self._pools.values())
            if room > 0:
                grown.pool.want(min(grown.ceiling, grown.pool.wanted + room))
                log.info("the cluster has room for more %s: going on with %d", name, grown.pool.wanted)
                return  # what is left is known only once they are placed

    def _make_room(self) -> None:
        """One tick: a pool that has nobody gets the place of a worker that another pool can do without.

        Ray gives a place that becomes free to whoever asked first, be it a generator beyond the least when the last
        reference has just died; and then all of them would wait for ever.
        """
        if not any(pool.starter.unplaced and not pool.pool.size() for pool in self._pools.values()):
            self._starved = 0
            for pool in self._pools.values():
                pool.take_back()
            return
        self._starved += 1
        if any(WorkerState.DRAINING in pool.pool.states().values() for pool in self._pools.values()):
            self._starved = 0  # a place is about to become free
        if self._starved < STARVED_TICKS:
            return
        self._starved = 0
        for name, pool in self._pools.items():
            if pool.pool.size() > pool.section.needed:
                pool.lend()
                log.warning("another pool has nobody and no place: going on with %d %s", pool.pool.wanted, name)
                return

    async def _see_replicas(self, service: str) -> None:
        """Serve's word on the replicas; none where it does not answer. A question stays open for as long as it may.

        A run may stand still while its replicas wait for a place or load, as while its workers do.
        """
        if self._look_at_replicas is None:
            self._look_at_replicas = asyncio.create_task(asyncio.to_thread(replicas_of, service))
        answered, _ = await asyncio.wait({self._look_at_replicas}, timeout=SERVE_SECONDS)
        self._replicas = Replicas()
        try:
            if answered:
                look, self._look_at_replicas = self._look_at_replicas, None
                self._replicas = look.result()
            else:
                log.warning("Ray Serve says nothing of the reward model's replicas")
        finally:
            self._pipeline.may_stand_still(self._replicas.are_coming)

    def _need(self, name: str) -> Need:
        section = name.removesuffix("s")
        return next(need for need in worker_needs(self._config) if need.section == section)

    def _needs(self) -> list[Need]:
        """All workers that the run would have if there was room."""
        asked = {name.removesuffix("s"): pool.status()["asked"] for name, pool in self._pools.items()}
        return [replace(need, count=asked.get(need.section, need.count)) for need in worker_needs(self._config)]

    def _status(self) -> dict[str, Any]:
        status = self._pipeline.status()
        for name, pool in self._pools.items():
            status[name] = pool.status() | status[name]
        return {
            "at": time.time(),
            "ended": False,
            **status,
            "replicas": dict(self._replicas.states),
            "scale": self._taken or None,
        }

    def _write(self, status: dict[str, Any]) -> None:
        if not self._writing.acquire(timeout=DISK_SECONDS):
            raise TimeoutError(f"a status is still being written to {self._config.run_dir} after {DISK_SECONDS:g} s")
        try:
            write_json(self._config.run_dir / STATUS_FILE, status)
        finally:
            self._writing.release()
