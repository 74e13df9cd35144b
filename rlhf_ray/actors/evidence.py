"""What a process that died or hangs leaves behind: the end of its log, its stacks, and whether memory ran out."""

from __future__ import annotations

import asyncio
import glob
import logging
import os
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlhf_ray.actors.pulse import Place

log = logging.getLogger("rlhf_ray.cluster")

LAST_LINES = 4
"""Lines of each of a process's two logs that an error repeats, and the most characters of each."""
LINE_CHARACTERS = 200
TAIL_BYTES = 64_000

STACKS_SECONDS = 4.0
"""A process that can still write its stacks has done so by then; most do so at once."""

NODE_SECONDS = 30.0
"""A node that has not looked at one of its processes by then is not waited for."""

SHM = "/dev/shm"
SHM_FULL = 0.02
"""With a smaller share of it free it counts as full."""

RAYS_OWN = (":job_id:", ":actor_name:", ":task_name:")
"""How lines begin that Ray writes into the logs for its own use."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What was found on the node."""

    log: tuple[str, ...] = ()
    stacks: str = ""
    full_shm: str = ""


async def gather_evidence(place: Place, *, hung: bool) -> Evidence:
    """Look at a process on its node. One that hangs is ended there, after it was asked for its stacks."""
    if place.node_id == ray.get_runtime_context().get_node_id():
        return await asyncio.to_thread(examine, place, hung=hung)
    there = NodeAffinitySchedulingStrategy(place.node_id, soft=False)
    task: Any = ray.remote(num_cpus=0, max_retries=0)(examine).options(scheduling_strategy=there)
    try:
        async with asyncio.timeout(NODE_SECONDS):
            found: Evidence = await task.remote(place, hung=hung)
            return found
    except (RayError, TimeoutError) as error:
        return Evidence(log=(f"(could not be read on {place.address}: {type(error).__name__})",))


def examine(place: Place, *, hung: bool) -> Evidence:
    """``gather_evidence``, on the node of the process."""
    lines = tuple(_last_lines(f"{place.logs}.out") + _last_lines(f"{place.logs}.err"))
    full_shm = _full_shm()
    stacks = _end_with_stacks(place) if hung else ""
    return Evidence(log=lines, stacks=stacks, full_shm=full_shm)


def _last_lines(pattern: str) -> list[str]:
    lines = (line.rstrip() for line in _text(pattern).splitlines())
    return [line[:LINE_CHARACTERS] for line in lines if line and not line.startswith(RAYS_OWN)][-LAST_LINES:]


def _text(pattern: str, since: int | None = None) -> str:
    """The end of a log file, or what was written after so many bytes; empty where there is none."""
    for name in glob.glob(pattern):
        with Path(name).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES) if since is None else since)
            return file.read().decode(errors="replace")
    return ""


def _end_with_stacks(place: Place) -> str:
    """End the process; what every thread of it was at, empty where it was stopped or is gone.

    It is killed, since a process that is stopped would hear of no request to end.
    """
    errors = f"{place.logs}.err"
    before = sum(Path(name).stat().st_size for name in glob.glob(errors))
    stacks = ""
    try:
        os.kill(place.pid, signal.SIGUSR1)
        end = time.monotonic() + STACKS_SECONDS
        while time.monotonic() < end:
            time.sleep(STACKS_SECONDS / 20)
            longer = _text(errors, before)
            if longer and longer == stacks:
                break
            stacks = longer
        os.kill(place.pid, signal.SIGKILL)
    except ProcessLookupError:
        log.debug("process %d was gone before it was ended", place.pid)
    return stacks


def _full_shm() -> str:
    if not Path(SHM).exists():
        return ""
    shm = shutil.disk_usage(SHM)
    if shm.free > SHM_FULL * shm.total:
        return ""
    return f"the node's {SHM} is full ({shm.free / 1e6:.0f} MB of {shm.total / 1e6:.0f} MB free)"
