"""What a set of comparisons is like, before a model is trained on it: counts, lengths, contradictions, agreement."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rlhf_ray.data.preferences import Preference

Pair = tuple[str, str, str]
"""input_text and the two candidates in alphabetical order: the same pair, whichever was shown first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Of a number over all comparisons."""

    median: float
    p95: float
    largest: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferenceReport:
    """Figures about a set of comparisons."""

    pairs: int
    prompts: int
    """Distinct prompts."""
    decided: int
    """Answers that are certain (0 or 1)."""
    ties: int
    first_preferred: float
    """Share of the first candidate among answers that are no ties; far from a half, the order may have decided."""
    longer_preferred: float
    """Share of the longer candidate among answers that are no ties and differ in length; near 1, length decides."""
    prompt_words: Spread
    candidate_words: Spread
    duplicates: int
    """Comparisons that say again, pair and answer alike, what one before them from the same annotator said."""
    contradictions: int
    """Pairs that were answered both ways, by whomever."""
    judged_by_several: int
    """Pairs with answers of at least two annotators."""
    agreement: float | None
    """Over those pairs: share of pairs of annotators who agree; None where nobody judged what another did."""
    annotators: Mapping[str, int]
    """Answers of each."""
    sources: Mapping[str, int]
    """Comparisons of each."""


def describe_preferences(preferences: Sequence[Preference]) -> PreferenceReport:
    """The report on at least one comparison."""
    answers: dict[Pair, list[tuple[str | None, float]]] = defaultdict(list)
    for preference in preferences:
        answers[_pair(preference)].append((preference.annotator, _toward_earlier(preference)))
    undecided = [p for p in preferences if p.human_preference == 0.5]
    decided = [p for p in preferences if p.human_preference != 0.5]
    by_length = [p for p in decided if len(p.chosen) != len(p.rejected)]
    several, agreeing, compared = _agreement(answers.values())
    return PreferenceReport(
        pairs=len(preferences),
        prompts=len({p.input_text for p in preferences}),
        decided=sum(p.decided for p in preferences),
        ties=len(undecided),
        first_preferred=_share([p.human_preference > 0.5 for p in decided]),
        longer_preferred=_share([len(p.chosen) > len(p.rejected) for p in by_length]),
        prompt_words=_spread([len(p.input_text.split()) for p in preferences]),
        candidate_words=_spread([len(text.split()) for p in preferences for text in (p.candidate1, p.candidate2)]),
        duplicates=sum(sum(count - 1 for count in Counter(found).values()) for found in answers.values()),
        contradictions=sum(min(a for _, a in found) < 0.5 < max(a for _, a in found) for found in answers.values()),
        judged_by_several=several,
        agreement=agreeing / compared if compared else None,
        annotators=_counted(p.annotator for p in preferences),
        sources=_counted(p.source for p in preferences),
    )


def _pair(preference: Preference) -> Pair:
    first, second = sorted((preference.candidate1, preference.candidate2))
    return preference.input_text, first, second


def _toward_earlier(preference: Preference) -> float:
    """P(the alphabetically earlier candidate is preferred)."""
    in_order = preference.candidate1 <= preference.candidate2
    return preference.human_preference if in_order else 1.0 - preference.human_preference


def _agreement(answers: Iterable[Sequence[tuple[str | None, float]]]) -> tuple[int, int, int]:
    """(pairs judged by several annotators, pairs of annotators who agree on one, pairs of annotators in all).

    An annotator who answered a pair more than once counts with the last answer.
    """
    several = agreeing = compared = 0
    for found in answers:
        by_annotator = {annotator: _side(answer) for annotator, answer in found if annotator is not None}
        if len(by_annotator) < 2:
            continue
        several += 1
        for one, other in itertools.combinations(by_annotator.values(), 2):
            agreeing += one == other
            compared += 1
    return several, agreeing, compared


def _side(answer: float) -> int:
    return (answer > 0.5) - (answer < 0.5)


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits) if hits else 0.5


def _spread(values: Sequence[int]) -> Spread:
    ordered = sorted(values)
    return Spread(
        median=statistics.median(ordered),
        p95=ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
        largest=ordered[-1],
    )


def _counted(names: Iterable[str | None]) -> dict[str, int]:
    return dict(Counter(name for name in names if name is not None).most_common())
