"""Rows of {prompt, response, rewards} come back as they were written, and a bad one is named by its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_ray.data.prompts import read_prompts
from rlhf_ray.data.scored_responses import ScoredResponse, read_scored_responses, write_scored_responses
from rlhf_ray.errors import DataError

ROWS = [
    ScoredResponse(prompt="Im Zug saß", response=" niemand.\u2028Oder?", rewards=-0.25),
    ScoredResponse(prompt="A letter", response="", rewards=3.0),
]


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    file = tmp_path / "new" / "responses.jsonl"
    write_scored_responses(file, ROWS)
    assert read_scored_responses(file) == ROWS
    lines = [json.loads(line) for line in file.read_text("utf-8").split("\n") if line]
    assert lines[0] == {"prompt": "Im Zug saß", "response": " niemand.\u2028Oder?", "rewards": -0.25}


def test_the_file_is_a_file_of_prompts_too(tmp_path: Path) -> None:
    write_scored_responses(tmp_path / "responses.jsonl", ROWS)
    assert read_prompts(str(tmp_path / "responses.jsonl")) == ["Im Zug saß", "A letter"]


def test_other_forms_and_other_columns_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,response,rewards,step\nA letter,came,0.5,3\n")
    (tmp_path / "b.json").write_text('[{"prompt": "A letter", "response": "came", "rewards": [0.5]}]')
    expected = [ScoredResponse(prompt="A letter", response="came", rewards=0.5)]
    assert read_scored_responses(tmp_path / "a.csv") == read_scored_responses(tmp_path / "b.json") == expected


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "is not JSON"),
        ('{"response": "b", "rewards": 1}', "has no text under 'prompt'"),
        ('{"prompt": " ", "response": "b", "rewards": 1}', "has an empty prompt"),
        ('{"prompt": "a", "response": 7, "rewards": 1}', "has no text under 'response'"),
        ('{"prompt": "a", "response": "b"}', "has rewards = None, and one finite number is needed"),
        ('{"prompt": "a", "response": "b", "rewards": true}', "has rewards = True"),
        ('{"prompt": "a", "response": "b", "rewards": [1, 2]}', r"has rewards = \[1, 2\], and one finite number"),
        ('{"prompt": "a", "response": "b", "rewards": NaN}', "has rewards = nan"),
        ('{"prompt": "a", "response": "b", "rewards": "good"}', "has rewards = 'good'"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, line: str, sentence: str) -> None:
    file = tmp_path / "responses.jsonl"
    file.write_text('{"prompt": "a", "response": "b", "rewards": 1}\n' + line + "\n")
    with pytest.raises(DataError, match=rf"responses\.jsonl line 2 {sentence}"):
        read_scored_responses(file)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "responses.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"holds no response; write one a line, as \{\"prompt\""):
        read_scored_responses(tmp_path / "responses.jsonl")


def test_a_reward_that_is_no_number_is_not_written(tmp_path: Path) -> None:
    bad = ScoredResponse(prompt="a", response="b", rewards=float("nan"))
    with pytest.raises(DataError, match=r"response 2 for .* has rewards = nan; leave it out"):
        write_scored_responses(tmp_path / "responses.jsonl", [ROWS[0], bad])
    assert not (tmp_path / "responses.jsonl").exists()
