"""The reference policy as a Ray actor. Calls that come in while a forward runs share the next one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_ray.actors.client import ActorClient
from rlhf_ray.actors.pulse import PulsingWorker
from rlhf_ray.cluster import start_actor
from rlhf_ray.config import RunConfig
from rlhf_ray.errors import PromptError
from rlhf_ray.pipeline.shared_calls import SharedCalls
from rlhf_ray.types import Ref, Rollout

if TYPE_CHECKING:
    from rlhf_ray.roles.reference import ReferenceModel


class ReferenceWorker(PulsingWorker):
    """Runs one ``ReferenceModel``; the forward is in a thread, so the actor keeps answering."""

    def __init__(self, model_options: Mapping[str, Any]) -> None:
        super().__init__()
        self._options = {**model_options, "on_forward": self._advance}
        self._model: ReferenceModel | None = None
        self._calls = SharedCalls(self._forward)

    async def ready(self) -> None:
        """Loads the model, once. Not in the constructor: an error there would reach the driver as a mere death."""
        if self._model is None:
            with self._working("loading"):
                from rlhf_ray.roles.reference import ReferenceModel

                self._model = await asyncio.to_thread(ReferenceModel, **self._options)

    async def logprobs(self, rollout: Rollout) -> tuple[bool, np.ndarray]:
        """(True, [T] float32 log-probabilities of the response): the driver opens the first and leaves the second.

        Raises:
            PromptError: one of them is not finite.
        """
        logprobs = await self._calls(rollout)
        if not np.isfinite(logprobs).all():
            raise PromptError(
                "the reference gave NaN or infinity as a log-probability for a response to prompt "
                f"{rollout.prompt.named()}; where there are many of these, look at model.path and reference.precision"
            )
        return True, logprobs

    async def _forward(self, rollouts: Sequence[Rollout]) -> Sequence[np.ndarray]:
        assert self._model is not None, "ready() comes first"
        with self._working("reading"):
            return await asyncio.to_thread(self._model.logprobs, rollouts)


def reference_options(config: RunConfig, model_folder: str) -> dict[str, Any]:
    """Arguments of ``ReferenceModel`` for this configuration. ``reference.precision`` must be resolved."""
    section = config.reference
    return {
        "model_folder": model_folder,
        "device": config.device_of(section.num_gpus),
        "precision": section.precision,
        "temperature": config.sampling.temperature,
        "max_batch_tokens": 1 if config.deterministic else section.max_batch_tokens,  # 1: each alone
        "threads": section.threads,
        "trust_remote_code": config.model.trust_remote_code,
    }


CONCURRENT_CALLS = 1000
"""Calls that one worker may have at once: those that wait share its next forward."""


class ReferenceActor(ActorClient):
    """Client of a ``ReferenceWorker`` actor; satisfies ``interfaces.Reference``."""

    @classmethod
    def start(cls, name: str, config: RunConfig, model_options: Mapping[str, Any]) -> ReferenceActor:
        """Start the actor on the cluster; ``ready`` waits for its model."""
        section = config.reference
        actor = start_actor(
            ReferenceWorker,
            dict(model_options),
            num_cpus=section.num_cpus,
            num_gpus=section.num_gpus,
            threads=section.threads,
            concurrency=CONCURRENT_CALLS,
        )
        return cls(name, actor, hang_timeout_s=config.hang_timeout_s)

    async def logprobs(self, rollout: Ref) -> Ref:
        done, logprobs = self._actor.logprobs.options(num_returns=2).remote(rollout)
        await self.answer(done)
        return logprobs


class RayReference:
    """A fixed number of references, least loaded first; a death among them ends what they are asked for."""

    def __init__(self, references: Sequence[ReferenceActor]) -> None:
        self._references = list(references)
        self._load = [0] * len(self._references)

    @classmethod
    def start(cls, config: RunConfig, model_options: Mapping[str, Any]) -> RayReference:
        """Start ``reference.count`` actors, at least one; ``ready_refs`` tells when they are up."""
        names = [f"reference-{i}" for i in range(max(1, config.reference.count))]
        return cls([ReferenceActor.start(name, config, model_options) for name in names])

    def ready_refs(self) -> dict[str, Awaitable[None]]:
        """By name, what returns when that actor is up."""
        return {reference.name: reference.ready() for reference in self._references}

    async def logprobs(self, rollout: Ref) -> Ref:
        i = min(range(len(self._references)), key=self._load.__getitem__)
        self._load[i] += 1
        try:
            return await self._references[i].logprobs(rollout)
        finally:
            self._load[i] -= 1

    def close(self) -> None:
        """End the actors."""
        for reference in self._references:
            reference.kill()
