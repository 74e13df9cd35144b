"""Demonstrations: a prompt and the response to imitate, from rows of any of these forms.

form              columns                                                          recognised by
comparison        any form of ``preference_rows``: the preferred response          its columns
messages          messages, of which the last is the assistant's                   messages
prompt, response  prompt and response, or completion: texts, or lists of messages  prompt

file ──► tables ──► parse_demonstration ──► Demonstrations.rows
                          ├───────────────► .ties, .repeats: counted
                          └───────────────► .rejects: refused, or set aside with their reason
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.data.preference_files import Reject
from rlhf_ray.data.preference_rows import parse_messages, parse_preference, parse_text
from rlhf_ray.data.preferences import Preference, as_dialogue
from rlhf_ray.data.tables import read_table
from rlhf_ray.errors import DataError
from rlhf_ray.types import Turn

_NEEDED = "a demonstration has the columns prompt and response (or completion), or messages, or those of a comparison"


@dataclass(frozen=True, kw_only=True, slots=True)
class Demonstration:
    """One response to imitate.

    Example: ``Demonstration(input_text="The train", response=" was a joy to ride!")``
    """

    input_text: str
    """The prompt as a person wrote it, before a chat template; of a dialogue, its turns as one text."""
    response: str
    turns: tuple[Turn, ...] = ()
    """The messages that a chat template is given, where they are more than one from the user; () is ``input_text``."""
    annotator: str | None = None
    """Who preferred it, of a comparison."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Demonstrations:
    """What a file, or a list of comparisons, holds."""

    rows: list[Demonstration]
    rejects: list[Reject]
    """Rows that are no demonstration."""
    ties: int
    """Comparisons that prefer neither response, which are left out."""
    repeats: int
    """Comparisons whose preferred response stands there already, which are left out too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenDemonstration:
    """A demonstration as token ids: prompt, response and EOS together."""

    token_ids: list[int]
    prompt_tokens: int
    """How many of them are the prompt's: nothing is learnt from those."""


def load_demonstrations(path: str | Path) -> Demonstrations:
    """Every demonstration of a file, in its order.

    Args:
        path: as ``tables.read_table`` takes it.

    Raises:
        DataError: the file cannot be read at all.
    """
    found: list[Demonstration | Preference] = []
    rejects: list[Reject] = []
    for row in read_table(path):
        try:
            if row.value is None:
                raise DataError(f"{row.where} {row.problem}")
            found.append(parse_demonstration(row.value, row.where))
        except DataError as error:
            kept = row.text if row.value is None else dict(row.value)
            rejects.append(Reject(where=row.where, reason=str(error), row=kept))
    return _gathered(found, rejects)


def preferred_responses(preferences: Sequence[Preference]) -> Demonstrations:
    """The preferred response of each comparison, once."""
    return _gathered(preferences, [])


def parse_demonstration(row: Mapping[str, Any], where: str) -> Demonstration | Preference:
    """One demonstration, or the comparison that it is a part of.

    Args:
        where: the row's place, which begins every message.

    Raises:
        DataError: naming the field and the remedy.
    """
    if "input_text" in row or {"chosen", "rejected"} <= row.keys():
        return parse_preference(row, where)
    try:
        if row.get("messages") is not None:
            return _conversation(row["messages"])
        answers = [name for name in ("response", "completion") if row.get(name) is not None]
        if row.get("prompt") is None or len(answers) != 1:
            raise DataError(f"the columns are {', '.join(map(str, row)) or 'none'}; {_NEEDED}")
        return _answer(row["prompt"], row[answers[0]], answers[0])
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _conversation(messages: Any) -> Demonstration:
    if isinstance(messages, str):
        raise DataError('"messages" is text; write a list of messages, each with role and content')
    turns = parse_messages(messages, "messages")
    if len(turns) < 2 or turns[-1].role != "assistant":
        raise DataError('"messages" must be a prompt and, as the last, the assistant\'s message')
    return _of_turns(turns[:-1], turns[-1].content)


def _answer(prompt: Any, response: Any, name: str) -> Demonstration:
    if isinstance(response, str):
        text = parse_text(response, name)
    else:
        added = parse_messages(response, name)
        if len(added) != 1 or added[0].role != "assistant":
            raise DataError(f'"{name}" must be text or one assistant message; it is {len(added)} messages')
        text = added[0].content
    if not isinstance(prompt, str):
        turns = parse_messages(prompt, "prompt")
        if not turns:
            raise DataError('"prompt" is empty; give what the response answers')
        return _of_turns(turns, text)
    if not parse_text(prompt, "prompt").strip():
        raise DataError('"prompt" is empty; give what the response answers')
    return Demonstration(input_text=prompt, response=text)


def _of_turns(turns: tuple[Turn, ...], response: str) -> Demonstration:
    if len(turns) == 1 and turns[0].role == "user":
        return Demonstration(input_text=turns[0].content, response=response)
    return Demonstration(input_text=as_dialogue(turns), response=response, turns=turns)


def _gathered(found: Sequence[Demonstration | Preference], rejects: list[Reject]) -> Demonstrations:
    rows: list[Demonstration] = []
    seen: set[tuple[str, str]] = set()
    ties = repeats = 0
    for one in found:
        if isinstance(one, Demonstration):
            rows.append(one)
        elif one.human_preference == 0.5:
            ties += 1
        elif (one.input_text, one.chosen) in seen:
            repeats += 1
        else:
            seen.add((one.input_text, one.chosen))
            rows.append(
                Demonstration(input_text=one.input_text, response=one.chosen, turns=one.turns, annotator=one.annotator)
            )
    return Demonstrations(rows=rows, rejects=rejects, ties=ties, repeats=repeats)
