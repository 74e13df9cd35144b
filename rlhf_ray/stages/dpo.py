"""Comparisons → policy/: direct preference optimisation, whose implicit reward is tested on held-out prompts."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rlhf_ray.actors.dpo_trainer import DPOJob, train_on_ray
from rlhf_ray.cluster import check_resources, connected, trainer_need
from rlhf_ray.config import RESOLVED_FILE, RunConfig, save_resolved
from rlhf_ray.errors import DataError
from rlhf_ray.metrics import write_summary
from rlhf_ray.stages.prepare import prepare
from rlhf_ray.stages.reward_quality import wilson_interval
from rlhf_ray.stages.training import (
    OnProgress,
    check_start,
    checkpoints_folder,
    identity,
    policy_training,
    refuse_anothers,
    refuse_policy,
)
from rlhf_ray.stages.training_data import Comparison, load_comparisons

log = logging.getLogger("rlhf_ray.dpo")


@dataclass(frozen=True, kw_only=True, slots=True)
class DPOReport:
    """What the policy learnt; in ``summary.json`` each figure's name begins with ``dpo_``."""

    steps: int
    """Optimiser steps."""
    loss: float
    """Mean over the training run, nats a pair; log 2 is where it starts."""
    accuracy: float
    """Share of held-out pairs whose preferred response has the higher implicit reward; equal ones count as wrong."""
    accuracy_low: float
    accuracy_high: float
    """Wilson 95 % interval."""
    margin: float
    """Mean implicit reward of the preferred response minus that of the other, on held-out pairs."""
    pairs: int
    """Held-out pairs."""
    train_pairs: int
    ties: int
    """Comparisons that prefer neither response, which were left out."""
    annotators: tuple[str, ...]
    seconds: float
    pairs_per_second: float
    """Training only."""


def train_dpo(config: RunConfig, on_progress: OnProgress | None = None, *, resume: bool = False) -> DPOReport:
    """Train on ``dpo.data`` or the run's own preferences, test on held-out prompts, save to the ``policy`` folder.

    Args:
        on_progress: hears the role's ``Progress``, from another thread.
        resume: go on from the newest whole checkpoint of this run.

    Raises:
        ConfigError: the run has a policy, or what it is to resume is another training's or damaged.
        DataError: a preference file is missing, has a bad line, or a pair that is too long.
        ModelError: the model cannot be loaded.
        NumericalError: the loss is no longer a number.
        ResourceError: the cluster can never hold the workers.
    """
    began = time.monotonic()
    refuse_policy(config)
    if resume:
        refuse_anothers(config.run_dir, "dpo")
    prepared = prepare(config)
    config, section = prepared.config, prepared.config.dpo
    sides = load_comparisons(config, section, prepared.tokenizer)
    train, holdout = (_without_ties(side) for side in sides)
    ties = sum(map(len, sides)) - len(train) - len(holdout)
    if not train:
        raise DataError(
            "every comparison to train on is a tie: there is nothing to learn from; name others in dpo.data"
        )
    if ties:
        log.warning("left out: %d comparisons that prefer neither response", ties)
    pairs = [comparison.tokens for comparison in train]
    shared = identity(config, section, pairs)
    start = check_start(checkpoints_folder(config, section), shared, resume=resume)
    with connected():
        check_resources([trainer_need(section)])
        save_resolved(config, config.run_dir / RESOLVED_FILE)
        with policy_training(config, section, start=start, on_progress=on_progress) as (folder, hear):
            log.info("training the policy on %d pairs (%s)", len(pairs), section.precision)
            job = DPOJob(
                config=config,
                model_folder=prepared.model_folder,
                train=pairs,
                holdout=[comparison.tokens for comparison in holdout],
                folder=folder,
                checkpoints=checkpoints_folder(config, section),
                identity=shared,
            )
            trained = train_on_ray(job, hear)
    margins = [chosen - rejected for chosen, rejected in trained.rewards]
    right = sum(margin > 0 for margin in margins)
    low, high = wilson_interval(right, len(margins))
    report = DPOReport(
        steps=trained.steps,
        loss=trained.loss,
        accuracy=right / len(margins),
        accuracy_low=low,
        accuracy_high=high,
        margin=sum(margins) / len(margins),
        pairs=len(margins),
        train_pairs=len(pairs),
        ties=ties,
        annotators=tuple(sorted({c.preference.annotator for c in train if c.preference.annotator})),
        seconds=time.monotonic() - began,
        pairs_per_second=trained.per_second,
    )
    figures = {f"dpo_{name}": value for name, value in asdict(report).items()}
    write_summary(config.run_dir, {"status": "finished", **figures})
    return report


def _without_ties(comparisons: Sequence[Comparison]) -> list[Comparison]:
    return [comparison for comparison in comparisons if comparison.preference.human_preference != 0.5]
