"""The loop's scorers: the client of the served reward model, and those that run in an actor of their own."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from rlhf_ray.cluster import DEATHS, start_actor
from rlhf_ray.config import FunctionScorerConfig, RemoteScorerConfig, RunConfig
from rlhf_ray.errors import DataLostError, NoScoreError, ScorerError, WorkerDiedError
from rlhf_ray.interfaces import Scorer
from rlhf_ray.pipeline.weighted_scorer import WeightedScorer
from rlhf_ray.roles.function_scorer import FunctionScorer
from rlhf_ray.roles.remote_scorer import RemoteScorer
from rlhf_ray.types import Ref, Rollout, Score

log = logging.getLogger("rlhf_ray.scorer")

_PASSING = (BackPressureError, ReplicaUnavailableError, DeploymentUnavailableError, RayActorError)
"""Failures that may be over in a moment: an overloaded service, or a replica that died and is being replaced."""


class ServedScorer:
    """Scores rollouts through a Serve handle; satisfies ``interfaces.Scorer``.

    Scoring changes nothing in the service, so a call whose replica died is simply made again.
    """

    def __init__(self, handle: Any, *, tries: int = 6, first_delay: float = 0.5) -> None:
        """
        Args:
            handle: of an application whose ingress has ``score_rollout``.
            tries: calls made for one rollout before giving up.
            first_delay: seconds before the second call; doubled before each further one, with jitter.
        """
        self._handle = handle
        self._tries = tries
        self._first_delay = first_delay

    async def score(self, rollout: Ref) -> Score:
        """Serve resolves the ref in the replica; the rollout does not pass through this process.

        Raises:
            NoScoreError: the model gives no finite number.
            DataLostError: the response is gone.
            ScorerError: it cannot read the response, or the service failed on every try; with the cause.
        """
        for attempt in range(1, self._tries + 1):
            try:
                score: Score = await self._handle.score_rollout.remote(rollout)
            except _PASSING as error:
                if attempt == self._tries:
                    raise ScorerError(
                        f"the reward service failed {attempt} times in a row, last with {type(error).__name__}: "
                        f"{error}; see `serve status`, or raise serve.replicas"
                    ) from error
                delay = self._first_delay * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
                log.warning("scoring again in %.1f s: %s", delay, type(error).__name__)
                await asyncio.sleep(delay)
            except ObjectLostError as error:
                raise DataLostError("a response went with the node that held it before it was scored") from error
            except RayTaskError as error:
                _raise_own(error)
                raise
            else:
                if not math.isfinite(score.value):
                    raise NoScoreError(f"{score.reward_version} gave {score.value}, which is no score")
                return score
        raise AssertionError("unreachable: the last try returns or raises")


class ScorerWorker:
    """Runs one scorer that reads the rollout itself, which Ray has opened here."""

    def __init__(self, make: Callable[[], Scorer]) -> None:
        self._make = make
        self._scorer: Scorer | None = None

    async def ready(self) -> None:
        """Makes the scorer, once. Not in the constructor: an error there would reach the driver as a mere death."""
        if self._scorer is None:
            self._scorer = self._make()

    async def score(self, rollout: Rollout) -> Score:
        assert self._scorer is not None, "ready() comes first"
        return await self._scorer.score(rollout)


class ActorScorer:
    """Client of a ``ScorerWorker``; satisfies ``interfaces.Scorer``."""

    def __init__(self, name: str, actor: Any) -> None:
        self._name = name
        self._actor = actor

    @classmethod
    def start(cls, name: str, make: Callable[[], Scorer]) -> ActorScorer:
        """Start the actor; ``ready_ref`` tells when it is up. It mostly waits for others, and reserves nothing."""
        return cls(name, start_actor(ScorerWorker, make, num_cpus=0, num_gpus=0, threads=1, concurrency=1000))

    def ready_ref(self) -> Any:
        """Ref that resolves when the actor is up."""
        return self._actor.ready.remote()

    async def score(self, rollout: Ref) -> Score:
        try:
            score: Score = await self._actor.score.remote(rollout)
        except DEATHS as error:
            raise WorkerDiedError(f"the process of scorer {self._name} died: {error}") from error
        except RayTaskError as error:
            _raise_own(error)
            raise
        return score

    def close(self) -> None:
        """End the actor."""
        ray.kill(self._actor)


class RayScorers:
    """Every scorer of a run, and their weighted sum; satisfies ``interfaces.Scorer``."""

    def __init__(self, weighted: WeightedScorer, actors: Mapping[str, ActorScorer]) -> None:
        self._weighted = weighted
        self._actors = dict(actors)

    @classmethod
    def start(cls, config: RunConfig, handle: Any) -> RayScorers:
        """Start what ``scorers`` lists; ``ready_refs`` tells when it is up.

        Args:
            handle: of the served reward model; None where no scorer is of kind served.
        """
        scorers: dict[str, tuple[float, Scorer]] = {}
        actors: dict[str, ActorScorer] = {}
        for section in config.scorers:
            if section.kind == "served":
                scorers[section.name] = section.weight, ServedScorer(handle)
            else:
                actors[section.name] = ActorScorer.start(section.name, _maker(section))
                scorers[section.name] = section.weight, actors[section.name]
        return cls(WeightedScorer(scorers), actors)

    def ready_refs(self) -> dict[str, Any]:
        """Name → ref that resolves when that actor is up."""
        return {f"scorer {name}": actor.ready_ref() for name, actor in self._actors.items()}

    async def score(self, rollout: Ref) -> Score:
        return await self._weighted.score(rollout)

    def close(self) -> None:
        """End the actors."""
        for actor in self._actors.values():
            actor.close()


def _maker(section: RemoteScorerConfig | FunctionScorerConfig) -> Callable[[], Scorer]:
    """What makes the scorer in its actor. An API key goes there as an argument: an environment Ray would log."""
    if section.kind == "function":
        return partial(FunctionScorer, section.function, folder=os.getcwd())
    return partial(
        RemoteScorer,
        section.urls,
        model=section.model,
        api_key=os.environ[section.api_key_env] if section.api_key_env else None,
        timeout_seconds=section.timeout_s,
        tries=section.tries,
    )


def _raise_own(error: RayTaskError) -> None:
    """Raise a scorer's own error without Ray's account of where it came up; leaves any other alone."""
    if isinstance(error.cause, ScorerError):
        raise error.cause from error
