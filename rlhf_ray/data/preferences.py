"""Preference data: pairs of candidates for one input, and which one was preferred.

On disk a JSON object a line, ``{"input_text", "candidate1", "candidate2", "human_preference"}``; in memory a
``Preference``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_ray.errors import DataError

_TEXT_FIELDS = ("input_text", "candidate1", "candidate2")
_REQUIRED = f"{', '.join(_TEXT_FIELDS)} and human_preference"
_NAMED_PREFERENCES = {"candidate1": 1.0, "candidate2": 0.0, "1": 1.0, "2": 0.0}
_KNOWN_FIELDS = {*_TEXT_FIELDS, "human_preference", "source", "annotator"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Preference:
    """One comparison.

    Example: ``Preference(input_text="The train", candidate1=" is late.", candidate2=" is fun!", human_preference=0.0)``
    """

    input_text: str
    """The prompt as a person wrote it, before a chat template."""
    candidate1: str
    candidate2: str
    human_preference: float
    """P(candidate1 is preferred), 0 to 1: 1 the first, 0 the second, 0.5 a tie."""
    annotator: str | None = None
    """Who compared; a program that stands in for people says so here."""
    source: str | None = None
    """Where the pair comes from."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Every other field of the line, kept as it was."""

    @property
    def decided(self) -> bool:
        """True when the preference is certain (0 or 1)."""
        return self.human_preference in (0.0, 1.0)

    @property
    def chosen(self) -> str:
        """The likelier preferred candidate."""
        return self.candidate1 if self.human_preference >= 0.5 else self.candidate2

    @property
    def rejected(self) -> str:
        """The other one."""
        return self.candidate2 if self.human_preference >= 0.5 else self.candidate1


def read_preferences(path: Path) -> list[Preference]:
    """Every comparison of a JSONL file, in its order; blank lines are passed over.

    ``human_preference`` may be "candidate1" or "candidate2", 1 or 2, or P(candidate1 is preferred) between 0 and 1 (1
    means the first candidate either way).

    Raises:
        DataError: naming the file, the line, the field and the remedy.
    """
    preferences = [_parse(row, where) for where, row in read_jsonl(path)]
    if not preferences:
        raise DataError(f"{path} holds no comparison; write one JSON object a line, with {_REQUIRED}")
    return preferences


def write_preferences(path: Path, preferences: Iterable[Preference]) -> None:
    """Write comparisons in the form that ``read_preferences`` reads; the file appears whole or not at all."""
    write_jsonl(path, (_row(preference) for preference in preferences))


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("FILE line N", object) for each line that is not blank.

    Raises:
        DataError: the file is missing or is not UTF-8, or a line is not a JSON object.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            reason = f"{error.msg} at column {error.colno}"
            raise DataError(f"{where} is not JSON ({reason}); write one JSON object a line") from error
        if not isinstance(row, dict):
            raise DataError(f"{where} holds a {type(row).__name__}; write one JSON object a line")
        yield where, row


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _parse(row: Mapping[str, Any], where: str) -> Preference:
    for name in (*_TEXT_FIELDS, "human_preference"):
        if name not in row:
            raise DataError(f'{where} has no field "{name}"; every comparison needs {_REQUIRED}')
    for name in _TEXT_FIELDS:
        if not isinstance(row[name], str):
            raise DataError(f'{where}: "{name}" must be text, not {type(row[name]).__name__}')
        if any("\ud800" <= letter <= "\udfff" for letter in row[name]):
            raise DataError(f'{where}: "{name}" has half of a surrogate pair, which no tokenizer can read; remove it')
    if not row["input_text"].strip():
        raise DataError(f'{where}: "input_text" is empty; give the prompt that the candidates answer')
    for name in ("annotator", "source"):
        if not isinstance(row.get(name), str | None):
            raise DataError(f'{where}: "{name}" must be text, not {type(row[name]).__name__}')
    return Preference(
        **{name: row[name] for name in _TEXT_FIELDS},
        human_preference=_parse_preference(row["human_preference"], where),
        annotator=row.get("annotator"),
        source=row.get("source"),
        meta={name: value for name, value in row.items() if name not in _KNOWN_FIELDS},
    )


def _parse_preference(value: Any, where: str) -> float:
    if isinstance(value, str) and value in _NAMED_PREFERENCES:
        return _NAMED_PREFERENCES[value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value == 2:
            return 0.0
        if 0 <= value <= 1:
            return float(value)
    raise DataError(
        f'{where}: "human_preference" is {json.dumps(value)}; write "candidate1", "candidate2", 1, 2, '
        "or the probability (0 to 1) that candidate1 is preferred"
    )


def _row(preference: Preference) -> dict[str, Any]:
    answer: str | float = preference.human_preference
    if preference.decided:
        answer = "candidate1" if preference.human_preference == 1.0 else "candidate2"
    row: dict[str, Any] = {name: getattr(preference, name) for name in _TEXT_FIELDS}
    row["human_preference"] = answer
    for name in ("annotator", "source"):
        if getattr(preference, name) is not None:
            row[name] = getattr(preference, name)
    return row | dict(preference.meta)
