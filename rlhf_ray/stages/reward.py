"""Comparisons → reward/: train the reward model, test it on held-out prompts, and fit its normalisation."""

from __future__ import annotations

import json
import logging
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf_ray.actors.reward_trainer import RewardJob, TrainedReward, train_on_ray
from rlhf_ray.cluster import check_resources, connected, trainer_need
from rlhf_ray.config import RESOLVED_FILE, RunConfig, save_resolved
from rlhf_ray.data.preferences import TokenPair, split_by_prompt
from rlhf_ray.errors import ConfigError, NumericalError
from rlhf_ray.metrics import write_summary
from rlhf_ray.models.reward import QUALITY_FILE, ScoreNormalisation, model_version
from rlhf_ray.report.model_card import write_model_card
from rlhf_ray.roles.scorer import RewardSettings
from rlhf_ray.stages.prepare import prepare
from rlhf_ray.stages.reward_quality import Quality, ScoredPair, quality
from rlhf_ray.stages.training import check_start, checkpoints_folder, identity
from rlhf_ray.stages.training_data import Comparison, load_comparisons

log = logging.getLogger("rlhf_ray.reward")

NORMALISATION_SAMPLE = 128
"""Most candidates that the score normalisation is fitted on: the mean is then known to 0.09 standard deviations."""

SWAPPED_PAIRS = 64
"""Held-out pairs that are scored in the other order too: whether batching or order leaks into scores shows on a few."""

VALIDATION_SHARE = 0.1
"""Of the training prompts, held back where ``reward.early_stop_patience`` asks for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardReport:
    """How good the reward model is, on pairs whose prompts it never saw."""

    accuracy: float
    """Share of held-out pairs whose preferred candidate scores higher; equal scores count as wrong."""
    accuracy_low: float
    accuracy_high: float
    """Wilson 95 % interval."""
    log_loss: float
    """Mean cross-entropy of what people said under σ(chosen − rejected), nats; log 2 knows nothing."""
    pairs: int
    """Held-out pairs that are no ties."""
    quality: Quality
    """Calibration, length, sources, margins."""
    order_agreement: float
    """Share of held-out pairs with the same verdict when the candidates are scored in the other order."""
    train_pairs: int
    train_loss: float
    """Mean over the training run, nats a pair."""
    train_steps: int
    """Optimiser steps."""
    validation_loss: float | None
    """On pairs that decided when to end; None where nothing did."""
    score_mean: float
    score_std: float
    """Of raw scores, over candidates of training prompts: the stored normalisation."""
    seconds: float
    pairs_per_second: float
    """Training only."""
    annotators: tuple[str, ...]
    version: str
    folder: str


def train_reward(
    config: RunConfig, on_progress: Callable[[Mapping[str, float]], None] | None = None, *, resume: bool = False
) -> RewardReport:
    """Train on ``reward.data`` or the run's own preferences, test on held-out prompts, save to the ``reward`` folder.

    Args:
        on_progress: hears the role's ``Progress``, from another thread.
        resume: go on from the newest whole checkpoint of this run.

    Raises:
        ConfigError: the folder is in use, what is to be resumed is another training's or damaged, or
            ``reward.freeze_layers`` is more than the model has.
        DataError: a preference file is missing, has a bad line, or a pair that is too long.
        ModelError: the model cannot be loaded.
        NumericalError: the loss or a score is no longer a number.
        ResourceError: the cluster can never hold the workers.
    """
    began = time.monotonic()
    folder = config.run_dir / "reward"
    if folder.exists():
        raise ConfigError(f"{folder} already holds a reward model; remove it, or choose another name or output_dir")
    prepared = prepare(config)
    config = prepared.config
    comparisons, holdout = load_comparisons(config, config.reward, prepared.tokenizer)
    train, validation = comparisons, list[Comparison]()
    if config.reward.early_stop_patience:
        train, validation = split_by_prompt(comparisons, VALIDATION_SHARE, seed=config.seed)
    pairs = [comparison.tokens for comparison in train]
    checkpoints, shared = checkpoints_folder(config, config.reward), identity(config, config.reward, pairs)
    check_start(checkpoints, shared, resume=resume)
    save_resolved(config, config.run_dir / RESOLVED_FILE)
    temporary = Path(tempfile.mkdtemp(prefix=".reward-", dir=config.run_dir)) / folder.name  # the version has this name
    try:
        temporary.mkdir()
        job = RewardJob(
            config=config,
            model_folder=prepared.model_folder,
            train=pairs,
            validation=[comparison.tokens for comparison in validation],
            score=[_sample(pairs, seed=config.seed), *_both_orders(holdout)],
            folder=temporary,
            checkpoints=checkpoints,
            identity=shared,
        )
        with connected():
            check_resources([trainer_need(config.reward)])
            log.info("training the reward model on %d pairs (%s)", len(pairs), config.reward.precision)
            trained = train_on_ray(job, on_progress)
        report = _finish(config, temporary, trained, train=train, holdout=holdout, seconds=time.monotonic() - began)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary.parent, ignore_errors=True)
    shutil.rmtree(checkpoints, ignore_errors=True)
    write_summary(
        config.run_dir,
        {
            "reward_accuracy": report.accuracy,
            "reward_accuracy_low": report.accuracy_low,
            "reward_accuracy_high": report.accuracy_high,
            "reward_pairs": report.pairs,
        },
    )
    log.info(
        "reward model %s: accuracy %.3f (%.3f to %.3f) on %d held-out pairs, trained on %d",
        *(report.version, report.accuracy, report.accuracy_low, report.accuracy_high, report.pairs, report.train_pairs),
    )
    return report


def _finish(
    config: RunConfig,
    folder: Path,
    trained: TrainedReward,
    *,
    train: Sequence[Comparison],
    holdout: Sequence[Comparison],
    seconds: float,
) -> RewardReport:
    """What the model's folder has beside its weights: normalisation, settings, quality report and card."""
    normalisation = _normalisation(trained.scores[0])
    normalisation.save(folder)
    RewardSettings(prompt_format=config.prompts.format).save(folder)
    scored, order_agreement = _scored(holdout, *trained.scores[1:])
    found = quality(scored)
    report = RewardReport(
        accuracy=found.accuracy.value,
        accuracy_low=found.accuracy.low,
        accuracy_high=found.accuracy.high,
        log_loss=found.log_loss,
        pairs=found.accuracy.pairs,
        quality=found,
        order_agreement=order_agreement,
        train_pairs=len(train),
        train_loss=trained.loss,
        train_steps=trained.steps,
        validation_loss=trained.validation_loss,
        score_mean=normalisation.mean,
        score_std=normalisation.std,
        seconds=seconds,
        pairs_per_second=trained.per_second,
        annotators=tuple(sorted({c.preference.annotator for c in train if c.preference.annotator})),
        version=model_version(folder),
        folder=str(config.run_dir / folder.name),
    )
    (folder / QUALITY_FILE).write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    write_model_card(folder, config, asdict(report))
    return report


