"""How far a reward model can be trusted, from its scores of held-out pairs. Pure figures: no model, no file."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

CALIBRATION_BINS = 10
MARGIN_GROUPS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredPair:
    """A held-out pair and the raw scores of its candidates."""

    chosen: float
    rejected: float
    probability: float
    """P(the chosen one is preferred), as people said: 0.5 (a tie) to 1."""
    chosen_tokens: int
    """Of the response from where the two part, EOS included."""
    rejected_tokens: int
    source: str | None = None

    @property
    def margin(self) -> float:
        """Chosen − rejected, in units of the raw score."""
        return self.chosen - self.rejected

    @property
    def is_tie(self) -> bool:
        """Nobody can be right or wrong about it."""
        return self.probability == 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """Share of pairs whose preferred candidate scores higher; equal scores count as wrong, ties are left out."""

    value: float
    low: float
    high: float
    """Wilson 95 % interval."""
    pairs: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationBin:
    """Pairs to which the model gives about the same probability."""

    predicted: float
    """Mean probability that the likelier candidate is preferred."""
    observed: float
    """Mean of what people said of that candidate."""
    pairs: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MarginGroup:
    """A quarter of the pairs, by |score difference|."""

    largest_margin: float
    accuracy: Accuracy


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """The figures of a quality report."""

    accuracy: Accuracy
    log_loss: float
    """Mean cross-entropy of what people said under σ(chosen − rejected), nats; log 2 knows nothing."""
    calibration_error: float
    """ECE: mean |predicted − observed| over the bins, weighted by their pairs (Guo et al. 2017)."""
    calibration: tuple[CalibrationBin, ...]
    length_correlation: float
    """Pearson's r of score and response tokens over all candidates; near ±1 the model scores length."""
    longer_preferred: float
    """Share of pairs in which the model prefers the longer candidate, of those that differ in length."""
    longer_preferred_by_people: float
    by_source: dict[str, Accuracy]
    by_margin: tuple[MarginGroup, ...]
    """From the least to the most certain quarter: a sound model is the more often right the more certain it is."""


def quality(pairs: Sequence[ScoredPair]) -> Quality:
    """The figures over at least one pair that is no tie."""
    decided = [pair for pair in pairs if not pair.is_tie]
    bins = _calibration(pairs)
    by_source: dict[str, list[ScoredPair]] = defaultdict(list)
    for pair in decided:
        if pair.source is not None:
            by_source[pair.source].append(pair)
    differing = [pair for pair in decided if pair.chosen_tokens != pair.rejected_tokens]
    return Quality(
        accuracy=accuracy(decided),
        log_loss=statistics.fmean(_cross_entropy(pair) for pair in pairs),
        calibration_error=sum(b.pairs * abs(b.predicted - b.observed) for b in bins) / len(pairs),
        calibration=bins,
        length_correlation=_correlation(
            [score for pair in pairs for score in (pair.chosen, pair.rejected)],
            [tokens for pair in pairs for tokens in (pair.chosen_tokens, pair.rejected_tokens)],
        ),
        longer_preferred=_share(differing, lambda p: (p.margin > 0) == (p.chosen_tokens > p.rejected_tokens)),
        longer_preferred_by_people=_share(differing, lambda p: p.chosen_tokens > p.rejected_tokens),
        by_source={source: accuracy(of) for source, of in sorted(by_source.items())},
        by_margin=_by_margin(decided),
    )


def accuracy(pairs: Sequence[ScoredPair]) -> Accuracy:
    """Of pairs without ties, at least one."""
    right = sum(pair.margin > 0 for pair in pairs)
    low, high = wilson_interval(right, len(pairs))
    return Accuracy(value=right / len(pairs), low=low, high=high, pairs=len(pairs))


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


def _cross_entropy(pair: ScoredPair) -> float:
    return pair.probability * log_loss(pair.margin) + (1 - pair.probability) * log_loss(-pair.margin)


def _calibration(pairs: Sequence[ScoredPair]) -> tuple[CalibrationBin, ...]:
    """Equal bins of the likelier candidate's probability, 0.5 to 1; empty ones are left out."""
    bins: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for pair in pairs:
        predicted = math.exp(-log_loss(abs(pair.margin)))
        observed = pair.probability if pair.margin >= 0 else 1 - pair.probability
        bins[min(int((predicted - 0.5) * 2 * CALIBRATION_BINS), CALIBRATION_BINS - 1)].append((predicted, observed))
    return tuple(
        CalibrationBin(
            predicted=statistics.fmean(p for p, _ in found),
            observed=statistics.fmean(o for _, o in found),
            pairs=len(found),
        )
        for _, found in sorted(bins.items())
    )


def _by_margin(pairs: Sequence[ScoredPair]) -> tuple[MarginGroup, ...]:
    ordered = sorted(pairs, key=lambda pair: abs(pair.margin))
    edges = [round(i * len(ordered) / MARGIN_GROUPS) for i in range(MARGIN_GROUPS + 1)]
    groups = [ordered[begin:end] for begin, end in itertools.pairwise(edges) if end > begin]
    return tuple(MarginGroup(largest_margin=abs(group[-1].margin), accuracy=accuracy(group)) for group in groups)


def _correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Pearson's r; 0 where one of the two never changes."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return 0.0
    return statistics.correlation(first, second)


def _share(pairs: Sequence[ScoredPair], holds: Callable[[ScoredPair], bool]) -> float:
    return sum(map(holds, pairs)) / len(pairs) if pairs else 0.5
