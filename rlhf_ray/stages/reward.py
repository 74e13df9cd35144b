"""preferences.jsonl → reward/: train the reward model, test it on held-out prompts, and fit its normalisation."""

from __future__ import annotations

import gc
import json
import logging
import math
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.config import RESOLVED_FILE, RunConfig, save_resolved
from rlhf_ray.data.preference_files import read_preferences
from rlhf_ray.data.preferences import Preference
from rlhf_ray.errors import ConfigError, DataError, NumericalError
from rlhf_ray.metrics import write_summary
from rlhf_ray.models.loading import quiet, resolve_device, resolve_precision
from rlhf_ray.models.reward import ScoreNormalisation, model_version
from rlhf_ray.roles.reward_trainer import Progress, TokenPair, fit_reward_model, new_reward_model
from rlhf_ray.roles.scorer import PromptFormat, RewardScorer, RewardSettings, text_input
from rlhf_ray.stages.prepare import Prepared, prepare

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
    """Mean −log σ(chosen − rejected), nats; log 2 knows nothing."""
    pairs: int
    """Held-out pairs."""
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
    """Train on ``preferences.jsonl``, test on ``preferences.holdout.jsonl``, save to the run's ``reward`` folder.

    Raises:
        ConfigError: the folder is in use, or ``reward.freeze_layers`` is more than the model has.
        DataError: a preference file is missing, has a bad line, a pair that is not decided, or one that is too long.
        ModelError: the model cannot be loaded.
        NumericalError: the loss or a score is no longer a number.
    """
    began = time.monotonic()
    folder = config.run_dir / "reward"
    if folder.exists():
        raise ConfigError(f"{folder} already holds a reward model; remove it, or choose another name or output_dir")
    prepared = prepare(config)
    config, tokenizer = prepared.config, prepared.tokenizer
    train, holdout = (
        _read_pairs(config.run_dir / name, tokenizer, config)
        for name in ("preferences.jsonl", "preferences.holdout.jsonl")
    )
    save_resolved(config, config.run_dir / RESOLVED_FILE)
    temporary = Path(tempfile.mkdtemp(prefix=".reward-", dir=config.run_dir)) / folder.name  # the version has this name
    try:
        temporary.mkdir()
        train_loss, train_seconds = _train_and_save(prepared, train.tokens, temporary, on_progress)
        scorer = _scorer(config, temporary)
        normalisation = _fit_normalisation(scorer, train.tokens, seed=config.seed)
        normalisation.save(temporary)
        margins = _margins(scorer, holdout.tokens)
        low, high = wilson_interval(sum(margin > 0 for margin in margins), len(margins))
        report = RewardReport(
            accuracy=sum(margin > 0 for margin in margins) / len(margins),
            accuracy_low=low,
            accuracy_high=high,
            log_loss=statistics.fmean(log_loss(margin) for margin in margins),
            pairs=len(margins),
            train_pairs=len(train.tokens),
            train_loss=train_loss,
            score_mean=normalisation.mean,
            score_std=normalisation.std,
            seconds=time.monotonic() - began,
            pairs_per_second=len(train.tokens) * config.reward.epochs / train_seconds,
            annotators=train.annotators,
            version=model_version(temporary),
            folder=str(folder),
        )
        (temporary / "reward_report.json").write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
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


def wilson_interval(successes: int, trials: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Confidence interval of a proportion (Wilson 1927); z = 1.96 for 95 %."""
    p = successes / trials
    centre = p + z * z / (2 * trials)
    half = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def log_loss(margin: float) -> float:
    """−log σ(margin), nats, without overflow: the Bradley–Terry loss of a pair whose scores differ by ``margin``."""
    return max(-margin, 0.0) + math.log1p(math.exp(-abs(margin)))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pairs:
    tokens: list[TokenPair]
    annotators: tuple[str, ...]


def _read_pairs(path: Path, tokenizer: Any, config: RunConfig) -> _Pairs:
    if not path.is_file():
        raise DataError(
            f"{path} does not exist; run `rlhf-ray judge` with the same configuration, or write it yourself"
        )
    preferences = read_preferences(path)
    return _Pairs(
        tokens=[
            _token_pair(preference, tokenizer, config.prompts.format, config.reward.max_length, f"{path} pair {number}")
            for number, preference in enumerate(preferences, start=1)
        ],
        annotators=tuple(sorted({p.annotator for p in preferences if p.annotator})),
    )


def _token_pair(
    preference: Preference, tokenizer: Any, prompt_format: PromptFormat, max_length: int, where: str
) -> TokenPair:
    if not preference.decided:
        raise DataError(
            f"{where}: human_preference is {preference.human_preference:g}; training takes decided comparisons "
            "(candidate1 or candidate2), so remove ties and probabilities or round them"
        )
    chosen, rejected = (
        text_input(preference.input_text, candidate, tokenizer, prompt_format=prompt_format)
        for candidate in (preference.chosen, preference.rejected)
    )
    longest = max(len(chosen), len(rejected))
    if longest > max_length:
        raise DataError(
            f"{where}: prompt and candidate are {longest} tokens; raise reward.max_length ({max_length}) or remove it"
        )
    return TokenPair(chosen_ids=chosen, rejected_ids=rejected)


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
    gc.collect()  # the trainer's reference cycles hold gradients and optimiser state, several times the model's size
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


def _margins(scorer: RewardScorer, pairs: Sequence[TokenPair]) -> list[float]:
    """Raw score of the chosen minus that of the rejected candidate."""
    scores = scorer.score_ids([ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)])
    return [chosen.raw - rejected.raw for chosen, rejected in zip(scores[::2], scores[1::2], strict=True)]