def _sample(pairs: Sequence[TokenPair], *, seed: int) -> list[list[int]]:
    """The reference completions that the normalisation is fitted on: some of those that were compared."""
    candidates = [ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    return random.Random(seed).sample(candidates, min(len(candidates), NORMALISATION_SAMPLE))


def _normalisation(raw: Sequence[float]) -> ScoreNormalisation:
    std = statistics.pstdev(raw)
    if std == 0:
        raise NumericalError("the reward model gives every candidate the same score; raise reward.lr or reward.epochs")
    return ScoreNormalisation(mean=statistics.fmean(raw), std=std)


def _both_orders(holdout: Sequence[Comparison]) -> tuple[list[list[int]], list[list[int]]]:
    """The candidates of every held-out pair, the preferred one first; and of some of them the other way round."""
    pairs = [comparison.tokens for comparison in holdout]
    in_order = [ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    return in_order, [ids for pair in pairs[:SWAPPED_PAIRS] for ids in (pair.rejected_ids, pair.chosen_ids)]


def _scored(
    holdout: Sequence[Comparison], in_order: Sequence[float], swapped: Sequence[float]
) -> tuple[list[ScoredPair], float]:
    """Every held-out pair with its scores, and of those swapped the share with the same verdict in both orders."""
    scored = []
    for comparison, chosen, rejected in zip(holdout, in_order[::2], in_order[1::2], strict=True):
        tokens = comparison.tokens
        prompt = _shared_length(tokens.chosen_ids, tokens.rejected_ids)
        scored.append(
            ScoredPair(
                chosen=chosen,
                rejected=rejected,
                probability=tokens.probability,
                chosen_tokens=len(tokens.chosen_ids) - prompt,
                rejected_tokens=len(tokens.rejected_ids) - prompt,
                source=comparison.preference.source,
            )
        )
    again = [chosen - rejected for rejected, chosen in zip(swapped[::2], swapped[1::2], strict=True)]
    same = [(pair.margin > 0) == (margin > 0) for pair, margin in zip(scored, again, strict=False)]
    return scored, sum(same) / len(same)


def _shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens that both begin with: the prompt, and what the responses share."""
    parted = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(parted, min(len(first), len(second)))
