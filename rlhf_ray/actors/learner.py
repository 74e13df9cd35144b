"""The learner as a Ray actor. Policies leave it as return values, which outlive the actor in the object store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import torch

from rlhf_ray.actors.weights import pack_weights
from rlhf_ray.cluster import DEATHS, start_actor
from rlhf_ray.config import RunConfig
from rlhf_ray.errors import WorkerDiedError
from rlhf_ray.types import Experience, ExperienceRefs, Probe, StepReport, VersionedWeights


class LearnerWorker:
    """Runs one ``PPOLearner``."""

    def __init__(self, learner_options: Mapping[str, Any], generator_dtype: str) -> None:
        self._options = dict(learner_options)
        self._dtype = getattr(torch, generator_dtype)

    def ready(self) -> None:
        """Loads the model. Not in the constructor: an error there would reach the driver as a mere death."""
        from rlhf_ray.roles.learner import PPOLearner

        self._learner = PPOLearner(**self._options)

    def train_step(self, scores: Sequence[float], kl_coef: float, *opened: Any) -> StepReport:
        """``opened``: the batch's rollouts, then their reference log-probabilities (Ray has resolved the refs)."""
        rollouts, ref_logprobs = opened[: len(scores)], opened[len(scores) :]
        batch = [
            Experience(rollout=rollout, score=score, ref_logprobs=ref)
            for rollout, score, ref in zip(rollouts, scores, ref_logprobs, strict=True)
        ]
        return self._learner.train_step(batch, kl_coef=kl_coef)

    def publish(self) -> tuple[tuple[int, Probe], dict[str, Any]]:
        """((version, probe), packed weights)."""
        return (self._learner.version, self._learner.probe()), pack_weights(self._learner.weights(self._dtype))

    def save(self, folder: str) -> None:
        self._learner.save(Path(folder))

    def load(self, folder: str) -> int:
        return self._learner.load(Path(folder))

    def export(self, folder: str) -> None:
        self._learner.export(Path(folder))


class RayLearner:
    """Client of the learner actor; satisfies ``interfaces.Learner``."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    @classmethod
    def start(cls, config: RunConfig, model_folder: str, critic_folder: str | None = None) -> RayLearner:
        """Start the actor; ``ready_ref`` tells when it is up. Every precision of ``config`` must be resolved.

        Args:
            critic_folder: as of ``PPOLearner``.
        """
        section = config.learner
        device = config.device_of(section.num_gpus)
        actor = start_actor(
            LearnerWorker,
            {
                "config": config,
                "model_folder": model_folder,
                "critic_folder": critic_folder,
                "device": device,
                "precision": section.precision,
            },
            config.generator.dtype,
            num_cpus=section.num_cpus,
            num_gpus=section.num_gpus,
            threads=section.threads,
        )
        return cls(actor)

    def ready_ref(self) -> Any:
        """Ref that resolves when the actor is up."""
        return self._actor.ready.remote()

    async def train_step(self, batch: Sequence[ExperienceRefs], *, kl_coef: float) -> StepReport:
        scores = [e.score.value for e in batch]
        refs = [e.rollout for e in batch] + [e.ref_logprobs for e in batch]
        report: StepReport = await self._alive(self._actor.train_step.remote(scores, kl_coef, *refs))
        return report

    async def publish(self) -> VersionedWeights:
        head, weights = self._actor.publish.options(num_returns=2).remote()
        version, probe = await self._alive(head)
        return VersionedWeights(version=version, weights=weights, probe=probe)

    async def save(self, folder: Path) -> None:
        await self._alive(self._actor.save.remote(str(folder)))

    async def load(self, folder: Path) -> int:
        version: int = await self._alive(self._actor.load.remote(str(folder)))
        return version

    async def export(self, folder: Path) -> None:
        await self._alive(self._actor.export.remote(str(folder)))

    def close(self) -> None:
        """End the actor."""
        ray.kill(self._actor)

    async def _alive(self, ref: Any) -> Any:
        try:
            return await ref
        except DEATHS as error:
            raise WorkerDiedError(f"the learner died: {error}") from error
