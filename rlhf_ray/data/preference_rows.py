"""A row of a table → a ``Preference``, in whichever of the field's forms it is written.

    form                   columns                                                          recognised by
    the seed's             input_text, candidate1, candidate2, human_preference             input_text
    hh-rlhf dialogues      chosen, rejected: texts of Human and Assistant turns             their first words
    TRL, explicit prompt   prompt, chosen, rejected: texts, or lists of messages            prompt
    TRL, implicit prompt   chosen, rejected: texts or lists that begin alike                neither of them

Optional in each: weight, margin, annotator, source, id; every other column is kept as it is.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_ray.data.preferences import Preference, as_dialogue
from rlhf_ray.errors import DataError
from rlhf_ray.types import Turn

_SEED = ("input_text", "candidate1", "candidate2", "human_preference")
_PAIR = ("chosen", "rejected")
_OPTIONAL = ("weight", "margin", "annotator", "source", "id", "messages")
_NEEDED = (
    f"a comparison has the columns {', '.join(_SEED)}, or prompt, chosen and rejected, or chosen and rejected that "
    "begin alike"
)
_ANSWERS = {"candidate1": 1.0, "candidate2": 0.0, "tie": 0.5}
_SPEAKER = re.compile(r"\n\n(Human|Assistant): ?")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def parse_preference(row: Mapping[str, Any], where: str) -> Preference:
    """One comparison.

    Args:
        where: the row's place, which begins every message.

    Raises:
        DataError: naming the field and the remedy.
    """
    known: tuple[str, ...]
    try:
        if "input_text" in row:
            fields, known = _seed_form(row), _SEED
        elif all(name in row for name in _PAIR):
            fields, known = _pair_form(row), ("prompt", *_PAIR)
        else:
            raise DataError(f"the columns are {', '.join(map(str, row)) or 'none'}; {_NEEDED}")
        if fields["candidate1"] == fields["candidate2"]:
            raise DataError("the two candidates are the same; there is nothing to compare")
        return Preference(**fields, **_optional(row), meta=_others(row, (*known, *_OPTIONAL)))
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def parse_answer(value: Any) -> float:
    """P(the first candidate is preferred) from any spelling of an answer.

    "candidate1", 1 and "1" are the first, "candidate2", 2 and "2" the second, "tie" and 0.5 neither; a number from 0 to
    1 is the probability itself.

    Raises:
        DataError: it is none of them.
    """
    number = value
    if isinstance(value, str):
        text = value.strip().lower()
        if text in _ANSWERS:
            return _ANSWERS[text]
        number = _number(text)
    if isinstance(number, int | float) and not isinstance(number, bool):
        if number == 2:
            return 0.0
        if 0 <= number <= 1:
            return float(number)
    raise DataError(
        f'"human_preference" is {json.dumps(value, default=str)}; write "candidate1", "candidate2", "tie", 1, 2, '
        "or the probability (0 to 1) that candidate1 is preferred"
    )


def _seed_form(row: Mapping[str, Any]) -> dict[str, Any]:
    missing = [name for name in _SEED if row.get(name) is None]
    if missing:
        raise DataError(f'it has no field "{missing[0]}"; every comparison needs {", ".join(_SEED)}')
    fields: dict[str, Any] = {name: parse_text(row[name], name) for name in _SEED[:3]}
    if not fields["input_text"].strip():
        raise DataError('"input_text" is empty; give the prompt that the candidates answer')
    turns = parse_messages(row["messages"], "messages") if row.get("messages") else ()
    return fields | {"human_preference": parse_answer(row["human_preference"]), "turns": turns}


def _pair_form(row: Mapping[str, Any]) -> dict[str, Any]:
    """The chosen one is candidate 1."""
    prompt, chosen, rejected = (row.get(name) for name in ("prompt", *_PAIR))
    fields: dict[str, Any]
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is not None:
            fields = {
                "input_text": parse_text(prompt, "prompt"),
                "candidate1": chosen,
                "candidate2": rejected,
                "turns": (),
            }
        elif _SPEAKER.match(chosen):
            fields = _dialogues(chosen, rejected)
        else:
            fields = _beginning_alike(chosen, rejected)
    else:
        fields = _conversations(prompt, chosen, rejected)
    for name, column in (("candidate1", "chosen"), ("candidate2", "rejected")):
        parse_text(fields[name], column)
    if not fields["input_text"].strip():
        raise DataError("the prompt is empty; chosen and rejected need something that they answer")
    return fields | {"human_preference": 1.0}


def _dialogues(chosen: str, rejected: str) -> dict[str, Any]:
    """hh-rlhf: two whole dialogues that differ in the last assistant turn (Bai et al. 2022)."""
    shared = _shared_beginning(chosen, rejected)
    marks = [mark for mark in _SPEAKER.finditer(chosen) if mark.end() <= len(shared) and mark[1] == "Assistant"]
    if not marks:
        raise DataError('"chosen" and "rejected" share no prompt: they part before the first assistant turn')
    begin = marks[-1].end()
    prompt, candidates = chosen[:begin], (chosen[begin:], rejected[begin:])
    if any(_SPEAKER.search(candidate) for candidate in candidates):
        raise DataError('"chosen" and "rejected" part before the last assistant turn; a comparison is of one response')
    turns = _turns_of(prompt)
    return {"input_text": prompt, "candidate1": candidates[0], "candidate2": candidates[1], "turns": turns}


def _shared_beginning(first: str, second: str) -> str:
    parted = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return first[: next(parted, min(len(first), len(second)))]


def _turns_of(prompt: str) -> tuple[Turn, ...]:
    """The turns before the response that ``prompt`` asks for."""
    marks = list(_SPEAKER.finditer(prompt))
    ends = [mark.start() for mark in marks[1:]]
    return tuple(
        Turn(role=_ROLES[mark[1]], content=prompt[mark.end() : end].strip())
        for mark, end in zip(marks, ends, strict=False)
    )


def _beginning_alike(chosen: str, rejected: str) -> dict[str, Any]:
    """TRL's implicit prompt: what both begin with, up to the last white space before they part."""
    shared = _shared_beginning(chosen, rejected)
    begin = max((i for i, letter in enumerate(shared) if letter.isspace()), default=0)
    if not begin:
        raise DataError('there is no "prompt", and "chosen" and "rejected" begin with no word in common')
    return {"input_text": chosen[:begin], "candidate1": chosen[begin:], "candidate2": rejected[begin:], "turns": ()}


