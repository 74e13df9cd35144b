"""Evaluate: the base policy against the trained one on held-out prompts.

The gold judge decides; the score that PPO raised, which never saw that judge, stands beside it. A score that rises
while gold falls is over-optimisation (Gao et al. 2022), and this is where it shows. A run without a reward model, by
SFT or DPO, has no scores. Who samples and scores is handed in.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from rlhf_ray.config import RunConfig
from rlhf_ray.errors import ModelError
from rlhf_ray.metrics import write_json, write_summary
from rlhf_ray.types import Rollout, Score

EVALUATION_FILE = "evaluation.json"
RESAMPLES = 2000
"""Bootstrap resamples; their spread changes an interval's ends by less than they are printed to."""

Sampler = Callable[[Sequence[str]], Sequence[Sequence[Rollout]]]
"""Model folders or ids → of each, its responses to the held-out prompts, ``evaluate.samples_per_prompt`` each."""
Gold = Callable[[str], float]
"""Response text → the judge's verdict; higher is better."""
Measure = Callable[[Sequence[Rollout]], tuple[Sequence[Score] | None, Sequence[np.ndarray]]]
"""Rollouts → their scores, if anything scores; and one [T] array each, the reference's log-probabilities of the
response, nats, same temperature."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalRow:
    """One response as evaluation sees it."""

    prompt: str
    sample: int
    """Ordinal among the responses to this prompt."""
    response: str
    tokens: int
    truncated: bool
    gold: float
    score: float | None
    """As the loop scores: the reward model's normalised score, or the weighted sum of the scorers."""
    kl: float
    """Sum over the response's tokens of log-probability under its own policy minus the reference's, nats (k1)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A figure with its 95 % interval (percentile bootstrap over prompts)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """Means over one policy's responses."""

    gold: float
    score: float | None
    kl: float
    """Nats per response."""
    tokens: float
    truncated_share: float
    distinct_1: float
    """Different words / words, over all responses (Li et al. 2016); falls when the policy repeats itself."""
    distinct_2: float
    """The same for pairs of neighbouring words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedSample:
    """Both policies' responses to one prompt, sample index for sample index."""

    prompt: str
    base: str
    trained: str
    base_gold: float
    trained_gold: float
    base_score: float | None
    trained_score: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What ``evaluation.json`` holds."""

    prompts: int
    samples_per_prompt: int
    base: Side
    trained: Side
    gold_gain: Interval
    """Mean over prompts of trained − base."""
    score_gain: Interval | None
    """None where nothing scores."""
    win_rate: Interval
    """Share of (prompt, sample) pairs where the trained response has the higher gold score; ties count half."""
    tie_share: float
    samples: tuple[PairedSample, ...]
    """Every pair, in the order of the prompts."""


def evaluate(config: RunConfig, *, sample: Sampler, gold: Gold, measure: Measure) -> Evaluation:
    """Sample from both policies, judge, compare, and write ``evaluation.json`` and the summary's figures.

    Raises:
        ModelError: the run has no trained policy yet.
    """
    trained = trained_policy(config)
    sides = []
    for rollouts in sample([config.model.path, str(trained)]):
        scores, reference_logprobs = measure(rollouts)
        sides.append(rows(rollouts, gold=gold, scores=scores, reference_logprobs=reference_logprobs))
    evaluation = compare(*sides, seed=config.seed)
    write_json(config.run_dir / EVALUATION_FILE, asdict(evaluation))
    write_summary(
        config.run_dir,
        {
            "gold_before": evaluation.base.gold,
            "gold_after": evaluation.trained.gold,
            "win_rate": evaluation.win_rate.value,
            "kl_evaluation": evaluation.trained.kl,
        },
    )
    return evaluation


def trained_policy(config: RunConfig) -> Path:
    """The run's exported policy.

    Raises:
        ModelError: the run has none yet.
    """
    folder = config.run_dir / "policy"
    if not (folder / "config.json").exists():
        raise ModelError(
            f"there is no trained policy at {folder}; run rlhf-ray ppo, dpo or sft with this configuration first"
        )
    return folder


def rows(
    rollouts: Sequence[Rollout], *, gold: Gold, scores: Sequence[Score] | None, reference_logprobs: Sequence[np.ndarray]
) -> list[EvalRow]:
    """Rollouts with their verdicts; a prompt's responses are numbered in the order of their prompt ids."""
    values = [None] * len(rollouts) if scores is None else [score.value for score in scores]
    judged = zip(rollouts, values, reference_logprobs, strict=True)
    counts: dict[str, int] = defaultdict(int)
    result: list[EvalRow] = []
    for rollout, score, reference in sorted(judged, key=lambda item: item[0].prompt.prompt_id):
        text = rollout.prompt.text
        result.append(
            EvalRow(
                prompt=text,
                sample=counts[text],
                response=rollout.text,
                tokens=len(rollout.response_ids),
                truncated=rollout.finish_reason == "length",
                gold=gold(rollout.text),
                score=score,
                kl=float(np.sum(np.asarray(rollout.rollout_logprobs, dtype=np.float64) - reference)),
            )
        )
        counts[text] += 1
    return result


