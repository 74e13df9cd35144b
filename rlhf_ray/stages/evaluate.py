"""Evaluate: two policies on the same prompts; by default a run's base and its trained policy, on held-out ones.

The gold judge decides; the score that PPO raised, which never saw that judge, stands beside it. A score that rises
while gold falls is over-optimisation (Gao et al. 2022), and this is where it shows. A run without a reward model, by
SFT or DPO, has no scores. Who samples, judges and scores is handed in.

Of any two policies "base" is the baseline, "trained" the one that is judged; the KL of both is to ``model.path``.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePath

import numpy as np

from rlhf_ray.config import RunConfig
from rlhf_ray.errors import ModelError
from rlhf_ray.metrics import write_json, write_summary
from rlhf_ray.types import Rollout, Score

EVALUATION_FILE = "evaluation.json"
COMPARISONS_FOLDER = "comparisons"
"""In the run's folder: comparisons of other pairs, or on other prompts, than the run's own."""
RESAMPLES = 2000
"""Bootstrap resamples; their spread changes an interval's ends by less than they are printed to."""

Sampler = Callable[[Sequence[str]], Sequence[Sequence[Rollout]]]
"""Two policies as a person named them → of each, its responses to the prompts, ``evaluate.samples_per_prompt`` each."""
Gold = Callable[[Sequence[Rollout], Sequence[Score] | None], Sequence[float]]
"""Rollouts, and what the scorers gave them if anything scores → the judge's verdicts; higher is better."""
Measure = Callable[[Sequence[Rollout]], tuple[Sequence[Score] | None, Sequence[np.ndarray]]]
"""Rollouts → their scores, if anything scores; and one [T] array each, the reference's log-probabilities of the
response, nats, same temperature."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """One of the two policies."""

    name: str
    """For people: the run's name of a ``policy`` folder, else the last part of the path."""
    path: str
    """As ``model.path`` takes it."""
    key: str
    """Of the configuration, that names it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairing:
    """Who is compared, on what, by whom, and where the result goes."""

    base: Contender
    trained: Contender
    prompts: str
    judge: str
    """"vader", a function's ``module:name``, or "scorer NAME"."""
    output: Path


def pairing(config: RunConfig) -> Pairing:
    """What ``evaluate`` of this configuration compares; nothing is looked at yet."""
    section = config.evaluate
    own = config.output_dir.expanduser().resolve() / config.name / "policy"  # the same from whatever folder
    policy, baseline = section.policy or str(own), section.baseline or config.model.path
    names = _name(policy), _name(baseline)
    if names[0] == names[1]:
        names = policy, baseline
    trained = Contender(name=names[0], path=policy, key="evaluate.policy")
    base = Contender(
        name=names[1], path=baseline, key="model.path" if section.baseline is None else "evaluate.baseline"
    )
    judged_by_scorer = section.judge != "vader" and ":" not in section.judge
    return Pairing(
        base=base,
        trained=trained,
        prompts=section.prompts or config.prompts.eval_path,
        judge=f"scorer {section.judge}" if judged_by_scorer else section.judge,
        output=_output(config, trained, base),
    )


def _name(path: str) -> str:
    parts = PurePath(path)
    return parts.parent.name if parts.name == "policy" and parts.parent.name else parts.name.removesuffix(".gguf")


def _output(config: RunConfig, trained: Contender, base: Contender) -> Path:
    section = config.evaluate
    if section.of_the_run:
        return config.run_dir / EVALUATION_FILE
    if section.output is not None:
        return section.output.expanduser()
    name = f"{trained.name} over {base.name}"
    if section.prompts is not None:
        name += f" on {PurePath(section.prompts.removeprefix('recipe:')).stem}"
    return config.run_dir / COMPARISONS_FOLDER / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('-')[:200]}.json"


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
    """Nats per response, to ``model.path`` of the run."""
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
    """What ``evaluation.json`` holds, and the file of any other comparison."""

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
    base_name: str = "base"
    trained_name: str = "trained"
    base_path: str | None = None
    trained_path: str | None = None
    """As the policies were named, and None in a file from before they were written down; so are the next two."""
    reference: str | None = None
    """What the KL of both sides is measured against."""
    prompts_path: str | None = None
    judge: str = "vader"
    """Who gave the gold scores: "vader", a function's ``module:name``, or "scorer NAME"."""


def evaluate(config: RunConfig, *, sample: Sampler, gold: Gold, measure: Measure) -> Evaluation:
    """Sample from both policies, judge, compare, and write what was found.

    The run's own comparison goes into ``evaluation.json`` and the summary; any other into a file of its own.

    Raises:
        ModelError: the run has no trained policy yet, and no other one is named.
    """
    check_trained_policy(config)
    pair = pairing(config)
    sides = []
    for rollouts in sample([pair.base.path, pair.trained.path]):
        scores, reference_logprobs = measure(rollouts)
        verdicts = gold(rollouts, scores)
        sides.append(rows(rollouts, gold=verdicts, scores=scores, reference_logprobs=reference_logprobs))
    evaluation = replace(
        compare(*sides, seed=config.seed),
        base_name=pair.base.name,
        trained_name=pair.trained.name,
        base_path=pair.base.path,
        trained_path=pair.trained.path,
        reference=config.model.path,
        prompts_path=pair.prompts,
        judge=pair.judge,
    )
    pair.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(pair.output, asdict(evaluation))
    if config.evaluate.of_the_run:
        write_summary(config.run_dir, _figures(evaluation))
    return evaluation


def _figures(evaluation: Evaluation) -> dict[str, float | str]:
    """What the run's summary says of it."""
    return {
        "gold_before": evaluation.base.gold,
        "gold_after": evaluation.trained.gold,
        "gold_judge": evaluation.judge,
        "win_rate": evaluation.win_rate.value,
        "kl_evaluation": evaluation.trained.kl,
    }


def check_trained_policy(config: RunConfig) -> None:
    """
    Raises:
        ModelError: the run's own policy is to be judged, and there is none yet.
    """
    folder = config.run_dir / "policy"
    if config.evaluate.policy is None and not (folder / "config.json").exists():
        raise ModelError(
            f"there is no trained policy at {folder}; run rlhf-ray ppo, dpo or sft with this configuration first, "
            "or name another policy with evaluate.policy (--policy)"
        )


def rows(
    rollouts: Sequence[Rollout],
    *,
    gold: Sequence[float],
    scores: Sequence[Score] | None,
    reference_logprobs: Sequence[np.ndarray],
) -> list[EvalRow]:
    """Rollouts with their verdicts; a prompt's responses are numbered in the order of their prompt ids."""
    values = [None] * len(rollouts) if scores is None else [score.value for score in scores]
    judged = zip(rollouts, gold, values, reference_logprobs, strict=True)
    counts: dict[str, int] = defaultdict(int)
    result: list[EvalRow] = []
    for rollout, verdict, score, reference in sorted(judged, key=lambda item: item[0].prompt.prompt_id):
        text = rollout.prompt.text
        result.append(
            EvalRow(
                prompt=text,
                sample=counts[text],
                response=rollout.text,
                tokens=len(rollout.response_ids),
                truncated=rollout.finish_reason == "length",
                gold=verdict,
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
    """What the last evaluation of this run's own pair found; None before there was one."""
    path = run_dir / EVALUATION_FILE
    return read_evaluation(path) if path.exists() else None


def read_evaluation(path: Path) -> Evaluation:
    """What ``evaluate`` has written into a file."""
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