def _conversations(prompt: Any, chosen: Any, rejected: Any) -> dict[str, Any]:
    first, second = parse_messages(chosen, "chosen"), parse_messages(rejected, "rejected")
    if prompt is None:
        alike = next(
            (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
        )
        turns, first, second = first[:alike], first[alike:], second[alike:]
    else:
        turns = parse_messages(prompt, "prompt")
    for column, answer in (("chosen", first), ("rejected", second)):
        if len(answer) != 1 or answer[0].role != "assistant":
            raise DataError(f'"{column}" must add one assistant message to the prompt; it adds {len(answer)} messages')
    if not turns:
        raise DataError("the prompt is empty; chosen and rejected need something that they answer")
    text = turns[0].content if len(turns) == 1 and turns[0].role == "user" else as_dialogue(turns)
    return {"input_text": text, "candidate1": first[0].content, "candidate2": second[0].content, "turns": turns}


def parse_messages(value: Any, name: str) -> tuple[Turn, ...]:
    """Messages with role and content.

    Args:
        name: of the column, which messages name.

    Raises:
        DataError: it is something else.
    """
    if isinstance(value, str):
        raise DataError(f'"{name}" is text where the other columns are lists of messages; write all three alike')
    if not isinstance(value, Sequence) or not all(isinstance(item, Mapping) for item in value):
        raise DataError(f'"{name}" must be text or a list of messages, each with role and content')
    turns = []
    for item in value:
        role, content = item.get("role"), item.get("content")
        if role not in ("system", "user", "assistant"):
            raise DataError(
                f'"{name}" has a message with role {json.dumps(role, default=str)}; use system, user or assistant'
            )
        turns.append(Turn(role=role, content=parse_text(content, f"{name}.content")))
    return tuple(turns)


def _optional(row: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("annotator", "source"):
        if row.get(name) not in (None, ""):
            found[name] = parse_text(row[name], name)
    if row.get("id") not in (None, ""):
        found["pair_id"] = str(row["id"])
    for name, lowest in (("weight", "above 0"), ("margin", "0 or more")):
        if row.get(name) in (None, ""):
            continue
        number = _number(row[name])
        if number is None or number < 0 or (number == 0 and name == "weight"):
            raise DataError(f'"{name}" is {json.dumps(row[name], default=str)}; it must be a number, {lowest}')
        found[name] = number
    return found


def _others(row: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    return {str(name): value for name, value in row.items() if name not in known}


def _number(value: Any) -> float | None:
    """A finite number, also one written as text, as in a CSV file."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def parse_text(value: Any, name: str) -> str:
    """A text that a tokenizer can read.

    Raises:
        DataError: naming the column ``name``, if it is none.
    """
    if not isinstance(value, str):
        raise DataError(f'"{name}" must be text, not {type(value).__name__}')
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise DataError(f'"{name}" has half of a surrogate pair, which no tokenizer can read; remove it')
    return value
