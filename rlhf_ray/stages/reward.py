"""Comparisons → reward/: train the reward model, test it on held-out prompts, and fit its normalisation."""

from __future__ import annotations

import json
import logging
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf_ray.config import RESOLVED_FILE, RunConfig, save_resolved
from rlhf_ray.errors import ConfigError, NumericalError
from rlhf_ray.metrics import write_summary
from rlhf_ray.models.loading import quiet, resolve_device, resolve_precision, return_freed_memory
from rlhf_ray.models.reward import QUALITY_FILE, ScoreNormalisation, model_version
from rlhf_ray.roles.reward_trainer import Progress, TokenPair, fit_reward_model, new_reward_model
from rlhf_ray.roles.scorer import RewardScorer, RewardSettings
from rlhf_ray.stages.prepare import Prepared, prepare
from rlhf_ray.stages.reward_data import Comparison, load_comparisons
from rlhf_ray.stages.reward_quality import Quality, ScoredPair, quality

log = logging.getLogger("rlhf_ray.reward")

NORMALISATION_SAMPLE = 256
"""Most candidates that the score normalisation is fitted on: the mean is then known to 0.06 standard deviations."""


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
    score_mean: float
    score_std: float
    """Of raw scores, over candidates of training prompts: the stored normalisation."""
    seconds: float
    pairs_per_second: float
    """Training only."""
    annotators: tuple[str, ...]
    version: str
    folder: str


def train_reward(config: RunConfig, on_progress: Progress | None = None) -> RewardReport:
    """Train on ``reward.data`` or the run's own preferences, test on held-out prompts, save to the ``reward`` folder.

    Raises:
        ConfigError: the folder is in use, or ``reward.freeze_layers`` is more than the model has.
        DataError: a preference file is missing, has a bad line, or a pair that is too long.
        ModelError: the model cannot be loaded.
        NumericalError: the loss or a score is no longer a number.
    """
    began = time.monotonic()
    folder = config.run_dir / "reward"
    if folder.exists():
        raise ConfigError(f"{folder} already holds a reward model; remove it, or choose another name or output_dir")
    prepared = prepare(config)
    config, tokenizer = prepared.config, prepared.tokenizer
    train, holdout = load_comparisons(config, tokenizer)
    pairs = [comparison.tokens for comparison in train]
    save_resolved(config, config.run_dir / RESOLVED_FILE)
    temporary = Path(tempfile.mkdtemp(prefix=".reward-", dir=config.run_dir)) / folder.name  # the version has this name
    try:
        temporary.mkdir()
        train_loss, train_seconds = _train_and_save(prepared, pairs, temporary, on_progress)
        scorer = _scorer(config, temporary)
        normalisation = _fit_normalisation(scorer, pairs, seed=config.seed)
        normalisation.save(temporary)
        scored, order_agreement = _score_holdout(scorer, holdout)
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
            train_loss=train_loss,
            score_mean=normalisation.mean,
            score_std=normalisation.std,
            seconds=time.monotonic() - began,
            pairs_per_second=len(train) * config.reward.epochs / train_seconds,
            annotators=tuple(sorted({c.preference.annotator for c in train if c.preference.annotator})),
            version=model_version(temporary),
            folder=str(folder),
        )
        (temporary / QUALITY_FILE).write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary.parent, ignore_errors=True)
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


def _train_and_save(
    prepared: Prepared, pairs: Sequence[TokenPair], folder: Path, on_progress: Progress | None
) -> tuple[float, float]:
    """Mean loss and seconds of training; the model, its tokenizer and its settings are then in ``folder``."""
    config, tokenizer = prepared.config, prepared.tokenizer
    model = new_reward_model(
        Path(prepared.model_folder),
        tokenizer,
        freeze_layers=config.reward.freeze_layers,
        trust_remote_code=config.model.trust_remote_code,
    )
    device = resolve_device(config.device, config.learner.num_gpus)
    log.info("training the reward model on %d pairs (%s, %s)", len(pairs), device.type, config.reward.precision)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rlhf_ray_") as scratch:
        loss = fit_reward_model(
            model,
            tokenizer,
            pairs,
            config.reward,
            seed=config.seed,
            device=device,
            dtype=resolve_precision(config.reward.precision, device),
            scratch=Path(scratch),
            on_progress=on_progress,
        )
    seconds = time.monotonic() - began
    with quiet():
        model.cpu().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    RewardSettings(prompt_format=config.prompts.format).save(folder)
    ScoreNormalisation(mean=0.0, std=1.0).save(folder)
    del model
    return_freed_memory()  # the trainer's reference cycles held gradients and optimiser state
    return loss, seconds


def _scorer(config: RunConfig, folder: Path) -> RewardScorer:
    """What is tested is what will be served: the saved folder, through the class that serves it."""
    return RewardScorer(
        folder,
        device=config.device,
        num_gpus=config.learner.num_gpus,
        precision=config.reward.precision,
        max_batch_size=config.serve.max_batch_size,
    )


def _fit_normalisation(scorer: RewardScorer, pairs: Sequence[TokenPair], *, seed: int) -> ScoreNormalisation:
    """Mean and standard deviation of raw scores over the reference completions that were compared."""
    candidates = [ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    sample = random.Random(seed).sample(candidates, min(len(candidates), NORMALISATION_SAMPLE))
    raw = [score.raw for score in scorer.score_ids(sample)]
    std = statistics.pstdev(raw)
    if std == 0:
        raise NumericalError("the reward model gives every candidate the same score; raise reward.lr or reward.epochs")
    return ScoreNormalisation(mean=statistics.fmean(raw), std=std)


def _score_holdout(scorer: RewardScorer, holdout: Sequence[Comparison]) -> tuple[list[ScoredPair], float]:
    """Every held-out pair with its scores, and the share of them with the same verdict in the other order."""
    in_order, swapped = (
        scorer.score_ids([ids for c in holdout for ids in pair(c.tokens)])
        for pair in (lambda t: (t.chosen_ids, t.rejected_ids), lambda t: (t.rejected_ids, t.chosen_ids))
    )
    scored = []
    for comparison, chosen, rejected in zip(holdout, in_order[::2], in_order[1::2], strict=True):
        tokens = comparison.tokens
        prompt = _shared_length(tokens.chosen_ids, tokens.rejected_ids)
        scored.append(
            ScoredPair(
                chosen=chosen.raw,
                rejected=rejected.raw,
                probability=tokens.probability,
                chosen_tokens=len(tokens.chosen_ids) - prompt,
                rejected_tokens=len(tokens.rejected_ids) - prompt,
                source=comparison.preference.source,
            )
        )
    again = [chosen.raw - rejected.raw for rejected, chosen in zip(swapped[::2], swapped[1::2], strict=True)]
    same = [(pair.margin > 0) == (margin > 0) for pair, margin in zip(scored, again, strict=True)]
    return scored, sum(same) / len(same)


def _shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens that both begin with: the prompt, and what the responses share."""
    parted = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(parted, min(len(first), len(second)))
