"""Two policies beside each other: the rows that the page and the terminal show."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from itertools import zip_longest

from rlhf_ray.stages.evaluate import Evaluation, PairedSample

TERMINAL_SAMPLES = 3
"""Prompts whose responses are shown in the terminal."""
COLUMN = 36
"""Width of a policy's column in the terminal, characters."""


def comparison_rows(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    """(what, base, trained) of every mean."""
    base, trained = evaluation.base, evaluation.trained
    return [
        ("Gold score", f"{base.gold:.3f}", f"{trained.gold:.3f}"),
        *_scores(base.score, trained.score),
        ("KL to the reference, nats per response", f"{base.kl:.2f}", f"{trained.kl:.2f}"),
        ("Tokens per response", f"{base.tokens:.1f}", f"{trained.tokens:.1f}"),
        ("Truncated", f"{base.truncated_share:.0%}", f"{trained.truncated_share:.0%}"),
        ("Distinct words", f"{base.distinct_1:.2f}", f"{trained.distinct_1:.2f}"),
        ("Distinct word pairs", f"{base.distinct_2:.2f}", f"{trained.distinct_2:.2f}"),
    ]


def first_of_each_prompt(samples: Sequence[PairedSample], limit: int) -> list[PairedSample]:
    """The first pair of each of the first ``limit`` prompts: chosen by place, not by how well they came out."""
    first: dict[str, PairedSample] = {}
    for sample in samples:
        first.setdefault(sample.prompt, sample)
    return list(first.values())[:limit]


def comparison_lines(evaluation: Evaluation) -> Iterator[str]:
    """The comparison in a terminal: means, win rate, and a few responses side by side."""
    win, width = evaluation.win_rate, COLUMN
    names = (evaluation.base_name, evaluation.trained_name)
    yield f"{'mean':<{width + 4}} {_short(names[0], 20):>20} {_short(names[1], 20):>20}"
    for what, base, trained in comparison_rows(evaluation):
        yield f"{what:<{width + 4}} {base:>20} {trained:>20}"
    yield (
        f"{names[1]} wins {win.value:.1%} (95 % interval {win.low:.1%} to {win.high:.1%}), "
        f"ties ({evaluation.tie_share:.0%}) count half; judged by {evaluation.judge}"
    )
    for sample in first_of_each_prompt(evaluation.samples, TERMINAL_SAMPLES):
        yield ""
        yield f"> {_short(' '.join(sample.prompt.split()), 2 * width)}"
        left = [f"{_short(names[0], width - 14)} (gold {sample.base_gold:.2f})", *_wrapped(sample.base)]
        right = [f"{_short(names[1], width - 14)} (gold {sample.trained_gold:.2f})", *_wrapped(sample.trained)]
        for one, other in zip_longest(left, right, fillvalue=""):
            yield f"{one:<{width}} | {other}"


def _scores(base: float | None, trained: float | None) -> list[tuple[str, str, str]]:
    if base is None or trained is None:
        return []
    return [("Score, as PPO raises it", f"{base:.3f}", f"{trained:.3f}")]


def _wrapped(response: str) -> list[str]:
    return textwrap.wrap(response.strip(), COLUMN, max_lines=4, placeholder=" ...")


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."
