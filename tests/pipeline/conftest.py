"""One pipeline on fakes, with everything that a test may want to look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from rlhf_ray.algorithms.kl import FixedKL
from rlhf_ray.config import PPOConfig
from rlhf_ray.interfaces import Scorer
from rlhf_ray.pipeline.loop import Pipeline, RunSummary
from rlhf_ray.pipeline.pool import GeneratorPool, ReferencePool, ScorerPool
from rlhf_ray.testing import (
    FakeCheckpoints,
    FakeGenerator,
    FakeLearner,
    FakePrompts,
    FakeReference,
    FakeScorer,
    simulate,
    worker_factory,
)


@dataclass
class Run:
    """A pipeline, its fakes, and what came out."""

    make_generator: Callable[[str], FakeGenerator] = FakeGenerator
    count: int = 1
    max_concurrent: int = 8
    max_restarts: int = 3
    max_prompt_tries: int = 3
    start_seconds: float = 0.0
    prompts: FakePrompts = field(default_factory=FakePrompts)
    scorer: Scorer = field(default_factory=FakeScorer)
    scorer_pools: Sequence[ScorerPool] = ()
    make_reference: Callable[[str], FakeReference] = FakeReference
    reference_count: int = 1
    learner: FakeLearner = field(default_factory=FakeLearner)
    controller: Any = field(default_factory=lambda: FixedKL(0.05))
    parity_tolerance: float = 1e-3
    hang_timeout_s: float = 600.0
    make_checkpoints: Callable[[FakeLearner], FakeCheckpoints] = FakeCheckpoints
    after_step: Callable[[Run, dict[str, float]], None] = lambda run, row: None
    ppo: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.generators: dict[str, FakeGenerator] = {}
        self.rows: list[dict[str, float]] = []
        self.samples: list[Mapping[str, Any]] = []
        self.quarantine: list[Mapping[str, Any]] = []
        self.config = PPOConfig(**({"steps": 4, "batch_size": 4} | self.ppo))
        self.pool = GeneratorPool(
            worker_factory(self._make, seconds=self.start_seconds),
            count=self.count,
            max_concurrent=self.max_concurrent,
            max_restarts=self.max_restarts,
            max_prompt_tries=self.max_prompt_tries,
        )
        self.references: dict[str, FakeReference] = {}
        self.reference_pool = ReferencePool(
            worker_factory(self._make_reference),
            count=self.reference_count,
            max_concurrent=1000,
            max_restarts=self.max_restarts,
            max_prompt_tries=self.max_prompt_tries,
        )
        self.checkpoints = self.make_checkpoints(self.learner)
        self.pipeline = Pipeline(
            prompts=self.prompts,
            pool=self.pool,
            references=self.reference_pool,
            scorer=self.scorer,
            scorer_pools=self.scorer_pools,
            learner=self.learner,
            controller=self.controller,
            config=self.config,
            parity_tolerance=self.parity_tolerance,
            hang_timeout_s=self.hang_timeout_s,
            on_step=self._on_step,
            on_quarantine=self.quarantine.append,
            checkpoints=self.checkpoints,
        )

    def go(self) -> RunSummary:
        """The whole run on simulated time."""
        return simulate(self.pipeline.run())

    @property
    def trained_ids(self) -> list[int]:
        """Every prompt id that the learner was given, in order."""
        return [prompt_id for _, batch in self.learner.batches for prompt_id in batch]

    def _make(self, name: str) -> FakeGenerator:
        self.generators[name] = self.make_generator(name)
        return self.generators[name]

    def _make_reference(self, name: str) -> FakeReference:
        self.references[name] = self.make_reference(name)
        return self.references[name]

    def _on_step(self, row: dict[str, float], samples: Sequence[Mapping[str, Any]]) -> None:
        self.rows.append(row)
        self.samples += samples
        self.after_step(self, row)


@pytest.fixture(scope="session")
def make_run() -> type[Run]:
    """Builds a ``Run``; keyword arguments as its fields."""
    return Run
