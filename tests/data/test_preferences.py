"""Preference files: read in every spelling of the answer, refused with file, line, field and remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.data.preferences import Preference, read_preferences, write_preferences
from rlhf_ray.errors import DataError


def a_row(**changes: Any) -> dict[str, Any]:
    return {
        "input_text": "The train",
        "candidate1": " was late.",
        "candidate2": " was lovely!",
        "human_preference": "candidate2",
    } | changes


def a_file(folder: Path, *rows: Any) -> Path:
    path = folder / "preferences.jsonl"
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def test_a_line_in_the_form_of_the_seed_is_read(tmp_path: Path) -> None:
    (preference,) = read_preferences(a_file(tmp_path, a_row()))
    assert preference.input_text == "The train"
    assert (preference.chosen, preference.rejected) == (" was lovely!", " was late.")
    assert preference.decided


@pytest.mark.parametrize(
    ("written", "probability_of_first"),
    [
        ("candidate1", 1.0),
        ("candidate2", 0.0),
        ("1", 1.0),
        ("2", 0.0),
        (1, 1.0),
        (2, 0.0),
        (1.0, 1.0),
        (2.0, 0.0),
        (0, 0.0),
        (0.75, 0.75),
        (0.5, 0.5),
    ],
)
def test_every_spelling_of_an_answer_is_a_probability_of_the_first(
    tmp_path: Path, written: Any, probability_of_first: float
) -> None:
    (preference,) = read_preferences(a_file(tmp_path, a_row(human_preference=written)))
    assert preference.human_preference == probability_of_first
    assert preference.decided == (probability_of_first in (0, 1))


def test_the_likelier_candidate_of_a_probability_is_the_chosen_one(tmp_path: Path) -> None:
    (preference,) = read_preferences(a_file(tmp_path, a_row(human_preference=0.25)))
    assert preference.chosen == " was lovely!"


def test_annotator_source_and_further_fields_are_kept(tmp_path: Path) -> None:
    row = a_row(annotator="anna", source="survey", gold1=-0.2, note={"page": 3})
    (preference,) = read_preferences(a_file(tmp_path, row))
    assert (preference.annotator, preference.source) == ("anna", "survey")
    assert preference.meta == {"gold1": -0.2, "note": {"page": 3}}


def test_what_is_written_has_the_form_of_the_seed(tmp_path: Path) -> None:
    path = tmp_path / "out" / "preferences.jsonl"
    preference = Preference(
        input_text="Ein Zug",
        candidate1=" fährt.",
        candidate2="\n",
        human_preference=1.0,
        annotator="simulated:vader",
        meta={"gold1": 0.5, "gold2": 0.0},
    )
    write_preferences(path, [preference])
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "input_text": "Ein Zug",
        "candidate1": " fährt.",
        "candidate2": "\n",
        "human_preference": "candidate1",
        "annotator": "simulated:vader",
        "gold1": 0.5,
        "gold2": 0.0,
    }
    assert [file.name for file in path.parent.iterdir()] == ["preferences.jsonl"]


@given(
    st.lists(
        st.builds(
            Preference,
            input_text=st.text().filter(str.strip),
            candidate1=st.text(),
            candidate2=st.text(),
            human_preference=st.floats(0, 1),
            annotator=st.none() | st.text(),
            source=st.none() | st.text(),
            meta=st.dictionaries(st.sampled_from(["gold1", "weight", "note"]), st.integers() | st.text()),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_what_was_written_is_read_back_the_same(
    tmp_path_factory: pytest.TempPathFactory, preferences: list[Preference]
) -> None:
    path = tmp_path_factory.mktemp("roundtrip") / "preferences.jsonl"
    write_preferences(path, preferences)
    assert read_preferences(path) == preferences


def test_blank_lines_are_passed_over_and_counted(tmp_path: Path) -> None:
    path = a_file(tmp_path, a_row(), "", "   ", a_row(human_preference=7))
    with pytest.raises(DataError, match="line 4"):
        read_preferences(path)
    assert len(read_preferences(a_file(tmp_path, a_row(), "", a_row()))) == 2


def without(field: str) -> dict[str, Any]:
    return {name: value for name, value in a_row().items() if name != field}


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "line 2 is not JSON"),
        ("[1, 2]", "line 2 holds a list; write one JSON object"),
        (without("candidate2"), 'line 2 has no field "candidate2"; every comparison needs'),
        (without("human_preference"), 'line 2 has no field "human_preference"'),
        (a_row(candidate1=3), 'line 2: "candidate1" must be text, not int'),
        (a_row(input_text="  "), 'line 2: "input_text" is empty'),
        (a_row(candidate2="\ud83d"), 'line 2: "candidate2" has half of a surrogate pair'),
        (a_row(annotator=5), 'line 2: "annotator" must be text, not int'),
        (a_row(human_preference="first"), 'line 2: "human_preference" is "first"; write "candidate1"'),
        (a_row(human_preference=True), 'line 2: "human_preference" is true'),
        (a_row(human_preference=None), 'line 2: "human_preference" is null'),
        (a_row(human_preference=-0.1), 'line 2: "human_preference" is -0.1'),
        (a_row(human_preference=1.5), 'line 2: "human_preference" is 1.5'),
        (a_row(human_preference=float("nan")), 'line 2: "human_preference" is NaN'),
    ],
)
def test_a_bad_line_is_refused_by_file_line_and_field(tmp_path: Path, line: Any, complaint: str) -> None:
    path = a_file(tmp_path, a_row(), line)
    with pytest.raises(DataError) as caught:
        read_preferences(path)
    assert str(caught.value).startswith(f"{path} {complaint}")


def test_a_file_that_is_missing_empty_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl cannot be read: No such file"):
        read_preferences(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="holds no comparison; write one JSON object a line"):
        read_preferences(a_file(tmp_path, ""))
    (tmp_path / "binary.jsonl").write_bytes(b'{"input_text": "\xff"}')
    with pytest.raises(DataError, match="not UTF-8"):
        read_preferences(tmp_path / "binary.jsonl")
