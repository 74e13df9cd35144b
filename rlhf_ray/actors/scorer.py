"""The loop's scorers: the client of the served reward model, and those that run in an actor of their own."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from ray.exceptions import ObjectLostError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from rlhf_ray.actors.client import ActorClient
from rlhf_ray.actors.pulse import PulsingWorker
from rlhf_ray.actors.starting import ActorStarter
from rlhf_ray.cluster import DEATHS, raise_own, start_actor
from rlhf_ray.config import FunctionScorerConfig, RemoteScorerConfig, RunConfig
from rlhf_ray.errors import DataLostError, ForwardFailedError, NoScoreError, ScorerError, WorkerDiedError
from rlhf_ray.interfaces import Scorer
from rlhf_ray.pipeline.groups import task_group
from rlhf_ray.pipeline.pool import ScorerPool
from rlhf_ray.pipeline.weighted_scorer import WeightedScorer
from rlhf_ray.roles.function_scorer import FunctionScorer
from rlhf_ray.roles.remote_scorer import RemoteScorer
from rlhf_ray.types import Ref, Rollout, Score

log = logging.getLogger("rlhf_ray.scorer")

_PASSING = (BackPressureError, ReplicaUnavailableError, DeploymentUnavailableError)
"""Failures that may be over in a moment: the service is overloaded, or has no replica."""


class ServedScorer:
    """Scores rollouts through a Serve handle; satisfies ``interfaces.PooledScorer``.

    Scoring changes nothing in the service, so a call whose replica died may be made again, as a ``ScorerPool`` does.
    """

    node = "Ray Serve"

    def __init__(self, handle: Any, *, name: str = "scorer", tries: int = 6, first_delay: float = 0.5) -> None:
        """
        Args:
            handle: of an application whose ingress has ``score_rollout``.
            name: in what is said of it.
            tries: calls made for one rollout before giving up.
            first_delay: seconds before the second call; doubled before each further one, with jitter.
        """
        self.name = name
        self._handle = handle
        self._tries = tries
        self._first_delay = first_delay

    async def score(self, rollout: Ref) -> Score:
        """Serve resolves the ref in the replica; the rollout does not pass through this process.

        Raises:
            NoScoreError: the model gives no finite number.
            DataLostError: the response is gone.
            WorkerDiedError: the replica died, or its forward failed.
            ScorerError: it cannot read the response, or the service was not to be had on any try; with the cause.
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
            except DEATHS as error:
                raise WorkerDiedError(f"a replica of the reward model died: {error}") from error
            except ObjectLostError as error:
                raise DataLostError("a response went with the node that held it before it was scored") from error
            except RayTaskError as error:
                if isinstance(error.cause, ForwardFailedError):
                    raise WorkerDiedError(str(error.cause)) from error
                raise_own(error)
                raise
            else:
                if not math.isfinite(score.value):
                    raise NoScoreError(f"{score.reward_version} gave {score.value}, which is no score")
                return score
        raise AssertionError("unreachable: the last try returns or raises")

    async def close(self) -> None:
        """Nothing: whoever started the service ends it."""


def served_pool(handle: Any, *, name: str, max_prompt_tries: int) -> ScorerPool:
    """A scorer through a Serve handle. Serve replaces dead replicas by itself, as often as it takes.

    Args:
        max_prompt_tries: replicas that may die on one response, or fail on it, before it is given up.
    """

    async def make(worker_name: str) -> ServedScorer:
        return ServedScorer(handle, name=worker_name)

    return ScorerPool(
        make,
        name=name,
        section="serve",
        max_concurrent=CONCURRENT_CALLS,
        max_restarts=None,
        max_prompt_tries=max_prompt_tries,
        is_watched=False,
    )


