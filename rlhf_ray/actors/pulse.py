"""What an actor of ours tells of itself while it works: what it is at, how far it is, and the memory it took."""

from __future__ import annotations

import asyncio
import faulthandler
import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import ray


class Place(NamedTuple):
    """Where an actor runs."""

    node_id: str
    address: str
    pid: int
    logs: str
    """Pattern of its log files, on its node."""


PULSE_GROUP = "pulse"
"""Ray's concurrency group of ``pulse``: it is answered also where as many other calls as may be are under way."""


LOADING = "loading"
"""How phases begin that may take far longer than others without a sign: a large model is read, or compiled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pulse:
    """An actor at one moment."""

    phase: str
    """What it is at, as in "died while sampling"."""
    progress: int
    """Pieces of work done since it started."""
    busy: bool
    """It has work under way that is to get on."""
    bounded: bool
    """It has work under way that ends by time limits of its own, or whose end somebody else watches."""
    peak_bytes: int
    """Most memory that the process has held."""


class PulsingWorker:
    """A worker that says where it runs and how it is doing. Async: it answers while its work runs in a thread."""

    CONCURRENCY_GROUPS: ClassVar = {PULSE_GROUP: 1}

    def __init__(self) -> None:
        self._phase = "idle"
        self._progress = 0
        self._counting = threading.Lock()
        self._watched = 0
        self._bounded = 0
        self._calls_loop: asyncio.AbstractEventLoop | None = None

    async def place(self) -> Place:
        """Answers as soon as the process runs. From then on SIGUSR1 has it write the stacks of its threads."""
        faulthandler.register(signal.SIGUSR1, file=2)
        self._calls_loop = asyncio.get_running_loop()
        return place()

    @ray.method(concurrency_group=PULSE_GROUP)
    async def pulse(self) -> Pulse:
        """Where it stands at this moment. ``place`` comes first."""
        assert self._calls_loop is not None
        # The group has an event loop of its own: a worker whose other loop stands still must not seem well.
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self._calls_loop))
        return Pulse(
            phase=self._phase,
            progress=self._progress,
            busy=self._watched > 0,
            bounded=self._bounded > 0,
            peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )

    def _advance(self) -> None:
        """The piece of work under way has got on."""
        self._progress += 1

    @contextmanager
    def _working(self, phase: str, *, bounded: bool = False) -> Iterator[None]:
        """A piece of work; several may be under way.

        Args:
            phase: one that begins with ``LOADING`` may take longer.
            bounded: see ``Pulse``.
        """
        with self._counting:
            self._phase = phase
            self._watched += not bounded
            self._bounded += bounded
        try:
            yield
        finally:
            with self._counting:
                self._progress += 1
                self._watched -= not bounded
                self._bounded -= bounded
                if not self._watched and not self._bounded:
                    self._phase = "idle"


def place() -> Place:
    """Where this process runs."""
    context = ray.get_runtime_context()
    folder = Path(ray._private.worker._global_node.get_logs_dir_path())  # no public name of the session's folder
    return Place(
        node_id=context.get_node_id(),
        address=ray.util.get_node_ip_address(),
        pid=os.getpid(),
        logs=str(folder / f"worker-{context.get_worker_id()}-*-{os.getpid()}"),
    )
