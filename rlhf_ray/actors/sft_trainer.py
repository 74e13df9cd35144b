"""Supervised fine-tuning in Ray Train's workers: each runs ``roles/sft_trainer.py``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_ray.actors.train_workers import Job, OnProgress, Worker, policy_reader, run_workers
from rlhf_ray.data.demonstrations import TokenDemonstration


@dataclass(frozen=True, kw_only=True, slots=True)
class SFTJob(Job):
    """What the workers are to do."""

    train: Sequence[TokenDemonstration]
    holdout: Sequence[TokenDemonstration]
    """What the policy is tested on, before and after."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedSFT:
    """What came of it: the role's ``Fitted``, and the loss on the held-out responses."""

    loss: float
    steps: int
    per_second: float
    holdout_loss_before: float
    holdout_loss: float
    """Nats a token, of the saved policy."""


def train_on_ray(job: SFTJob, on_progress: OnProgress | None = None) -> TrainedSFT:
    """Train in Ray processes of the cluster that this process is connected to; returns when they are gone.

    Args:
        on_progress: called from another thread with the role's ``Progress``.

    Raises:
        ConfigError: the workers do not see the run's folder.
        RlhfRayError: whatever a worker raised.
        WorkerDiedError: a worker's process ended.
    """
    found = run_workers(
        _work,
        job,
        section=job.config.sft,
        model="the policy",
        on_progress=on_progress,
    )
    return TrainedSFT(**found)


def _work(job: SFTJob, worker: Worker) -> dict[str, Any] | None:
    """The first worker tests, saves, and returns the fields of a ``TrainedSFT``."""
    from rlhf_ray.models.loading import (
        load_policy_model,
        load_tokenizer,
        resolve_device,
        resolve_precision,
        return_freed_memory,
    )
    from rlhf_ray.roles.sft_trainer import fit_sft, response_loss
    from rlhf_ray.roles.trl_training import save_policy

    config, section, trust = job.config, job.config.sft, job.config.model.trust_remote_code
    device = resolve_device(config.device, section.num_gpus)
    reader = policy_reader(job, section)
    before = response_loss(reader(job.model_folder), job.holdout) if worker.first else 0.0
    return_freed_memory()
    tokenizer = load_tokenizer(job.model_folder, need_chat_template=False, trust_remote_code=trust)
    model = load_policy_model(job.model_folder, trust_remote_code=trust)
    fitted = fit_sft(
        model,
        tokenizer,
        job.train,
        section,
        seed=config.seed,
        device=device,
        dtype=resolve_precision(section.precision, device),
        scratch=job.scratch / "trainer",
        checkpoints=job.checkpoints,
        identity=job.identity,
        on_progress=worker.on_progress,
    )
    if not worker.first:
        return None
    save_policy(model, tokenizer, job.folder)
    del model
    return_freed_memory()  # the trainer's reference cycles held gradients and optimiser state
    return {
        "loss": fitted.loss,
        "steps": fitted.steps,
        "per_second": fitted.per_second,
        "holdout_loss_before": before,
        "holdout_loss": response_loss(reader(job.folder), job.holdout),
    }
