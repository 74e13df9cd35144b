"""Client of the served reward model."""

from __future__ import annotations

import asyncio
import logging
import math
import random
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from rlhf_ray.errors import ScorerError
from rlhf_ray.types import Ref, Score

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
            ScorerError: the model gives no score, or the service failed on every try; with the cause.
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
            else:
                if not math.isfinite(score.value):
                    raise ScorerError(f"{score.reward_version} gave {score.value}, which is no score")
                return score
        raise AssertionError("unreachable: the last try returns or raises")
