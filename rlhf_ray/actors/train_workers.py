"""Ray Train's edge: a work function runs in N workers, which share one ``torch.distributed`` group.

    driver ── work, Job ──► TorchTrainer ──► N workers (gloo or NCCL), each with a Worker that says who it is
      ▲                                        work(job, worker) in all of them; what the first one's returns comes back
      └─── progress.jsonl, the result ◄────────┘   in the job's scratch folder, which they all see

Progress is a file and not ``ray.train.report``: a report holds every worker up until Ray Train's controller has asked
for it, and the controller is another process again.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import ray.train
import ray.train.torch
from ray.train.torch import TorchTrainer

from rlhf_ray.cluster import DEATHS, WAIT_NOTICE_SECONDS, shortage, worker_env
from rlhf_ray.config import RunConfig, TrainerConfig
from rlhf_ray.errors import ConfigError, RlhfRayError, WorkerDiedError

if TYPE_CHECKING:
    from rlhf_ray.roles.reference import ReferenceModel

log = logging.getLogger("rlhf_ray.train")

START_TRIES = 30
"""Starts of the workers, each of which waits a minute for its place in the cluster, before the run ends."""

_PROGRESS_FILE = "progress.jsonl"
_POLL_SECONDS = 0.25

OnProgress = Callable[[Mapping[str, float]], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What every training's workers are told; each training adds its data."""

    config: RunConfig
    """With every "auto" resolved."""
    model_folder: str
    """Of the model that training starts from."""
    folder: Path
    """Empty; what is trained goes there. What lies beside it is thrown away afterwards."""
    checkpoints: Path
    identity: Mapping[str, Any]
    """What a run that goes on from these checkpoints must share with this one."""

    @property
    def scratch(self) -> Path:
        """A folder that the driver made in the run's folder, and throws away afterwards."""
        return self.folder.parent


@dataclass(frozen=True, kw_only=True, slots=True)
class Worker:
    """What a work function is told of the process that it runs in."""

    first: bool
    """It saves and measures for all of them."""
    on_progress: OnProgress | None
    """Reaches the driver; None in all but the first."""


AnyJob = TypeVar("AnyJob", bound=Job)


