"""The Ray cluster underneath: connect, check that the run fits, start actors, and say what is being waited for."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.autoscaler.sdk import request_resources
from ray.exceptions import ActorUnschedulableError, NodeDiedError, OutOfMemoryError, RayActorError, RayTaskError

from rlhf_ray.config import SPIN_COUNT, RunConfig, TrainerConfig
from rlhf_ray.errors import ResourceError, RlhfRayError, WorkerDiedError

log = logging.getLogger("rlhf_ray.cluster")

WAIT_NOTICE_SECONDS = 10.0

DEATHS = (RayActorError, OutOfMemoryError, NodeDiedError, ActorUnschedulableError)
"""How Ray says that an actor is gone: crashed or killed, by its memory monitor, with its node, or never placed."""

NODE_ANSWER_SECONDS = 3.0
"""A node that takes longer to accept a connection is taken for gone."""

WORKER_ENV: Mapping[str, str] = {
    # Several workers share the cores of a small machine. A thread that spins for long takes them from the others, one
    # that sleeps at once is slow to wake between two small kernels: some tens of microseconds of spinning cost least.
    "GOMP_SPINCOUNT": SPIN_COUNT,
    # Activations come and go each step: kept in the process, they cost no page faults. The largest tensors (logits)
    # are given back: kept, they would leave holes that nothing else fills.
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_V2_ENABLED": "1",
}
"""Environment of every worker process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """Workers of one kind and what each reserves."""

    section: str
    count: int
    num_cpus: float
    num_gpus: float


