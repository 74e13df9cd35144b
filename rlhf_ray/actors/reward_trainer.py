"""The reward model's training in Ray Train's workers: each runs ``roles/reward_trainer.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.actors.train_workers import Job, Worker, run_workers
from rlhf_ray.data.preferences import TokenPair


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardJob(Job):
    """What the workers are to do."""

    train: Sequence[TokenPair]
    validation: Sequence[TokenPair]
    """Decide when to end and which weights to keep; may be empty."""
    score: Sequence[Sequence[Sequence[int]]]
    """Groups of sequences that the saved model scores, each group apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedReward:
    """What came of it: the role's ``Fitted``, and the scores."""

    loss: float
    steps: int
    per_second: float
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
    found = run_workers(
        _work,
        job,
        section=job.config.reward,
        model="the reward model",
        on_progress=on_progress,
    )
    return TrainedReward(**found)


def _work(job: RewardJob, worker: Worker) -> dict[str, Any] | None:
    """The first worker saves, scores, and returns the fields of a ``TrainedReward``."""
    from rlhf_ray.models.loading import load_tokenizer, quiet, resolve_device, resolve_precision, return_freed_memory
    from rlhf_ray.roles.reward_trainer import fit_reward_model, new_reward_model
    from rlhf_ray.roles.scorer import RewardScorer

    config, section = job.config, job.config.reward
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
        scratch=job.scratch / "trainer",
        validation=job.validation,
        checkpoints=job.checkpoints,
        identity=job.identity,
        on_progress=worker.on_progress,
    )
    if not worker.first:
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