def run_workers(
    work: Callable[[AnyJob, Worker], Mapping[str, Any] | None],
    job: AnyJob,
    *,
    section: TrainerConfig,
    model: str,
    on_progress: OnProgress | None = None,
) -> Mapping[str, Any]:
    """Run ``work`` in Ray processes of the cluster that this process is connected to; returns when they are gone.

    Args:
        work: runs in every worker, where CPU threads and the GPU are set; what the first one returns is the result.
        section: how many workers, and what each reserves.
        model: what is trained, as messages call it: "the reward model".
        on_progress: called from another thread with what the first worker's was called with.

    Raises:
        ConfigError: the workers do not see the run's folder.
        RlhfRayError: whatever a worker raised.
        WorkerDiedError: a worker's process ended.
    """
    resources = {"CPU": section.num_cpus} | ({"GPU": section.num_gpus} if section.num_gpus else {})
    trainer = TorchTrainer(
        # Closed over, not its configuration: that is sent to Ray Train's own processes too.
        lambda: _in_worker(work, job, section),
        scaling_config=ray.train.ScalingConfig(
            num_workers=section.num_workers, use_gpu=section.num_gpus > 0, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=section.section,
            storage_path=str(job.scratch / "ray_train"),
            failure_config=ray.train.FailureConfig(controller_failure_limit=START_TRIES),
            worker_runtime_env={"env_vars": worker_env(section.threads)},
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    with _followed(job.scratch / _PROGRESS_FILE, on_progress, model), _plain_ctrl_c():
        try:
            result: Mapping[str, Any] = trainer.fit().return_value
            return result
        except ray.train.TrainingFailedError as error:
            if (cause := _cause(error, model)) is None:
                raise
            raise cause from error


def _in_worker(
    work: Callable[[AnyJob, Worker], Mapping[str, Any] | None], job: AnyJob, section: TrainerConfig
) -> Mapping[str, Any] | None:
    """The training libraries take seconds to import: neither the driver nor Ray Train's own processes need them."""
    import torch

    from rlhf_ray.models.loading import set_threads

    if not job.folder.is_dir():  # not the scratch folder: Ray Train makes that anew on a node that does not share it
        raise ConfigError(
            f"{job.config.run_dir} is not to be seen from a worker's node: "
            "set output_dir to a folder that all nodes share"
        )
    context = ray.train.get_context()
    if context.get_world_size() == 1:
        os.environ.pop("LOCAL_RANK", None)  # with it, the trainer would keep a second copy of the gradients to share
    if section.num_gpus:
        torch.cuda.set_device(ray.train.torch.get_device())  # the one that "cuda" means from here on
    set_threads(section.threads or max(1, len(os.sched_getaffinity(0)) // context.get_local_world_size()))
    if context.get_world_rank():
        return work(job, Worker(first=False, on_progress=None))
    progress = job.scratch / _PROGRESS_FILE
    progress.touch()
    return work(job, Worker(first=True, on_progress=partial(_append, progress)))


def policy_reader(job: Job, section: TrainerConfig) -> Callable[[str | Path], ReferenceModel]:
    """Opens a policy's folder for reading log-probabilities, as a worker of the section computes. In workers only."""
    import torch

    from rlhf_ray.models.loading import resolve_device
    from rlhf_ray.roles.reference import ReferenceModel

    return partial(
        ReferenceModel,
        device=resolve_device(job.config.device, section.num_gpus).type,
        precision=section.precision,
        max_batch_tokens=job.config.reference.max_batch_tokens,
        threads=torch.get_num_threads(),
        trust_remote_code=job.config.model.trust_remote_code,
    )


def _append(path: Path, seen: Mapping[str, float]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(seen) + "\n")


@contextmanager
def _followed(path: Path, on_progress: OnProgress | None, model: str) -> Iterator[None]:
    """Hand on each row of ``path`` during the block, and say what is waited for until the file is there."""
    ended = threading.Event()
    with ThreadPoolExecutor(1, thread_name_prefix="train-progress") as pool:
        following = pool.submit(_follow, path, on_progress or (lambda seen: None), ended, model)
        try:
            yield
        finally:
            ended.set()
        following.result()


def _follow(path: Path, on_progress: OnProgress, ended: threading.Event, model: str) -> None:
    began = said = time.monotonic()
    place = 0
    while True:
        over = ended.wait(_POLL_SECONDS)
        if path.is_file():
            with path.open("rb") as file:
                file.seek(place)
                rows = file.read().split(b"\n")[:-1]  # what follows the last line's end is still being written
            place += sum(len(row) + 1 for row in rows)
            for row in rows:
                on_progress(json.loads(row))
        elif time.monotonic() - said > WAIT_NOTICE_SECONDS:
            said = time.monotonic()
            log.info("waiting for the workers that train %s to start (%.0f s)%s", model, said - began, shortage())
        if over:
            return


@contextmanager
def _plain_ctrl_c() -> Iterator[None]:
    """KeyboardInterrupt on Ctrl-C, as anywhere else, once Ray Train has ended the workers.

    Its own handler ends the process instead, and would stay after the training.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, handler)


def _cause(error: Exception, model: str) -> RlhfRayError | None:
    """The deliberate error inside Ray Train's wrapping, or a worker's death; None where it is a bug."""
    found = [*getattr(error, "worker_failures", {}).values(), getattr(error, "controller_failure", None)]
    for failure in found:
        if isinstance(failure, RlhfRayError):
            return failure
    for failure in found:
        failure = getattr(failure, "health_check_failure", failure)
        if isinstance(failure, DEATHS):
            return WorkerDiedError(f"a worker that trained {model} died: {failure}")
    return None
