"""What the pipeline asks of its workers. Everything is awaitable and speaks in refs; ``testing.py`` has fakes of each.

A worker that is gone raises ``WorkerDiedError``, one that went with its node ``NodeLostError``; any other error ends
the run with its cause.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rlhf_ray.types import (
    ExperienceRefs,
    Prompt,
    Ref,
    RolloutReceipt,
    Score,
    ScoredPrompt,
    StepReport,
    VersionedWeights,
    WeightAck,
)


class Worker(Protocol):
    """What a pool may have several of."""

    name: str
    node: str
    """Where it runs, for people."""

    async def close(self) -> None:
        """End the worker and free what it holds."""
        ...


class Generator(Worker, Protocol):
    """Samples responses from the newest policy it was given."""

    async def generate(self, prompt: Prompt) -> Sequence[tuple[RolloutReceipt, Ref]]:
        """Sample ``prompt.completions`` responses; each ref holds a ``Rollout``. Many calls may be under way
        (continuous batching). Raises ``PromptError`` where a response's log-probabilities are not finite.
        """
        ...

    async def update_weights(self, published: VersionedWeights) -> WeightAck:
        """Load a policy in place; rollouts under way go on under it. Returns once it serves that version."""
        ...


class Reference(Worker, Protocol):
    """The frozen policy that the KL is measured against."""

    async def logprobs(self, rollout: Ref) -> Ref:
        """The ref holds a [T] float32 array: log-probabilities of the rollout's response, nats. Raises ``PromptError``
        where they are not finite.
        """
        ...


class Scorer(Protocol):
    """Gives each response one scalar."""

    async def score(self, rollout: Ref) -> Score:
        """Raises ``NoScoreError`` when this response has none, and another ``ScorerError`` when none can be had."""
        ...


class PooledScorer(Worker, Scorer, Protocol):
    """A scorer that a pool can close and replace."""


class Learner(Protocol):
    """Takes gradient steps and publishes policies."""

    async def train_step(self, batch: Sequence[ExperienceRefs], *, kl_coef: float) -> StepReport:
        """One PPO update over the batch; the report's version is one higher than before."""
        ...

    async def publish(self) -> VersionedWeights:
        """The current policy as one object owned by the caller, with a parity probe."""
        ...

    async def save(self, folder: Path) -> None:
        """Copy everything needed to go on from here: weights, optimiser, version, RNG. It is written in the background:
        steps may be taken before it is on disk.
        """
        ...

    async def written(self, *, wait: bool) -> bool:
        """Whether all that ``save`` copied last is on disk; with ``wait``, once it is.

        Raises ``CheckpointError`` when it could not be written.
        """
        ...

    async def load(self, folder: Path) -> int:
        """Restore what ``save`` wrote; returns the version."""
        ...

    async def export(self, folder: Path) -> None:
        """The policy as a Hugging Face folder."""
        ...


class Checkpoints(Protocol):
    """What a run can be resumed from. One checkpoint is written at a time, while training goes on."""

    async def begin(self, step: int, state: Mapping[str, Any], scored: Sequence[ScoredPrompt]) -> None:
        """Take what the checkpoint of ``step`` holds; the learner may step on when this returns.

        Args:
            state: of the pipeline, JSON-ready.
            scored: what waits for the learner.
        """
        ...

    async def end(self, *, wait: bool) -> bool:
        """Mark what was begun as complete if all of it is on disk, with ``wait`` once it is; False while it is not.

        Raises ``CheckpointError`` when it could not be written; the checkpoints before it are as they were.
        """
        ...
