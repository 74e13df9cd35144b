"""completions.jsonl → preferences.jsonl and preferences.holdout.jsonl: a simulated labeller picks what it prefers."""

from __future__ import annotations

import itertools
import logging
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.config import RunConfig
from rlhf_ray.data.preferences import Preference, split_by_prompt, write_preferences
from rlhf_ray.data.tables import read_table
from rlhf_ray.errors import DataError
from rlhf_ray.roles.judge import SIMULATED_ANNOTATOR, VaderJudge

log = logging.getLogger("rlhf_ray.judge")


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeReport:
    """What was asked, and of whom."""

    annotator: str
    prompts: int
    """Distinct prompts read."""
    prompts_without_pair: int
    """Prompts whose candidates were too alike to ask about."""
    train_pairs: int
    holdout_pairs: int
    mean_margin: float
    """Mean |gold difference| of the pairs asked about."""
    train_path: Path
    holdout_path: Path


def judge(config: RunConfig) -> JudgeReport:
    """Compare sampled responses and split the comparisons by prompt.

    Raises:
        DataError: completions are missing or malformed, or too few pairs are clear enough to split.
    """
    completions = read_completions(config.run_dir / "completions.jsonl")
    rng = random.Random(config.seed)
    labeller = VaderJudge()
    pairs = {
        prompt: clearest_pairs(
            prompt,
            {text: labeller.score(text) for text in texts},
            count=config.judge.pairs_per_prompt,
            min_margin=config.judge.min_margin,
            rng=rng,
        )
        for prompt, texts in completions.items()
    }
    asked = [pair for found in pairs.values() for pair in found]
    prompts_asked = sum(map(bool, pairs.values()))
    if prompts_asked < 2:
        raise DataError(
            f"{prompts_asked} prompts have a pair clear enough to ask about, and a split needs 2; "
            "lower judge.min_margin, or raise collect.completions or collect.max_prompts"
        )
    train_rows, holdout_rows = split_by_prompt(asked, config.judge.holdout, seed=config.seed)
    report = JudgeReport(
        annotator=SIMULATED_ANNOTATOR,
        prompts=len(completions),
        prompts_without_pair=len(completions) - prompts_asked,
        train_pairs=len(train_rows),
        holdout_pairs=len(holdout_rows),
        mean_margin=statistics.fmean(abs(p.meta["gold1"] - p.meta["gold2"]) for p in asked),
        train_path=config.run_dir / "preferences.jsonl",
        holdout_path=config.run_dir / "preferences.holdout.jsonl",
    )
    write_preferences(report.train_path, train_rows)
    write_preferences(report.holdout_path, holdout_rows)
    log.info(
        "a simulated labeller (%s: a program, standing in for people) compared %d pairs over %d of %d prompts; "
        "%d pairs are held out",
        SIMULATED_ANNOTATOR,
        len(asked),
        prompts_asked,
        len(completions),
        len(holdout_rows),
    )
    return report


def read_completions(path: Path) -> dict[str, list[str]]:
    """Prompt → its distinct responses. Lines of one prompt are joined, so that a split by prompt is one by text.

    Raises:
        DataError: naming the line and the field.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist; run `rlhf-ray collect` with the same configuration first")
    completions: dict[str, list[str]] = {}
    for row in read_table(path):
        if row.value is None:
            raise DataError(f"{row.where} {row.problem}")
        prompt, texts = _prompt_and_texts(row.value, row.where)
        known = completions.setdefault(prompt, [])
        known += [text for text in dict.fromkeys(texts) if text not in known]
    if not completions:
        raise DataError(f"{path} holds no completions; run `rlhf-ray collect` again")
    return completions


def clearest_pairs(
    prompt: str, gold: Mapping[str, float], *, count: int, min_margin: float, rng: random.Random
) -> list[Preference]:
    """At most ``count`` comparisons, largest gold difference first, candidates in random order; never a tie.

    Each response is asked about once: with four of them, the second pair is what the clearest one leaves.

    Args:
        gold: response → the labeller's score of it.
        min_margin: smallest |gold difference| that is asked about.
    """
    pairs = [
        (abs(gold[a] - gold[b]), a, b)
        for a, b in itertools.combinations(gold, 2)
        if gold[a] != gold[b] and abs(gold[a] - gold[b]) >= min_margin
    ]
    pairs.sort(key=lambda pair: -pair[0])
    chosen: list[tuple[str, str]] = []
    for _, a, b in pairs:
        if len(chosen) < count and not any({a, b} & set(pair) for pair in chosen):
            chosen.append((a, b))
    return [_compare(prompt, rng.sample(pair, 2), gold) for pair in chosen]


def _compare(prompt: str, candidates: Sequence[str], gold: Mapping[str, float]) -> Preference:
    first, second = candidates
    return Preference(
        input_text=prompt,
        candidate1=first,
        candidate2=second,
        human_preference=1.0 if gold[first] > gold[second] else 0.0,
        annotator=SIMULATED_ANNOTATOR,
        meta={"gold1": gold[first], "gold2": gold[second]},
    )


def _prompt_and_texts(row: Mapping[str, Any], where: str) -> tuple[str, list[str]]:
    prompt, texts = row.get("prompt"), row.get("completions")
    if not isinstance(prompt, str):
        raise DataError(f'{where}: "prompt" must be text')
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(f'{where}: "completions" must be a list of texts')
    return prompt, texts
