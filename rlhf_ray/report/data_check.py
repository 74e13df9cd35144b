"""What ``rlhf-ray data check`` prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rlhf_ray.data.preference_report import PreferenceReport, Spread
from rlhf_ray.stages.data_check import DataCheck

MOST_NAMES = 5


def check_lines(check: DataCheck) -> Iterator[str]:
    """One line a figure, what to worry about with a word of why."""
    yield f"{check.path}: {check.report.pairs} comparisons of {check.report.prompts} prompts"
    for name, text in _figures(check.report):
        yield f"  {name:<20} {text}"
    yield f"  {'split':<20} {_split(check)}"
    if check.rejects_path is not None:
        yield f"  {'set aside':<20} {check.rejects} rows, with their reasons: {check.rejects_path}"


def _figures(report: PreferenceReport) -> Iterator[tuple[str, str]]:
    soft = report.pairs - report.decided - report.ties
    ties = f"{report.ties} ties ({report.ties / report.pairs:.1%})"
    yield "answers", f"{report.decided} certain, {soft} probabilities, {ties}"
    yield "first preferred", f"{report.first_preferred:.1%} of the answers that are no ties"
    yield "longer preferred", f"{report.longer_preferred:.1%} of those between candidates of different length"
    yield "words of a prompt", _spread(report.prompt_words)
    yield "words of a candidate", _spread(report.candidate_words)
    yield "duplicates", f"{report.duplicates} say again what the same annotator said before"
    yield "contradictions", f"{report.contradictions} pairs were answered both ways"
    if report.agreement is None:
        yield "agreement", "not known: no pair was answered by two annotators"
    else:
        yield "agreement", f"{report.agreement:.1%}, over {report.judged_by_several} pairs that several answered"
    yield "annotators", _names(report.annotators)
    yield "sources", _names(report.sources)


def _spread(spread: Spread) -> str:
    return f"median {spread.median:g}, 95 % at most {spread.p95:g}, longest {spread.largest:g}"


def _names(counts: Mapping[str, int]) -> str:
    shown = [f"{name} {count}" for name, count in list(counts.items())[:MOST_NAMES]]
    more = [f"{len(counts) - MOST_NAMES} more"] if len(counts) > MOST_NAMES else []
    return ", ".join([*shown, *more]) or "none named"


def _split(check: DataCheck) -> str:
    if not check.holdout_pairs:
        return "none: all pairs have one prompt, and a prompt's pairs stay on one side"
    return f"{check.train_pairs} pairs to train on, {check.holdout_pairs} held out; no prompt is on both sides"
