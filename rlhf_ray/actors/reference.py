"""The reference policy as a Ray actor. Calls that come in while a forward runs share the next one."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from rlhf_ray.cluster import DEATHS, start_actor
from rlhf_ray.config import RunConfig
from rlhf_ray.errors import WorkerDiedError
from rlhf_ray.types import Ref, Rollout

if TYPE_CHECKING:
    from rlhf_ray.roles.reference import ReferenceModel


class ReferenceWorker:
    """Runs one ``ReferenceModel``; the forward is in a thread, so the actor keeps answering."""

    def __init__(self, model_options: Mapping[str, Any]) -> None:
        self._options = dict(model_options)
        self._waiting: list[tuple[Rollout, asyncio.Future[np.ndarray]]] = []
        self._drain: asyncio.Task[None] | None = None
        self._model: ReferenceModel | None = None

    async def ready(self) -> None:
        """Loads the model, once. Not in the constructor: an error there would reach the driver as a mere death."""
        if self._model is None:
            from rlhf_ray.roles.reference import ReferenceModel

            self._model = await asyncio.to_thread(ReferenceModel, **self._options)

    async def logprobs(self, rollout: Rollout) -> tuple[bool, np.ndarray]:
        """(True, [T] float32 log-probabilities of the response): the driver opens the first and leaves the second."""
        future: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        self._waiting.append((rollout, future))
        if self._drain is None or self._drain.done():
            self._drain = asyncio.create_task(self._forward_all())
        return True, await future

    async def _forward_all(self) -> None:
        """Forward everything that waits, again and again until nothing does."""
        assert self._model is not None, "ready() comes first"
        while self._waiting:
            batch, self._waiting = self._waiting, []
            try:
                results = await asyncio.to_thread(self._model.logprobs, [rollout for rollout, _ in batch])
            except Exception as error:  # noqa: BLE001 (each caller gets the cause)
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
            else:
                for (_, future), result in zip(batch, results, strict=True):
                    if not future.done():
                        future.set_result(result)


def reference_options(config: RunConfig, model_folder: str) -> dict[str, Any]:
    """Arguments of ``ReferenceModel`` for this configuration. ``reference.precision`` must be resolved."""
    section = config.reference
    return {
        "model_folder": model_folder,
        "device": config.device_of(section.num_gpus),
        "precision": section.precision,
        "temperature": config.sampling.temperature,
        "max_batch_tokens": section.max_batch_tokens,
        "threads": section.threads,
        "trust_remote_code": config.model.trust_remote_code,
    }


class RayReference:
    """Client of the reference actors, least loaded first; satisfies ``interfaces.Reference``."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self._actors = list(actors)
        self._load = [0] * len(self._actors)

    @classmethod
    def start(cls, config: RunConfig, model_options: Mapping[str, Any]) -> RayReference:
        """Start ``reference.count`` actors; ``ready_refs`` tells when they are up."""
        section = config.reference
        return cls(
            [
                start_actor(
                    ReferenceWorker,
                    dict(model_options),
                    num_cpus=section.num_cpus,
                    num_gpus=section.num_gpus,
                    threads=section.threads,
                    concurrency=1000,
                )
                for _ in range(section.count)
            ]
        )

    def ready_refs(self) -> dict[str, Any]:
        """Name → ref that resolves when that actor is up."""
        return {f"reference-{i}": actor.ready.remote() for i, actor in enumerate(self._actors)}

    async def logprobs(self, rollout: Ref) -> Ref:
        i = min(range(len(self._actors)), key=self._load.__getitem__)
        self._load[i] += 1
        try:
            done, logprobs = self._actors[i].logprobs.options(num_returns=2).remote(rollout)
            await done
            return logprobs
        except DEATHS as error:
            raise WorkerDiedError(f"reference-{i} died: {error}") from error
        finally:
            self._load[i] -= 1

    def close(self) -> None:
        """End the actors."""
        for actor in self._actors:
            ray.kill(actor)
