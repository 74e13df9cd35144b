"""Scored prompts to disk and back in processes of Ray: the driver holds refs, and opens no response."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlhf_ray.cluster import raise_own
from rlhf_ray.errors import CheckpointError, DataLostError
from rlhf_ray.roles.scored_prompts import read_responses, read_scored, save_scored, without_refs
from rlhf_ray.types import ExperienceRefs, Ref, ScoredPrompt


class ScoredPromptsWriter:
    """Writes scored prompts, whose refs are Ray's, in one process that it keeps: a new one for each checkpoint would
    spend seconds of two cores on its imports.
    """

    def __init__(self) -> None:
        self._actor: Any = None

    async def save(self, folder: Path, prompts: Sequence[ScoredPrompt]) -> None:
        """
        Raises:
            CheckpointError: the disk is full, or fails, or the process that writes has ended.
            DataLostError: one of the responses is gone.
        """
        experiences = [e for prompt in prompts for e in prompt.experiences]
        opened = [e.rollout for e in experiences] + [e.ref_logprobs for e in experiences]
        if not experiences:
            await asyncio.to_thread(save_scored, folder, [], [], [])
            return
        for is_last in (False, True):
            if self._actor is None:
                self._actor = _WRITER.options(scheduling_strategy=_here()).remote()
            try:
                await self._actor.save.remote(str(folder), [without_refs(prompt) for prompt in prompts], *opened)
                return
            except ObjectLostError as error:
                raise DataLostError("a scored response went with the node that held it") from error
            except RayTaskError as error:
                raise_own(error)
                raise
            except RayError as error:  # Ray has given this actor up, as where a node that has just come was asked first
                self._actor = None
                if is_last:
                    raise CheckpointError(f"{folder} could not be written: its process ended ({error})") from error

    def close(self) -> None:
        """End the process."""
        if self._actor is not None:
            ray.kill(self._actor)


def load_scored_refs(folder: Path) -> list[ScoredPrompt]:
    """What ``ScoredPromptsWriter`` wrote; the refs are the caller's own."""
    prompts = read_scored(folder)
    number = sum(len(prompt.experiences) for prompt in prompts)
    if not number:
        return []
    refs = _LOAD.options(num_returns=2 * number, scheduling_strategy=_here()).remote(str(folder))
    pairs = zip(refs[:number], refs[number:], strict=True)
    return [replace(p, experiences=tuple(_with_refs(e, *next(pairs)) for e in p.experiences)) for p in prompts]


def _here() -> NodeAffinitySchedulingStrategy:
    """On this process's node, whose disk it is. A soft wish is not heard of an actor that reserves nothing."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def _with_refs(experience: ExperienceRefs, rollout: Ref, ref_logprobs: Ref) -> ExperienceRefs:
    has_reference = experience.ref_logprobs is not None
    return replace(experience, rollout=rollout, ref_logprobs=ref_logprobs if has_reference else None)


class _Writer:
    def save(self, folder: str, prompts: Sequence[ScoredPrompt], *opened: Any) -> None:
        """``opened``: the rollouts, then reference log-probabilities or None for each (Ray resolves refs)."""
        half = len(opened) // 2
        save_scored(Path(folder), prompts, opened[:half], opened[half:])


def _load(folder: str) -> tuple[Any, ...]:
    rollouts, ref_logprobs = read_responses(Path(folder))
    return *rollouts, *ref_logprobs


# They mostly wait for the disk, and reserve nothing.
_WRITER = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=3)(_Writer)
_LOAD = ray.remote(num_cpus=0)(_load)