class ScorerWorker(PulsingWorker):
    """Runs one scorer that reads the rollout itself, which Ray has opened here.

    Args:
        make: makes the scorer.
        bounded: each of its calls ends by time limits of its own.
    """

    def __init__(self, make: Callable[[], Scorer], *, bounded: bool) -> None:
        super().__init__()
        self._make = make
        self._is_bounded = bounded
        self._scorer: Scorer | None = None

    async def ready(self) -> None:
        """Makes the scorer, once. Not in the constructor: an error there would reach the driver as a mere death."""
        if self._scorer is None:
            with self._working("loading"):
                self._scorer = await asyncio.to_thread(self._make)

    async def score(self, rollout: Rollout) -> Score:
        assert self._scorer is not None, "ready() comes first"
        with self._working("scoring", bounded=self._is_bounded):
            return await self._scorer.score(rollout)


CONCURRENT_CALLS = 1000
"""Calls that one process may have at once."""


class ActorScorer(ActorClient):
    """Client of a ``ScorerWorker`` actor; satisfies ``interfaces.PooledScorer``."""

    @classmethod
    def start(cls, name: str, config: RunConfig, section: RemoteScorerConfig | FunctionScorerConfig) -> ActorScorer:
        """Start the actor; ``ready`` waits for its scorer. It mostly waits for others, and reserves nothing."""
        actor = start_actor(
            ScorerWorker,
            _maker(section),
            bounded=section.kind == "remote",  # a far service may be away for longer than hang_timeout_s
            num_cpus=0,
            num_gpus=0,
            threads=1,
            concurrency=CONCURRENT_CALLS,
        )
        return cls(name, actor, hang_timeout_s=config.hang_timeout_s)

    async def score(self, rollout: Ref) -> Score:
        score: Score = await self.answer(self._actor.score.remote(rollout))
        return score


class RayScorers:
    """Every scorer of a run, and their weighted sum; satisfies ``interfaces.Scorer``.

    Attributes:
        pools: of each scorer, to be started: by ``Pipeline`` or ``running``.
    """

    def __init__(
        self, weighted: WeightedScorer, pools: Sequence[ScorerPool], starters: Sequence[ActorStarter[ActorScorer]]
    ) -> None:
        self.pools = tuple(pools)
        self._weighted = weighted
        self._starters = tuple(starters)

    @classmethod
    def start(cls, config: RunConfig, handle: Any) -> RayScorers:
        """Start the processes of what ``scorers`` lists; their pools wait for them.

        Args:
            handle: of the served reward model; None where no scorer is of kind served.
        """
        scorers: dict[str, tuple[float, Scorer]] = {}
        pools: list[ScorerPool] = []
        starters: list[ActorStarter[ActorScorer]] = []
        for index, section in enumerate(config.scorers):
            if section.kind == "served":
                pool = served_pool(handle, name=section.name, max_prompt_tries=config.ppo.max_prompt_tries)
                scorers[section.name] = section.weight, pool
                pools.append(pool)
                continue
            start = partial(ActorScorer.start, config=config, section=section)
            starter = ActorStarter(start, ahead=[f"scorer {section.name}-0"])
            pool = ScorerPool(
                starter,
                name=section.name,
                section=f"scorers.{index}",
                max_concurrent=CONCURRENT_CALLS,
                max_restarts=section.max_restarts,
                max_prompt_tries=config.ppo.max_prompt_tries,
            )
            scorers[section.name] = section.weight, pool
            pools.append(pool)
            starters.append(starter)
        return cls(WeightedScorer(scorers), pools, starters)

    async def score(self, rollout: Ref) -> Score:
        return await self._weighted.score(rollout)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the pools for the block, where there is no ``Pipeline`` that does; ``close`` comes with its end.

        Raises:
            RlhfRayError: or whatever else a pool or the block raised first, itself and not in a group.
        """
        try:
            async with task_group() as lives:
                for pool in self.pools:
                    pool.start(lives)
                yield
                await self.close()
        finally:
            await self.close()

    async def close(self) -> None:
        """End the processes. May be called again."""
        await asyncio.gather(*(pool.close() for pool in self.pools), *(starter.close() for starter in self._starters))


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
