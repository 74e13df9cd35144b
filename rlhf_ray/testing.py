"""Fakes of the protocols of ``interfaces.py``, for testing a pipeline, or what is built on one, without models or Ray.

Everything is deterministic, a ref is the value itself, and faults happen where you ask for them. ``simulate`` runs a
coroutine on a clock that jumps over waits: simulated hours take no time, and a deadlock is an error instead of a hang.

Example: two generators, one of which dies on the third prompt that it is given::

    learner = FakeLearner()
    pool = GeneratorPool(
        worker_factory(lambda name: FakeGenerator(name, die_at_generate=3 if name == "generator-0" else None)),
        count=2, max_concurrent=4, max_restarts=1, max_prompt_tries=2,
    )
    references = ReferencePool(
        worker_factory(FakeReference), count=1, max_concurrent=100, max_restarts=0, max_prompt_tries=1
    )
    pipeline = Pipeline(
        prompts=FakePrompts(), pool=pool, references=references, scorer=FakeScorer(), learner=learner,
        controller=FixedKL(0.05), config=PPOConfig(steps=5, batch_size=4), parity_tolerance=1e-3,
        hang_timeout_s=600, on_step=lambda metrics, samples: None,
    )
    summary = simulate(pipeline.run())
    assert summary.lost == 0 and len(learner.batches) == 5
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import selectors
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from rlhf_ray.errors import (
    CheckpointError,
    NodeLostError,
    NoScoreError,
    NumericalError,
    PromptError,
    ScorerError,
    StalenessError,
    WorkerDiedError,
)
from rlhf_ray.types import (
    ExperienceRefs,
    Probe,
    Prompt,
    Ref,
    Rollout,
    RolloutReceipt,
    Score,
    ScoredPrompt,
    StepReport,
    VersionedWeights,
    WeightAck,
)

T = TypeVar("T")
F = TypeVar("F", bound="_Mortal")

Seconds = float | Callable[[int], float]
"""How long a call takes: always the same, or a function of the prompt's id."""


def uniform_seconds(low: float, high: float, *, seed: int = 0) -> Callable[[int], float]:
    """Seconds drawn uniformly for each prompt id; the same for the same seed."""
    return lambda prompt_id: random.Random(f"{seed}:{prompt_id}").uniform(low, high)


class FakePrompts:
    """Endless prompts "prompt 0", "prompt 1", …"""

    def __init__(self, *, completions: int = 1) -> None:
        self._completions = completions

    def prompt(self, prompt_id: int) -> Prompt:
        """Prompt number ``prompt_id``, with that number as its sampling seed too."""
        return Prompt(
            prompt_id=prompt_id,
            text=f"prompt {prompt_id}",
            token_ids=(1, 2, 3),
            seed=prompt_id,
            completions=self._completions,
        )


