"""Data check: a file of comparisons looked through before a reward model is trained on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_ray.data.preference_files import Reject, load_preferences, write_rejects
from rlhf_ray.data.preference_report import PreferenceReport, describe_preferences
from rlhf_ray.data.preferences import split_by_prompt
from rlhf_ray.errors import DataError

SHOWN_REASONS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class DataCheck:
    """What ``rlhf-ray data check`` found."""

    path: str
    report: PreferenceReport
    rejects: int
    rejects_path: Path | None
    """Where the bad rows went; None where there were none."""
    train_pairs: int
    holdout_pairs: int
    """Of a split that keeps one prompt's pairs on one side; 0 where there is one prompt only."""


def check_data(path: str, *, skip_bad_rows: bool, rejects_path: Path, holdout: float, seed: int) -> DataCheck:
    """Read, describe and try out the split.

    Args:
        skip_bad_rows: write them to ``rejects_path`` with their reasons and go on without them.
        holdout: share of the prompts that the split holds out.

    Raises:
        DataError: the file cannot be read, has no comparison, or has bad rows that are not to be skipped.
    """
    loaded = load_preferences(path)
    if loaded.rejects and not skip_bad_rows:
        total = len(loaded.rejects) + len(loaded.preferences)
        remedy = f"--on-bad-row skip to write them to {rejects_path} and go on"
        raise DataError(bad_rows(path, loaded.rejects, total=total, remedy=remedy))
    if loaded.rejects:
        write_rejects(rejects_path, loaded.rejects)
    if not loaded.preferences:
        why = f"; why not is in {rejects_path}" if loaded.rejects else ""
        raise DataError(f"{path} holds no comparison{why}")
    report = describe_preferences(loaded.preferences)
    sides = split_by_prompt(loaded.preferences, holdout, seed=seed) if report.prompts > 1 else (loaded.preferences, [])
    return DataCheck(
        path=path,
        report=report,
        rejects=len(loaded.rejects),
        rejects_path=rejects_path if loaded.rejects else None,
        train_pairs=len(sides[0]),
        holdout_pairs=len(sides[1]),
    )


def bad_rows(path: str, rejects: Sequence[Reject], *, total: int, remedy: str, noun: str = "comparison") -> str:
    """The first reasons, how many there are in all, and what to do."""
    reasons = [reject.reason for reject in rejects]
    more = [f"and {len(reasons) - SHOWN_REASONS} more"] if len(reasons) > SHOWN_REASONS else []
    first = f"{len(reasons)} of {total} rows of {path} are no {noun}; mend them, or use {remedy}:"
    return "\n".join([first, *reasons[:SHOWN_REASONS], *more])
