"""Rows of every form become a prompt and a response to imitate, or are refused by name; what is left out is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.data.demonstrations import Demonstration, load_demonstrations, parse_demonstration, preferred_responses
from rlhf_ray.data.preferences import Preference
from rlhf_ray.errors import DataError
from rlhf_ray.types import Turn

USER, ASSISTANT = {"role": "user", "content": "Is it late?"}, {"role": "assistant", "content": " A little."}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Is it late?", "response": " A little."},
        {"prompt": "Is it late?", "completion": " A little.", "note": 3},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"messages": [USER, ASSISTANT]},
    ],
)
def test_each_form_of_a_row_gives_the_same_demonstration(row: dict[str, Any]) -> None:
    assert parse_demonstration(row, "x") == Demonstration(input_text="Is it late?", response=" A little.")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [SYSTEM, USER, ASSISTANT]},
        {"prompt": [SYSTEM, USER], "response": " A little."},
    ],
)
def test_a_dialogue_keeps_its_turns(row: dict[str, Any]) -> None:
    found = parse_demonstration(row, "x")
    assert isinstance(found, Demonstration)
    assert found.turns == (Turn("system", "Be brief."), Turn("user", "Is it late?"))
    assert found.input_text == "\n\nSystem: Be brief.\n\nHuman: Is it late?\n\nAssistant: "
    assert found.response == " A little."


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "q"}, "file line 3: the columns are question; a demonstration has the columns prompt and"),
        ({"prompt": "p", "response": "a", "completion": "b"}, "the columns are prompt, response, completion; a demo"),
        ({"prompt": " ", "response": "a"}, '"prompt" is empty; give what the response answers'),
        ({"prompt": [], "response": "a"}, '"prompt" is empty; give what the response answers'),
        ({"prompt": "p", "response": 3}, '"response" must be text or a list of messages'),
        ({"prompt": "p", "completion": [ASSISTANT, USER]}, '"completion" must be text or one assistant message'),
        ({"messages": [USER]}, "must be a prompt and, as the last, the assistant's message"),
        ({"messages": [ASSISTANT, USER]}, "must be a prompt and, as the last, the assistant's message"),
        ({"messages": "[...]"}, '"messages" is text; write a list of messages'),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "the two candidates are the same"),
    ],
)
def test_a_row_that_is_no_demonstration_is_refused_by_its_place_and_field(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError) as refused:
        parse_demonstration(row, "file line 3")
    assert reason in str(refused.value)
    assert str(refused.value).startswith("file line 3: ")


def test_of_comparisons_the_preferred_responses_are_taken_once_and_ties_left_out() -> None:
    def compared(first: str, second: str, preference: float) -> Preference:
        return Preference(
            input_text="p", candidate1=first, candidate2=second, human_preference=preference, annotator="alice"
        )

    found = preferred_responses(
        [compared("a", "b", 1.0), compared("a", "c", 0.8), compared("b", "c", 0.5), compared("b", "c", 0.0)]
    )
    assert [(row.response, row.annotator) for row in found.rows] == [("a", "alice"), ("c", "alice")]
    assert (found.ties, found.repeats) == (1, 1)


def test_a_file_may_mix_forms_and_bad_rows_are_set_aside_with_their_reason(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    rows = [
        {"prompt": "p", "response": "given"},
        {"prompt": "p", "response": "given"},
        {"input_text": "q", "candidate1": "worse", "candidate2": "better", "human_preference": 2},
        {"prompt": "p"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    found = load_demonstrations(path)
    assert [row.response for row in found.rows] == ["given", "given", "better"], "given rows are taken as they stand"
    assert [reject.where for reject in found.rejects] == [f"{path} line 4", f"{path} line 5"]
    assert "is not JSON" in found.rejects[1].reason