def compare(base: Sequence[EvalRow], trained: Sequence[EvalRow], *, seed: int = 0) -> Evaluation:
    """Pair the two policies' responses by prompt and sample index, and sum up.

    The intervals resample prompts, not responses: responses to one prompt are not independent of each other.
    Raises ValueError when the two sides do not answer the same prompts equally often.
    """
    theirs = {(row.prompt, row.sample): row for row in trained}
    if not base or set(theirs) != {(row.prompt, row.sample) for row in base} or len(theirs) != len(base):
        raise ValueError("Both policies must have answered the same prompts, each equally often and at least once.")
    pairs = [(row, theirs[row.prompt, row.sample]) for row in base]
    prompts = [row.prompt for row in base]
    order = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
    wins = [_win(before.gold, after.gold) for before, after in pairs]
    return Evaluation(
        prompts=len(order),
        samples_per_prompt=max(row.sample for row in base) + 1,
        base=_side(base),
        trained=_side([after for _, after in pairs]),
        gold_gain=_over_prompts(prompts, [after.gold - before.gold for before, after in pairs], seed),
        score_gain=_score_gain(prompts, pairs, seed),
        win_rate=_over_prompts(prompts, wins, seed),
        tie_share=wins.count(0.5) / len(wins),
        samples=tuple(_paired(before, after) for before, after in sorted(pairs, key=lambda p: order[p[0].prompt])),
    )


def load_evaluation(run_dir: Path) -> Evaluation | None:
    """What the last evaluation of this run found; None before there was one."""
    path = run_dir / EVALUATION_FILE
    if not path.exists():
        return None
    data = json.loads(path.read_text("utf-8"))
    data |= {side: Side(**data[side]) for side in ("base", "trained")}
    intervals = ("gold_gain", "score_gain", "win_rate")
    data |= {name: Interval(**data[name]) for name in intervals if data[name] is not None}
    data["samples"] = tuple(PairedSample(**sample) for sample in data["samples"])
    return Evaluation(**data)


def distinct(texts: Iterable[str], n: int) -> float:
    """Different n-grams / n-grams of words, over all texts together (Li et al. 2016); 0 when there are none."""
    grams: list[tuple[str, ...]] = []
    for text in texts:
        words = re.findall(r"\w+", text.lower())
        grams += zip(*(words[i:] for i in range(n)), strict=False)
    return len(set(grams)) / len(grams) if grams else 0.0


def _win(before: float, after: float) -> float:
    return 0.5 if after == before else float(after > before)


def _side(side: Sequence[EvalRow]) -> Side:
    def mean(values: Iterable[float]) -> float:
        return float(np.mean(list(values)))

    texts = [row.response for row in side]
    scores = [row.score for row in side if row.score is not None]
    return Side(
        gold=mean(row.gold for row in side),
        score=mean(scores) if scores else None,
        kl=mean(row.kl for row in side),
        tokens=mean(row.tokens for row in side),
        truncated_share=mean(row.truncated for row in side),
        distinct_1=distinct(texts, 1),
        distinct_2=distinct(texts, 2),
    )


def _score_gain(prompts: Sequence[str], pairs: Sequence[tuple[EvalRow, EvalRow]], seed: int) -> Interval | None:
    """Everything is scored, or nothing is."""
    gains = [b.score - a.score for a, b in pairs if a.score is not None and b.score is not None]
    return _over_prompts(prompts, gains, seed) if gains else None


def _over_prompts(prompts: Sequence[str], values: Sequence[float], seed: int) -> Interval:
    by_prompt: dict[str, list[float]] = defaultdict(list)
    for prompt, value in zip(prompts, values, strict=True):
        by_prompt[prompt].append(value)
    means = np.array([np.mean(group) for group in by_prompt.values()])
    drawn = np.random.default_rng(seed).integers(len(means), size=(RESAMPLES, len(means)))
    low, high = np.quantile(means[drawn].mean(axis=1), [0.025, 0.975])
    return Interval(value=float(means.mean()), low=float(low), high=float(high))


def _paired(before: EvalRow, after: EvalRow) -> PairedSample:
    return PairedSample(
        prompt=before.prompt,
        base=before.response,
        trained=after.response,
        base_gold=before.gold,
        trained_gold=after.gold,
        base_score=before.score,
        trained_score=after.score,
    )
