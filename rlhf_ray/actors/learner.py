"""The learner as Ray actors, one for each rank. Policies leave the first as return values, which outlive the actor in
the object store.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from rlhf_ray.actors.weights import pack_weights
from rlhf_ray.cluster import DEATHS, start_actor
from rlhf_ray.config import RunConfig
from rlhf_ray.errors import LearnerDiedError, RlhfRayError
from rlhf_ray.types import Experience, ExperienceRefs, Probe, StepReport, VersionedWeights

CAUSE_SECONDS = 5.0
"""How long the other ranks are heard after one of them has failed: theirs may be the cause."""


class LearnerWorker:
    """Runs one rank's ``PPOLearner``. What all ranks return alike, only the first one returns."""

    def __init__(self, learner_options: Mapping[str, Any], generator_dtype: str, rank: int, size: int) -> None:
        self._options = dict(learner_options)
        self._dtype = getattr(torch, generator_dtype)
        self._rank = rank
        self._size = size
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")

    def open_store(self) -> tuple[str, int]:
        """Where the other ranks find this one: address and port."""
        address = ray.util.get_node_ip_address()
        self._store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
        return address, self._store.port

    def ready(self, store: tuple[str, int] | None) -> None:
        """Joins the other ranks and loads the model. Not in the constructor: an error there would reach the driver as a
        mere death.

        Args:
            store: what ``open_store`` of the first one gave; None for one that is alone.
        """
        from rlhf_ray.roles.learner import PPOLearner
        from rlhf_ray.roles.ranks import Ranks

        if store is not None:
            reached = self._store if self._rank == 0 else TCPStore(*store, is_master=False)
            device = torch.device(self._options["device"])
            self._options["ranks"] = Ranks.joined(reached, rank=self._rank, size=self._size, device=device)
        self._learner = PPOLearner(**self._options)

    def train_step(self, scores: Sequence[float], kl_coef: float, *opened: Any) -> StepReport | None:
        """``opened``: the batch's rollouts, then reference log-probabilities or None for each (Ray resolves refs)."""
        rollouts, ref_logprobs = opened[: len(scores)], opened[len(scores) :]
        batch = [
            Experience(rollout=rollout, score=score, ref_logprobs=ref)
            for rollout, score, ref in zip(rollouts, scores, ref_logprobs, strict=True)
        ]
        report = self._learner.train_step(batch, kl_coef=kl_coef)
        return report if self._rank == 0 else None

    def publish(self) -> tuple[tuple[int, Probe], dict[str, Any]]:
        """((version, probe), packed weights); no weights on other ranks than the first."""
        return (self._learner.version, self._learner.probe()), pack_weights(self._learner.weights(self._dtype))

    def save(self, folder: str) -> None:
        """Copies; a thread writes while the next steps are taken."""
        self._writing = self._writer.submit(self._learner.copy().write, Path(folder))

    def written(self, wait: bool) -> bool:
        if not wait and not self._writing.done():
            return False
        self._writing.result()
        return True

    def load(self, folder: str) -> int:
        return self._learner.load(Path(folder))

    def export(self, folder: str) -> None:
        self._learner.export(Path(folder))


class RayLearner:
    """Client of the ranks' actors; satisfies ``interfaces.Learner``."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self._actors = list(actors)

    @classmethod
    def start(cls, config: RunConfig, model_folder: str, critic_folder: str | None = None) -> RayLearner:
        """Start the actors; ``ready_refs`` tells when they are up. Every precision of ``config`` must be resolved.

        Args:
            critic_folder: as of ``PPOLearner``.
        """
        section = config.learner
        device = config.device_of(section.num_gpus)
        options = {
            "config": config,
            "model_folder": model_folder,
            "critic_folder": critic_folder,
            "device": device,
            "precision": section.precision,
        }
        return cls(
            [
                start_actor(
                    LearnerWorker,
                    options,
                    config.generator.dtype,
                    rank,
                    section.ranks,
                    num_cpus=section.num_cpus,
                    num_gpus=section.num_gpus,
                    threads=section.threads,
                )
                for rank in range(section.ranks)
            ]
        )

    def ready_refs(self) -> dict[str, Any]:
        """By name, what returns when that rank is up, and raises ``LearnerDiedError`` when it has died."""
        store = self._actors[0].open_store.remote() if len(self._actors) > 1 else None
        return {f"learner-{rank}": _up(rank, actor.ready.remote(store)) for rank, actor in enumerate(self._actors)}

    async def train_step(self, batch: Sequence[ExperienceRefs], *, kl_coef: float) -> StepReport:
        scores = [e.score.value for e in batch]
        refs = [e.rollout for e in batch] + [e.ref_logprobs for e in batch]
        report, *_ = await self._all(actor.train_step.remote(scores, kl_coef, *refs) for actor in self._actors)
        assert isinstance(report, StepReport)
        return report

    async def publish(self) -> VersionedWeights:
        published = [actor.publish.options(num_returns=2).remote() for actor in self._actors]
        (version, probe), *_ = await self._all(head for head, _ in published)
        return VersionedWeights(version=version, weights=published[0][1], probe=probe)

    async def save(self, folder: Path) -> None:
        await self._all(actor.save.remote(str(folder)) for actor in self._actors)

    async def written(self, *, wait: bool) -> bool:
        return all(await self._all(actor.written.remote(wait) for actor in self._actors))

    async def load(self, folder: Path) -> int:
        version, *_ = await self._all(actor.load.remote(str(folder)) for actor in self._actors)
        return int(version)

    async def export(self, folder: Path) -> None:
        await self._all(actor.export.remote(str(folder)) for actor in self._actors)

    def close(self) -> None:
        """End the actors."""
        for actor in self._actors:
            ray.kill(actor)

    async def _all(self, refs: Iterable[Any]) -> list[Any]:
        """What each rank's call returns.

        Raises:
            LearnerDiedError: a rank died.
            RlhfRayError: or whatever else a rank raised.
        """
        calls = [asyncio.ensure_future(_settled(ref)) for ref in refs]
        _, waiting = await asyncio.wait(calls, return_when=asyncio.FIRST_EXCEPTION)
        if waiting:
            # A rank that died is often heard of last: first the others say that they were cut off from it.
            _, waiting = await asyncio.wait(waiting, timeout=CAUSE_SECONDS)
        for call in waiting:
            call.cancel()
        errors = [(error, rank) for rank, call in enumerate(calls) if call.done() and (error := call.exception())]
        if not errors:
            return [call.result() for call in calls]
        kinds = (*DEATHS, RlhfRayError)
        cause, rank = next((of for kind in kinds for of in errors if isinstance(of[0], kind)), errors[0])
        if isinstance(cause, DEATHS):
            raise LearnerDiedError(f"rank {rank} of the learner died: {cause}") from cause
        raise cause


async def _up(rank: int, ref: Any) -> None:
    try:
        await ref
    except DEATHS as error:
        raise LearnerDiedError(f"rank {rank} of the learner died while it started: {error}") from error


async def _settled(ref: Any) -> Any:
    return await ref
