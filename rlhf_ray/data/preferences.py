"""Preference data: pairs of candidates for one input, and which one was preferred.

On disk a JSON object a line, ``{"input_text", "candidate1", "candidate2", "human_preference"}``; in memory a
``Preference``. ``preference_files`` reads the other forms of the field into the same.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rlhf_ray.errors import DataError
from rlhf_ray.types import Turn

_TEXT_FIELDS = ("input_text", "candidate1", "candidate2")


@dataclass(frozen=True, kw_only=True, slots=True)
class Preference:
    """One comparison.

    Example: ``Preference(input_text="The train", candidate1=" is late.", candidate2=" is fun!", human_preference=0.0)``
    """

    input_text: str
    """The prompt as a person wrote it, before a chat template; of a dialogue, its turns as one text."""
    candidate1: str
    candidate2: str
    human_preference: float
    """P(candidate1 is preferred), 0 to 1: 1 the first, 0 the second, 0.5 a tie."""
    turns: tuple[Turn, ...] = ()
    """The messages that a chat template is given, where they are more than one from the user; () is ``input_text``."""
    weight: float = 1.0
    """How much the comparison counts in the loss."""
    margin: float = 0.0
    """By how much the preferred one is better, in units of the score."""
    annotator: str | None = None
    """Who compared; a program that stands in for people says so here."""
    source: str | None = None
    """Where the pair comes from."""
    pair_id: str | None = None
    """The row's own name."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenPair:
    """A comparison as token ids: prompt, response and EOS together."""

    chosen_ids: list[int]
    rejected_ids: list[int]
    prompt_tokens: int = 0
    """How many of them are the prompt's, the same in both; a reward model need not know."""
    probability: float = 1.0
    """P(the chosen one is preferred), 0.5 (a tie) to 1."""
    weight: float = 1.0
    """How much it counts, relative to the others."""
    margin: float = 0.0
    """By how much the chosen one is better, in units of the raw score."""


def as_dialogue(turns: Sequence[Turn]) -> str:
    """Messages as one text in the form of hh-rlhf, up to where the assistant begins to speak."""
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    return "".join(f"\n\n{names[turn.role]}: {turn.content}" for turn in turns) + "\n\nAssistant: "


class HasPrompt(Protocol):
    """A row of data that belongs to a prompt."""

    @property
    def input_text(self) -> str:
        """The prompt."""
        ...


Item = TypeVar("Item", bound=HasPrompt)


def split_by_prompt(rows: Sequence[Item], share: float, *, seed: int) -> tuple[list[Item], list[Item]]:
    """(train, holdout): all rows of one prompt stand on one side, and each side has at least one prompt.

    Args:
        share: of the prompts, that go to the holdout.

    Raises:
        DataError: there are fewer than two prompts.
    """
    prompts = list(dict.fromkeys(row.input_text for row in rows))
    if len(prompts) < 2:
        raise DataError(f"{len(prompts)} prompts cannot be split into training and holdout; give rows of more prompts")
    count = min(max(1, round(share * len(prompts))), len(prompts) - 1)
    held = set(random.Random(seed).sample(prompts, count))
    return [row for row in rows if row.input_text not in held], [row for row in rows if row.input_text in held]


def write_preferences(path: Path, preferences: Iterable[Preference]) -> None:
    """Write comparisons in the form that ``read_preferences`` reads; the file appears whole or not at all."""
    write_jsonl(path, (_row(preference) for preference in preferences))


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


def _row(preference: Preference) -> dict[str, Any]:
    answer: str | float = preference.human_preference
    if preference.decided:
        answer = "candidate1" if preference.human_preference == 1.0 else "candidate2"
    row: dict[str, Any] = {name: getattr(preference, name) for name in _TEXT_FIELDS}
    row["human_preference"] = answer
    if preference.turns:
        row["messages"] = [asdict(turn) for turn in preference.turns]
    said = {"annotator": preference.annotator, "source": preference.source, "id": preference.pair_id}
    row |= {name: value for name, value in said.items() if value is not None}
    if preference.weight != 1.0:
        row["weight"] = preference.weight
    if preference.margin:
        row["margin"] = preference.margin
    return row | dict(preference.meta)
