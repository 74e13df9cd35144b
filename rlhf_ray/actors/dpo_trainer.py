"""Direct preference optimisation in Ray Train's workers: each runs ``roles/dpo_trainer.py``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_ray.actors.train_workers import Job, OnProgress, Worker, policy_reader, run_workers
from rlhf_ray.data.preferences import TokenPair


@dataclass(frozen=True, kw_only=True, slots=True)
class DPOJob(Job):
    """What the workers are to do. The model that training starts from is the reference too."""

    train: Sequence[TokenPair]
    holdout: Sequence[TokenPair]
    """What the implicit reward is tested on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedDPO:
    """What came of it: the role's ``Fitted``, and the implicit rewards of the held-out pairs."""

    loss: float
    steps: int
    per_second: float
    rewards: list[tuple[float, float]]
    """(chosen, rejected), by the saved policy."""


def train_on_ray(job: DPOJob, on_progress: OnProgress | None = None) -> TrainedDPO:
    """Train in Ray processes of the cluster that this process is connected to; returns when they are gone.

    Args:
        on_progress: called from another thread with the role's ``Progress``, and before that, while the reference
            reads, with pairs_read and pairs.

    Raises:
        ConfigError: the workers do not see the run's folder.
        RlhfRayError: whatever a worker raised.
        WorkerDiedError: a worker's process ended.
    """
    found = run_workers(
        _work,
        job,
        section=job.config.dpo,
        model="the policy",
        on_progress=on_progress,
    )
    return TrainedDPO(**found)


def _work(job: DPOJob, worker: Worker) -> dict[str, Any] | None:
    """The first worker saves, tests, and returns the fields of a ``TrainedDPO``."""
    from rlhf_ray.models.loading import (
        load_policy_model,
        load_tokenizer,
        resolve_device,
        resolve_precision,
        return_freed_memory,
    )
    from rlhf_ray.roles.dpo_trainer import fit_dpo, implicit_rewards, pair_logprobs, shared_pair_logprobs
    from rlhf_ray.roles.trl_training import save_policy

    config, section, trust = job.config, job.config.dpo, job.config.model.trust_remote_code
    device = resolve_device(config.device, section.num_gpus)
    reader = policy_reader(job, section)
    reference = reader(job.model_folder)
    of_train = shared_pair_logprobs(reference, job.train, worker.on_progress)
    of_holdout = pair_logprobs(reference, job.holdout) if worker.first else []
    del reference
    return_freed_memory()
    tokenizer = load_tokenizer(job.model_folder, need_chat_template=False, trust_remote_code=trust)
    model = load_policy_model(job.model_folder, trust_remote_code=trust)
    fitted = fit_dpo(
        model,
        tokenizer,
        job.train,
        of_train,
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
    of_policy = pair_logprobs(reader(job.folder), job.holdout)
    return {
        "loss": fitted.loss,
        "steps": fitted.steps,
        "per_second": fitted.per_second,
        "rewards": implicit_rewards(of_policy, of_holdout, beta=section.beta),
    }
