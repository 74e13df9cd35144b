"""Preference files of every form → ``Preference``; bad rows are refused, or set aside with their reason.

file ──► tables ──► preference_rows ──► Loaded.preferences
            │              │
            └──────────────┴──────────► Loaded.rejects ──► a rejects file: nothing is lost in silence
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.data.preference_rows import parse_preference
from rlhf_ray.data.preferences import Preference, write_jsonl
from rlhf_ray.data.tables import Row, read_table
from rlhf_ray.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Reject:
    """A row that is no comparison."""

    where: str
    reason: str
    """A sentence that begins with ``where``."""
    row: Any
    """The row as it was; its text where it could not be read at all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """What a file holds."""

    preferences: list[Preference]
    rejects: list[Reject]


def read_preferences(path: str | Path) -> list[Preference]:
    """Every comparison of a file, in its order.

    Args:
        path: as ``tables.read_table`` takes it; its rows in any form of ``preference_rows``.

    Raises:
        DataError: naming the file, the line, the field and the remedy of the first bad row; or there is no row.
    """
    loaded = load_preferences(path)
    if loaded.rejects:
        raise DataError(loaded.rejects[0].reason)
    if not loaded.preferences:
        raise DataError(
            f"{path} holds no comparison; write one a line, as "
            '{"input_text": "...", "candidate1": "...", "candidate2": "...", "human_preference": "candidate1"}'
        )
    return loaded.preferences


def load_preferences(path: str | Path) -> Loaded:
    """Every comparison of a file, in its order, and every row that is none.

    Raises:
        DataError: the file cannot be read at all.
    """
    loaded = Loaded(preferences=[], rejects=[])
    for row in read_table(path):
        try:
            loaded.preferences.append(_parsed(row))
        except DataError as error:
            kept = row.text if row.value is None else dict(row.value)
            loaded.rejects.append(Reject(where=row.where, reason=str(error), row=kept))
    return loaded


def write_rejects(path: Path, rejects: Sequence[Reject]) -> None:
    """One JSON object a line: where, reason, row; the file appears whole or not at all."""
    write_jsonl(path, ({"where": r.where, "reason": r.reason, "row": r.row} for r in rejects))


def _parsed(row: Row) -> Preference:
    if row.value is None:
        raise DataError(f"{row.where} {row.problem}")
    return parse_preference(row.value, row.where)
