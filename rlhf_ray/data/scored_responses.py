"""Rows of {prompt, response, rewards}: what a reinforcement-learning loop has sampled and scored, as a file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.data.preferences import write_jsonl
from rlhf_ray.data.tables import Row, read_table
from rlhf_ray.errors import DataError

_FORM = '{"prompt": "...", "response": "...", "rewards": 0.5}'


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredResponse:
    """One response and what it was worth.

    Example: ``ScoredResponse(prompt="The train", response=" was a joy to ride!", rewards=0.7)``
    """

    prompt: str
    response: str
    """Without the prompt; may be empty."""
    rewards: float
    """Of the whole response; the name is the file's."""


def read_scored_responses(path: str | Path) -> list[ScoredResponse]:
    """Every row of a file, in its order; columns besides the three are passed over.

    Args:
        path: as ``tables.read_table`` takes it. ``rewards`` is a number, or a list of one.

    Raises:
        DataError: naming the file, the line, the field and the remedy of the first bad row; or there is no row.
    """
    rows = [_parsed(row) for row in read_table(path)]
    if not rows:
        raise DataError(f"{path} holds no response; write one a line, as {_FORM}")
    return rows


def write_scored_responses(path: Path, rows: Iterable[ScoredResponse]) -> None:
    """One JSON object a line, in the form that ``read_scored_responses`` reads; the file appears whole or not at all.

    Raises:
        DataError: a reward is NaN or infinite, which JSON cannot hold.
    """
    rows = list(rows)
    for number, row in enumerate(rows, start=1):
        if not math.isfinite(row.rewards):
            raise DataError(
                f"response {number} for {path} has rewards = {row.rewards}; leave it out, or score it again"
            )
    write_jsonl(path, (asdict(row) for row in rows))


def _parsed(row: Row) -> ScoredResponse:
    if row.value is None:
        raise DataError(f"{row.where} {row.problem}")
    prompt, response = (_text(row.where, row.value, field) for field in ("prompt", "response"))
    if not prompt.strip():
        raise DataError(f"{row.where} has an empty prompt; remove the row")
    return ScoredResponse(prompt=prompt, response=response, rewards=_number(row.where, row.value))


def _text(where: str, row: Mapping[str, Any], field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        raise DataError(f"{where} has no text under {field!r}; write it as {_FORM}")
    return value


def _number(where: str, row: Mapping[str, Any]) -> float:
    given = row.get("rewards")
    value = given[0] if isinstance(given, list) and len(given) == 1 else given
    try:
        # A CSV file has text alone.
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{where} has rewards = {given!r}, and one finite number is needed; write it as {_FORM}")
    return number