class _Mortal:
    """A worker that can be killed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.node = "nowhere"
        self.closed = False
        self._dead = asyncio.Event()
        self._death: type[WorkerDiedError] = WorkerDiedError

    def kill(self, *, with_node: bool = False) -> None:
        """The process ends: every call under way, and every later one, raises ``WorkerDiedError``.

        Args:
            with_node: the whole node is gone, so they raise ``NodeLostError``.
        """
        self._death = NodeLostError if with_node else WorkerDiedError
        self._dead.set()

    async def close(self) -> None:
        """See ``interfaces.Worker``."""
        self.closed = True

    async def _live_on(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(None if seconds == math.inf else seconds):
                await self._dead.wait()
        except TimeoutError:
            return
        raise self._death(f"{self.name} is gone (fault injection)")


class FakeGenerator(_Mortal):
    """Samples made-up tokens; the same for the same prompt and policy versions.

    A rollout that is under way while the weights change has one half from the old version and one from the new.

    Args:
        seconds: what one response takes.
        update_seconds: what one weight update takes.
        max_tokens: responses have 1 to this many tokens.
        parity: the gap that each acknowledgement reports, nats.
        nan_parity_at_update: the update, counted from 1, that reports NaN.
        die_at_generate, die_at_update: the call, counted from 1, in which the worker dies. Every call under way and
            every later one then raises ``WorkerDiedError``.
        hang_at_generate: the call, counted from 1, that never ends unless the worker dies.
        poison: ids of prompts that kill whoever is given them.
        nan: ids of prompts whose responses get NaN for a log-probability.
    """

    def __init__(
        self,
        name: str = "generator-0",
        *,
        seconds: Seconds = 0.0,
        update_seconds: float = 0.0,
        max_tokens: int = 8,
        parity: float = 0.0,
        nan_parity_at_update: int | None = None,
        die_at_generate: int | None = None,
        die_at_update: int | None = None,
        hang_at_generate: int | None = None,
        poison: Collection[int] = (),
        nan: Collection[int] = (),
    ) -> None:
        super().__init__(name)
        self.version: int | None = None
        self.prompt_ids: list[int] = []
        """Of every prompt that it was given, in order."""
        self.versions: list[int] = []
        """That it acknowledged, in order."""
        self._seconds = seconds
        self._update_seconds = update_seconds
        self._max_tokens = max_tokens
        self._parity = parity
        self._nan_parity_at_update = nan_parity_at_update
        self._die_at_generate = die_at_generate
        self._die_at_update = die_at_update
        self._hang_at_generate = hang_at_generate
        self._poison = poison
        self._nan = nan
        self._updates = 0

    async def generate(self, prompt: Prompt) -> Sequence[tuple[RolloutReceipt, Ref]]:
        """See ``interfaces.Generator``. Raises AssertionError if asked before it was given weights."""
        assert self.version is not None, f"{self.name} was given a prompt before it had weights"
        self.prompt_ids.append(prompt.prompt_id)
        before, call = self.version, len(self.prompt_ids)
        if call == self._die_at_generate or prompt.prompt_id in self._poison:
            self.kill()
        seconds = self._seconds if isinstance(self._seconds, float | int) else self._seconds(prompt.prompt_id)
        await self._live_on(math.inf if call == self._hang_at_generate else seconds)
        if prompt.prompt_id in self._nan:
            raise PromptError(f"a log-probability of prompt {prompt.prompt_id} was NaN (fault injection)")
        rollouts = [self._sample(prompt, member, before, self.version) for member in range(prompt.completions)]
        return [(self._receipt(rollout, seconds), rollout) for rollout in rollouts]

    async def update_weights(self, published: VersionedWeights) -> WeightAck:
        """See ``interfaces.Generator``."""
        self._updates += 1
        update = self._updates
        if update == self._die_at_update:
            self.kill()
        await self._live_on(self._update_seconds)
        assert self.version is None or published.version > self.version, "a generator was sent an older version"
        self.version = published.version
        self.versions.append(published.version)
        parity = math.nan if update == self._nan_parity_at_update else self._parity
        return WeightAck(
            generator=self.name, version=published.version, seconds=self._update_seconds, parity_max=parity
        )

    def _receipt(self, rollout: Rollout, seconds: float) -> RolloutReceipt:
        return RolloutReceipt(
            prompt_id=rollout.prompt.prompt_id,
            generator=self.name,
            oldest_version=min(rollout.policy_versions),
            newest_version=max(rollout.policy_versions),
            response_tokens=len(rollout.response_ids),
            truncated=rollout.finish_reason == "length",
            seconds=seconds,
        )

    def _sample(self, prompt: Prompt, member: int, before: int, after: int) -> Rollout:
        rng = random.Random(f"{prompt.seed}:{member}:{before}:{after}")
        tokens = rng.randint(1, self._max_tokens)
        ids = tuple(rng.randint(3, 99) for _ in range(tokens))
        return Rollout(
            prompt=prompt,
            response_ids=ids,
            rollout_logprobs=tuple(-rng.uniform(0.5, 2.0) for _ in ids),
            policy_versions=tuple(before if 2 * t < tokens else after for t in range(tokens)),
            finish_reason="length" if tokens == self._max_tokens else "stop",
            text=" ".join(map(str, ids)),
        )


def worker_factory(make: Callable[[str], F], *, seconds: float = 0.0) -> Callable[[str], Awaitable[F]]:
    """A factory for a pool whose workers take ``seconds`` to start."""

    async def factory(name: str) -> F:
        await asyncio.sleep(seconds)
        return make(name)

    return factory


class FakeReference(_Mortal):
    """A frozen policy that finds every token a little less likely (0.01 nats) than the sampler did.

    Args:
        seconds: what one call takes.
        die_at: the call, counted from 1, in which the worker dies. Every call under way and every later one then raises
            ``WorkerDiedError``.
        poison: ids of prompts whose responses kill whoever reads them.
    """

    def __init__(
        self,
        name: str = "reference-0",
        *,
        seconds: float = 0.0,
        die_at: int | None = None,
        poison: Collection[int] = (),
    ) -> None:
        super().__init__(name)
        self.calls = 0
        self._seconds = seconds
        self._die_at = die_at
        self._poison = poison

    async def logprobs(self, rollout: Ref) -> Ref:
        """See ``interfaces.Reference``."""
        self.calls += 1
        if self.calls == self._die_at or rollout.prompt.prompt_id in self._poison:
            self.kill()
        await self._live_on(self._seconds)
        return np.asarray(rollout.rollout_logprobs, dtype=np.float32) - np.float32(0.01)


class FakeScorer:
    """Likes later policies better: a score is 0.1 × the version of the last token, plus noise from the response.

    Args:
        fail_at: the call, counted from 1, that raises ``ScorerError``.
        poison: ids of prompts whose responses get no score.
    """

    def __init__(self, *, seconds: float = 0.0, fail_at: int | None = None, poison: Collection[int] = ()) -> None:
        self._seconds = seconds
        self._fail_at = fail_at
        self._poison = poison
        self.calls = 0

    async def score(self, rollout: Ref) -> Score:
        """See ``interfaces.Scorer``."""
        self.calls += 1
        call = self.calls
        await asyncio.sleep(self._seconds)
        if call == self._fail_at:
            raise ScorerError(f"no score for prompt {rollout.prompt.prompt_id} (fault injection)")
        if rollout.prompt.prompt_id in self._poison:
            raise NoScoreError(f"fake gave nan for prompt {rollout.prompt.prompt_id} (fault injection)")
        value = 0.1 * rollout.policy_versions[-1] + random.Random(rollout.text).uniform(-0.1, 0.1)
        return Score(value=value, raw=value, reward_version="fake")


class FakeLearner:
    """Counts versions, remembers what it was given and reports every metric that a learner must.

    Args:
        seconds: what one step takes.
        publish_seconds: what one publication takes.
        max_staleness: an older experience raises ``StalenessError``.
        fail_at: the step, counted from 1, that raises ``NumericalError``.
        skip_at: the step, counted from 1, that is reported as skipped, with NaN where a loss would be.
        sampler_gap: mean log-probability gap that each step reports, nats; None: none.
    """

    def __init__(
        self,
        *,
        seconds: float = 0.0,
        publish_seconds: float = 0.0,
        max_staleness: int | None = None,
        fail_at: int | None = None,
        skip_at: int | None = None,
        sampler_gap: float | None = None,
    ) -> None:
        self.version = 0
        self.batches: list[tuple[int, list[int]]] = []
        """(version before the step, prompt ids in the order given) of every step."""
        self.stalenesses: list[int] = []
        """Of every experience trained on."""
        self._seconds = seconds
        self._publish_seconds = publish_seconds
        self._max_staleness = max_staleness
        self._fail_at = fail_at
        self._skip_at = skip_at
        self._sampler_gap = sampler_gap

    async def train_step(self, batch: Sequence[ExperienceRefs], *, kl_coef: float) -> StepReport:
        """See ``interfaces.Learner``."""
        staleness = [self.version - min(e.rollout.policy_versions) for e in batch]
        if self._max_staleness is not None and max(staleness) > self._max_staleness:
            raise StalenessError(f"staleness {max(staleness)} at version {self.version} is above {self._max_staleness}")
        self.batches.append((self.version, [e.rollout.prompt.prompt_id for e in batch]))
        self.stalenesses += staleness
        await asyncio.sleep(self._seconds)
        if len(self.batches) == self._fail_at:
            raise NumericalError(f"the loss was NaN in step {self._fail_at} (fault injection)")
        self.version += 1
        skipped = len(self.batches) == self._skip_at
        metrics = _learner_metrics(batch, staleness, kl_coef, skipped=skipped)
        if self._sampler_gap is not None:
            metrics["sampler_gap"] = self._sampler_gap
        rows = tuple(
            {"prompt_id": e.rollout.prompt.prompt_id, "prompt": e.rollout.prompt.text, "response": e.rollout.text}
            | {"score": e.score.value, "kl": _k1(e)}
            for e in batch[:2]
        )
        return StepReport(version=self.version, metrics=metrics, samples=rows)

    async def publish(self) -> VersionedWeights:
        """See ``interfaces.Learner``; the one weight holds the version."""
        await asyncio.sleep(self._publish_seconds)
        return VersionedWeights(
            version=self.version,
            weights={"lm_head.weight": torch.full((1, 1), float(self.version))},
            probe=Probe(token_ids=(1, 2, 3), logprobs=(-1.0, -2.0)),
        )

    async def save(self, folder: Path) -> None:
        """See ``interfaces.Learner``."""
        _write_json(folder / "learner.json", {"version": self.version})

    async def written(self, *, wait: bool) -> bool:
        """See ``interfaces.Learner``; always."""
        return True

    async def load(self, folder: Path) -> int:
        """See ``interfaces.Learner``."""
        self.version = json.loads((folder / "learner.json").read_text())["version"]
        return self.version

    async def export(self, folder: Path) -> None:
        """See ``interfaces.Learner``; writes only a ``config.json`` that names the version."""
        _write_json(folder / "config.json", {"model_type": "fake", "version": self.version})


class FakeCheckpoints:
    """Keeps in memory what a run could be resumed from.

    Args:
        learner: whose version is copied.
        seconds: from the copy until a checkpoint is written.
        fail_at: the checkpoint, counted from 1, that cannot be written.
    """

    def __init__(self, learner: FakeLearner, *, seconds: float = 0.0, fail_at: int | None = None) -> None:
        self.marked: list[FakeCheckpoint] = []
        """Those that are complete, in order."""
        self._learner = learner
        self._seconds = seconds
        self._fail_at = fail_at
        self._begun = 0
        self._under_way: tuple[FakeCheckpoint, asyncio.Task[None]] | None = None

    async def begin(self, step: int, state: Mapping[str, Any], scored: Sequence[ScoredPrompt]) -> None:
        """See ``interfaces.Checkpoints``."""
        assert self._under_way is None, "the checkpoint before has not ended"
        self._begun += 1
        taken = FakeCheckpoint(step, self._learner.version, json.loads(json.dumps(state)), tuple(scored))
        self._under_way = taken, asyncio.create_task(asyncio.sleep(self._seconds))

    async def end(self, *, wait: bool) -> bool:
        """See ``interfaces.Checkpoints``."""
        if self._under_way is None:
            return True
        taken, writing = self._under_way
        if not wait and not writing.done():
            return False
        await writing
        self._under_way = None
        if self._begun == self._fail_at:
            raise CheckpointError(f"step {taken.step} could not be written (fault injection)")
        self.marked.append(taken)
        return True


@dataclass(frozen=True, slots=True)
class FakeCheckpoint:
    """What ``FakeCheckpoints`` was given, and the version of its learner at that time."""

    step: int
    version: int
    state: dict[str, Any]
    scored: tuple[ScoredPrompt, ...]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def _k1(experience: ExperienceRefs) -> float:
    rollout_logprobs = np.asarray(experience.rollout.rollout_logprobs)
    return float((rollout_logprobs - experience.ref_logprobs).sum())


def _learner_metrics(
    batch: Sequence[ExperienceRefs], staleness: Sequence[int], kl_coef: float, *, skipped: bool
) -> dict[str, float]:
    scores = np.asarray([e.score.value for e in batch])
    kl = float(np.mean([_k1(e) for e in batch]))
    constants = ("approx_kl", "clipfrac", "explained_variance", "entropy", "grad_norm", "lr", "importance_clipped")
    return dict.fromkeys(constants, 0.0) | {
        "score_mean": float(scores.mean()),
        "score_std": float(scores.std()),
        "score_raw_mean": float(np.mean([e.score.raw for e in batch])),
        "kl": math.nan if skipped else kl,
        "kl_k3": math.nan if skipped else kl / 2,
        "staleness_mean": float(np.mean(staleness)),
        "staleness_max": float(max(staleness)),
        "response_length": float(np.mean([e.receipt.response_tokens for e in batch])),
        "truncated_share": float(np.mean([e.receipt.truncated for e in batch])),
        "loss_policy": math.nan if skipped else 0.0,
        "loss_value": math.nan if skipped else 0.0,
        "importance_mean": 1.0,
        "kl_coef": kl_coef,
        "skipped": float(skipped),
    }


class _JumpingSelector(selectors.DefaultSelector):
    """Instead of waiting for a timer, moves the clock to it."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout is None:
            raise RuntimeError("deadlock: every task waits for another one, and no timer is set")
        if not ready and timeout is not None:
            self.now += max(timeout, 0.0)
        return ready


class _SimulatedLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


def simulate(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on a clock that jumps over every wait; returns its result.

    Raises:
        RuntimeError: a deadlock: every task waits for another one, so nothing can ever happen again.
    """
    with simulation() as runner:
        return runner.run(coroutine)


def simulation() -> asyncio.Runner:
    """A runner on such a clock, for more than one coroutine: between two of them time stands still."""
    return asyncio.Runner(loop_factory=_SimulatedLoop)
