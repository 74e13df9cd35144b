"""Responses to imitate → policy/: supervised fine-tuning, tested on held-out prompts before and after."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass

from rlhf_ray.actors.sft_trainer import SFTJob, train_on_ray
from rlhf_ray.cluster import check_resources, connected, trainer_need
from rlhf_ray.config import RESOLVED_FILE, RunConfig, save_resolved
from rlhf_ray.metrics import write_summary
from rlhf_ray.stages.prepare import prepare
from rlhf_ray.stages.training import (
    OnProgress,
    check_start,
    checkpoints_folder,
    identity,
    policy_training,
    refuse_anothers,
    refuse_policy,
)
from rlhf_ray.stages.training_data import load_sft_data

log = logging.getLogger("rlhf_ray.sft")


@dataclass(frozen=True, kw_only=True, slots=True)
class SFTReport:
    """What the policy learnt; in ``summary.json`` each figure's name begins with ``sft_``."""

    steps: int
    """Optimiser steps."""
    loss: float
    """Mean over the training run, nats a response token."""
    holdout_loss_before: float
    """Of the model that training started from, on responses whose prompts it never saw; nats a response token."""
    holdout_loss: float
    """Of the policy."""
    responses: int
    """That were imitated."""
    holdout_responses: int
    ties: int
    """Comparisons that prefer neither response, which were left out."""
    repeats: int
    """Comparisons whose preferred response stood there already, which were left out too."""
    annotators: tuple[str, ...]
    seconds: float
    responses_per_second: float
    """Training only."""


def train_sft(config: RunConfig, on_progress: OnProgress | None = None, *, resume: bool = False) -> SFTReport:
    """Train on ``sft.data`` or the run's preferred responses, test on held-out prompts, save to the ``policy`` folder.

    Args:
        on_progress: hears the role's ``Progress``, from another thread.
        resume: go on from the newest whole checkpoint of this run.

    Raises:
        ConfigError: the run has a policy, or what it is to resume is another training's or damaged.
        DataError: a file is missing, has a bad row, or a response that is too long.
        ModelError: the model cannot be loaded.
        NumericalError: the loss is no longer a number.
        ResourceError: the cluster can never hold the workers.
    """
    began = time.monotonic()
    refuse_policy(config)
    if resume:
        refuse_anothers(config.run_dir, "sft")
    prepared = prepare(config)
    config, section = prepared.config, prepared.config.sft
    data = load_sft_data(config, section, prepared.tokenizer)
    if data.ties or data.repeats:
        log.warning(
            "left out: %d comparisons that prefer neither response, %d whose preferred response stands there already",
            *(data.ties, data.repeats),
        )
    shared = identity(config, section, data.train, noun="responses")
    start = check_start(checkpoints_folder(config, section), shared, resume=resume)
    with connected():
        check_resources([trainer_need(section)])
        save_resolved(config, config.run_dir / RESOLVED_FILE)
        with policy_training(config, section, start=start, on_progress=on_progress) as (folder, hear):
            log.info("training the policy on %d responses (%s)", len(data.train), section.precision)
            job = SFTJob(
                config=config,
                model_folder=prepared.model_folder,
                train=data.train,
                holdout=data.holdout,
                folder=folder,
                checkpoints=checkpoints_folder(config, section),
                identity=shared,
            )
            trained = train_on_ray(job, hear)
    report = SFTReport(
        steps=trained.steps,
        loss=trained.loss,
        holdout_loss_before=trained.holdout_loss_before,
        holdout_loss=trained.holdout_loss,
        responses=len(data.train),
        holdout_responses=len(data.holdout),
        ties=data.ties,
        repeats=data.repeats,
        annotators=data.annotators,
        seconds=time.monotonic() - began,
        responses_per_second=trained.per_second,
    )
    figures = {f"sft_{name}": value for name, value in asdict(report).items()}
    write_summary(config.run_dir, {"status": "finished", **figures})
    return report