@contextmanager
def connected() -> Iterator[None]:
    """A Ray cluster for the block: the one this process is in (a submitted job, ``RAY_ADDRESS``), else a local one.

    A local cluster is ended with the block; a cluster that was there before is left as it was.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    if not address:
        options |= {"address": "local", "include_dashboard": False, "num_cpus": os.cpu_count()}
    log.info("connecting to %s", f"the Ray cluster at {address}" if address else "a new local Ray cluster")
    ray.init(**options)
    try:
        yield
    finally:
        ray.shutdown()
        _forget_serve()


def _forget_serve() -> None:
    """Drop Serve's client of the cluster that was left.

    It survives ``ray.shutdown`` and tells clusters apart by the job's id, and in every local cluster the first job has
    the same id: kept, it would send the next cluster's calls to a controller that is gone. The public call,
    ``serve.shutdown``, prints errors of Ray's.
    """
    if "ray.serve" in sys.modules:  # its import takes a second and a half, and some commands never serve
        from ray.serve.context import _set_global_client

        _set_global_client(None)


def check_resources(needs: Sequence[Need]) -> None:
    """Refuse a run that the cluster can never hold.

    Raises:
        ResourceError: naming each section, what it asks for and what the cluster has.
    """
    total = ray.cluster_resources()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for resource, amount in (("CPU", lambda n: n.num_cpus), ("GPU", lambda n: n.num_gpus)):
        asked = sum(n.count * amount(n) for n in needs)
        there = total.get(resource, 0.0)
        for need in needs:
            largest = max((node.get(resource, 0.0) for node in nodes), default=0.0)
            if amount(need) > largest + 1e-6:
                raise ResourceError(
                    f"{need.section}.num_{resource.lower()}s = {amount(need):g} and no node of the cluster has more "
                    f"than {largest:g} {resource}s; lower it, or add a larger node"
                )
        if asked > there + 1e-6:
            parts = ", ".join(f"{n.section} {n.count} x {amount(n):g}" for n in needs if amount(n))
            knobs = " or ".join(f"{n.section}.num_{resource.lower()}s" for n in needs if amount(n))
            raise ResourceError(
                f"the run asks for {asked:g} {resource}s ({parts}) and the cluster has {there:g}; "
                f"lower {knobs}, lower a count, or add nodes"
            )


def worker_needs(config: RunConfig) -> list[Need]:
    """What the PPO loop of this configuration reserves."""
    return [
        Need(section=name, count=count, num_cpus=section.num_cpus, num_gpus=section.num_gpus)
        for name, count, section in (
            ("generator", config.generator.needed, config.generator),
            ("reference", config.reference.needed, config.reference),
            ("learner", config.learner.ranks, config.learner),
            ("serve", config.serve.replicas if config.serves_reward else 0, config.serve),
        )
        if count
    ]


def trainer_need(section: TrainerConfig) -> Need:
    """What training with the workers of this section reserves."""
    return Need(
        section=section.section, count=section.num_workers, num_cpus=section.num_cpus, num_gpus=section.num_gpus
    )


def worker_env(threads: int) -> dict[str, str]:
    """Environment of a worker process with so many OMP threads; 0: as many as this machine has cores."""
    return dict(WORKER_ENV) | {"OMP_NUM_THREADS": str(threads or os.cpu_count() or 1)}


def start_actor(
    cls: type,
    *args: Any,
    num_cpus: float,
    num_gpus: float,
    threads: int = 0,
    concurrency: int | None = None,
    **kwargs: Any,
) -> Any:
    """Start a plain class as a Ray actor; returns its handle at once (``wait_ready`` waits for it).

    Its ``CONCURRENCY_GROUPS``, if it has some, are Ray's: name → calls that a group may have under way.

    Args:
        concurrency: calls an async actor may have under way.
        threads: OMP threads of the process; 0: as many as this machine has cores, which a role that knows better
            (``set_threads``) replaces by the cores of its own node.
    """
    options: dict[str, Any] = {"num_cpus": num_cpus, "num_gpus": num_gpus, "max_restarts": 0, "max_task_retries": 0}
    if concurrency:
        options["max_concurrency"] = concurrency
    if groups := getattr(cls, "CONCURRENCY_GROUPS", None):
        options["concurrency_groups"] = groups
    return ray.remote(runtime_env={"env_vars": worker_env(threads)}, **options)(cls).remote(*args, **kwargs)


def node_is_gone(node_id: str) -> bool:
    """Whether a node has left the cluster, also where the cluster has not taken note of that yet."""
    node = next((node for node in ray.nodes() if node["NodeID"] == node_id), None)
    if node is None or not node["Alive"]:
        return True
    # A node that is cut off counts as alive until it has missed several health checks: ask its manager.
    try:
        address = node["NodeManagerAddress"], node["NodeManagerPort"]
        with socket.create_connection(address, timeout=NODE_ANSWER_SECONDS):
            return False
    except OSError:
        return True


def job_is_alive(job_id: str) -> bool:
    """Whether the driver of a job of this cluster still runs."""
    return any(job["JobID"] == job_id and not job["IsDead"] for job in ray._private.state.jobs())


def room_for(need: Need) -> int:
    """How many more workers of a kind the nodes have room for at this moment."""
    free = ray._private.state.available_resources_per_node()  # the public call adds all nodes up
    amounts = {"CPU": need.num_cpus, "GPU": need.num_gpus}
    asked = {resource: amount for resource, amount in amounts.items() if amount}
    if not asked:
        return sys.maxsize
    return sum(
        min(int((node.get(resource, 0.0) + 1e-6) // amount) for resource, amount in asked.items())
        for node in free.values()
    )


def ask_autoscaler(needs: Sequence[Need]) -> None:
    """Have Ray's autoscaler, if there is one, hold nodes for these workers; for none: take the wish back.

    A cluster keeps one such wish, the last one.
    """
    request_resources(
        bundles=[
            {resource: amount for resource, amount in (("CPU", n.num_cpus), ("GPU", n.num_gpus)) if amount}
            for n in needs
            for _ in range(n.count)
            if n.num_cpus or n.num_gpus
        ]
    )


async def wait_ready(starting: Mapping[str, Awaitable[Any]], *, notice: Callable[[str], None] = log.info) -> None:
    """Wait until every named actor has answered, saying every few seconds which have not.

    Raises:
        WorkerDiedError: an actor ended while starting, with its cause.
    """
    tasks = {asyncio.ensure_future(_answered(name, answer)): name for name, answer in starting.items()}
    began, waiting = time.monotonic(), set(tasks)
    try:
        while waiting:
            done, waiting = await asyncio.wait(waiting, timeout=WAIT_NOTICE_SECONDS)
            for task in done:
                task.result()
            if waiting:
                names = ", ".join(sorted(tasks[task] for task in waiting))
                notice(f"waiting for {names} to start ({time.monotonic() - began:.0f} s){shortage()}")
    finally:
        for task in waiting:
            task.cancel()


def raise_own(error: RayTaskError) -> None:
    """Raise an error of rlhf_ray that came up in another process without Ray's account of it; leave any other alone."""
    if isinstance(error.cause, RlhfRayError):
        raise error.cause from error


async def _answered(name: str, answer: Awaitable[Any]) -> None:
    try:
        await answer
    except DEATHS as error:
        raise WorkerDiedError(f"{name} ended while starting: {error}") from error


def shortage() -> str:
    """What is free, so that a wait for placement explains itself."""
    free = ray.available_resources()
    return f"; free: {free.get('CPU', 0):g} CPUs, {free.get('GPU', 0):g} GPUs"


class PeakMemory:
    """Watches the memory of this process and all its descendants (of a local cluster: every worker and Ray itself).

    Proportional set size, so memory that processes share is counted once. Descendants on other nodes are not seen.
    """

    def __init__(self, *, every_seconds: float = 5.0) -> None:
        self._every = every_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)
        self.peak_bytes = 0

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._every):
            me = psutil.Process()
            total = sum(_proportional_bytes(process) for process in [me, *me.children(recursive=True)])
            self.peak_bytes = max(self.peak_bytes, total)


def _proportional_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0  # it ended between being listed and being looked at
