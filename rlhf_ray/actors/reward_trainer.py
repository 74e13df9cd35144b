"""The reward model's training on Ray: Ray Train starts the workers, and each runs ``roles/reward_trainer.py``.

    driver ── RewardJob ──► TorchTrainer ──► N workers (gloo or NCCL) share each batch
      ▲                                        worker 0 saves the model and scores the held-out pairs with it
      └─── progress.jsonl, the model ◄─────────┘       in the run's folder, which they all see

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray.train
from ray.train.torch import TorchTrainer

from rlhf_ray.cluster import DEATHS, WAIT_NOTICE_SECONDS, shortage, worker_env
from rlhf_ray.config import RunConfig
from rlhf_ray.data.preferences import TokenPair
from rlhf_ray.errors import ConfigError, RlhfRayError, WorkerDiedError

log = logging.getLogger("rlhf_ray.reward")

START_TRIES = 30
"""Starts of the workers, each of which waits a minute for its place in the cluster, before the run ends."""

_PROGRESS_FILE = "progress.jsonl"
_POLL_SECONDS = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardJob:
    """What the workers are to do."""

    config: RunConfig
    """With every "auto" resolved."""
    model_folder: str
    """Of the model whose backbone is trained."""
    train: Sequence[TokenPair]
    validation: Sequence[TokenPair]
    """Decide when to end and which weights to keep; may be empty."""
    score: Sequence[Sequence[Sequence[int]]]
    """Groups of sequences that the saved model scores, each group apart."""
    folder: Path
    """Empty; the model and its tokenizer go there. What lies beside it is thrown away afterwards."""
    checkpoints: Path
    identity: Mapping[str, Any]
    """What a run that goes on from these checkpoints must share with this one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedReward:
    """What came of it: the role's ``Fitted``, and the scores."""

    loss: float
    steps: int
    pairs_per_second: float
    validation_loss: float | None
    scores: list[list[float]]
    """Raw, group by group."""


def train_on_ray(job: RewardJob, on_progress: Callable[[Mapping[str, float]], None] | None = None) -> TrainedReward:
    """Train in Ray processes of the cluster that this process is connected to; returns when they are gone.

    Args:
        on_progress: called from another thread with the role's ``Progress``.

    Raises:
        ConfigError: the workers do not see the run's folder.
        RlhfRayError: whatever a worker raised.
        WorkerDiedError: a worker's process ended.
    """
    section = job.config.reward
    resources = {"CPU": section.num_cpus} | ({"GPU": section.num_gpus} if section.num_gpus else {})
    trainer = TorchTrainer(
        lambda: _work(job),  # closed over, not its configuration: that is sent to Ray Train's own processes too
        scaling_config=ray.train.ScalingConfig(
            num_workers=section.num_workers, use_gpu=section.num_gpus > 0, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=job.config.name,
            storage_path=str(job.folder.parent / "ray_train"),
            failure_config=ray.train.FailureConfig(controller_failure_limit=START_TRIES),
            worker_runtime_env={"env_vars": worker_env(section.threads)},
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    with _followed(job.folder.parent / _PROGRESS_FILE, on_progress), _plain_ctrl_c():
        try:
            return TrainedReward(**trainer.fit().return_value)
        except ray.train.TrainingFailedError as error:
            if (cause := _cause(error)) is None:
                raise
            raise cause from error


def _work(job: RewardJob) -> dict[str, Any] | None:
    """Runs in every worker; the first one saves, scores, and returns the fields of a ``TrainedReward``.

    The training libraries take seconds to import: neither the driver nor Ray Train's own processes need them.
    """
    from rlhf_ray.models.loading import (
        load_tokenizer,
        quiet,
        resolve_device,
        resolve_precision,
        return_freed_memory,
        set_threads,
    )
    from rlhf_ray.roles.reward_trainer import fit_reward_model, new_reward_model
    from rlhf_ray.roles.scorer import RewardScorer

    if not job.folder.is_dir():
        raise ConfigError(
            f"{job.folder.parent.parent} is not to be seen from a worker's node: "
            "set output_dir to a folder that all nodes share"
        )
    context, config, section = ray.train.get_context(), job.config, job.config.reward
    first = context.get_world_rank() == 0
    if context.get_world_size() == 1:
        os.environ.pop("LOCAL_RANK", None)  # with it, the trainer would keep a second copy of the gradients to share
    progress = job.folder.parent / _PROGRESS_FILE
    if first:
        progress.touch()
    set_threads(section.threads or max(1, len(os.sched_getaffinity(0)) // context.get_local_world_size()))
    device = resolve_device(config.device, section.num_gpus)
    tokenizer = load_tokenizer(
        job.model_folder, need_chat_template=False, trust_remote_code=config.model.trust_remote_code
    )
    model = new_reward_model(
        Path(job.model_folder),
        tokenizer,
        freeze_layers=section.freeze_layers,
        trust_remote_code=config.model.trust_remote_code,
    )
    fitted = fit_reward_model(
        model,
        tokenizer,
        job.train,
        section,
        seed=config.seed,
        device=device,
        dtype=resolve_precision(section.precision, device),
        scratch=job.folder.parent / "trainer",
        validation=job.validation,
        checkpoints=job.checkpoints,
        identity=job.identity,
        on_progress=(lambda seen: _append(progress, seen)) if first else None,
    )
    if not first:
        return None
    with quiet():
        model.cpu().save_pretrained(job.folder)
        tokenizer.save_pretrained(job.folder)
    del model
    return_freed_memory()  # the trainer's reference cycles held gradients and optimiser state
    # What is tested is what will be served: the saved folder, through the class that serves it.
    scorer = RewardScorer(
        job.folder,
        device=config.device,
        num_gpus=section.num_gpus,
        precision=section.precision,
        threads=section.threads,
        max_batch_size=config.serve.max_batch_size,
    )
    return asdict(fitted) | {"scores": [[score.raw for score in scorer.score_ids(group)] for group in job.score]}


def _append(path: Path, seen: Mapping[str, float]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(seen) + "\n")


@contextmanager
def _followed(path: Path, on_progress: Callable[[Mapping[str, float]], None] | None) -> Iterator[None]:
    """Hand on each row of ``path`` during the block, and say what is waited for until the file is there."""
    ended = threading.Event()
    with ThreadPoolExecutor(1, thread_name_prefix="reward-progress") as pool:
        following = pool.submit(_follow, path, on_progress or (lambda seen: None), ended)
        try:
            yield
        finally:
            ended.set()
        following.result()


def _follow(path: Path, on_progress: Callable[[Mapping[str, float]], None], ended: threading.Event) -> None:
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
            log.info("waiting for the reward model's workers to start (%.0f s)%s", said - began, shortage())
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


def _cause(error: Exception) -> RlhfRayError | None:
    """The deliberate error inside Ray Train's wrapping, or a worker's death; None where it is a bug."""
    found = [*getattr(error, "worker_failures", {}).values(), getattr(error, "controller_failure", None)]
    for failure in found:
        if isinstance(failure, RlhfRayError):
            return failure
    for failure in found:
        failure = getattr(failure, "health_check_failure", failure)
        if isinstance(failure, DEATHS):
            return WorkerDiedError(f"a worker that trained the reward model died: {failure}")
    return None
