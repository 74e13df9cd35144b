"""Preference files: read in every spelling of the answer, refused with file, line, field and remedy."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from rlhf_ray.data.preference_files import load_preferences, read_preferences, write_rejects
from rlhf_ray.data.preferences import Preference, as_dialogue, split_by_prompt, write_preferences
from rlhf_ray.errors import DataError
from rlhf_ray.types import Turn


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
        (" Candidate2 ", 0.0),
        ("tie", 0.5),
        ("0.75", 0.75),
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
            turns=st.lists(st.builds(Turn, st.sampled_from(["user", "assistant", "system"]), st.text())).map(tuple),
            weight=st.floats(1e-3, 10),
            margin=st.floats(0, 10),
            annotator=st.none() | st.text(min_size=1),
            source=st.none() | st.text(min_size=1),
            pair_id=st.none() | st.text(min_size=1),
            meta=st.dictionaries(st.sampled_from(["gold1", "note"]), st.integers() | st.text()),
        ).filter(lambda preference: preference.candidate1 != preference.candidate2),
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
        ("[1, 2]", "line 2 holds a list; a row is a JSON object"),
        (without("candidate2"), 'line 2: it has no field "candidate2"; every comparison needs'),
        (without("human_preference"), 'line 2: it has no field "human_preference"'),
        (without("input_text"), "line 2: the columns are candidate1, candidate2, human_preference; a comparison has"),
        (a_row(candidate2=" was late."), "line 2: the two candidates are the same"),
        (a_row(weight=0), 'line 2: "weight" is 0; it must be a number, above 0'),
        (a_row(weight="much"), 'line 2: "weight" is "much"'),
        (a_row(margin=-1), 'line 2: "margin" is -1; it must be a number, 0 or more'),
        (a_row(messages=[{"role": "robot", "content": "x"}]), 'line 2: "messages" has a message with role "robot"'),
        (a_row(candidate1=3), 'line 2: "candidate1" must be text, not int'),
        (a_row(input_text="  "), 'line 2: "input_text" is empty'),
        (a_row(candidate2="\ud83d"), 'line 2: "candidate2" has half of a surrogate pair'),
        (a_row(annotator=5), 'line 2: "annotator" must be text, not int'),
        (a_row(human_preference="first"), 'line 2: "human_preference" is "first"; write "candidate1"'),
        (a_row(human_preference=True), 'line 2: "human_preference" is true'),
        (a_row(human_preference=None), 'line 2: it has no field "human_preference"'),
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
    with pytest.raises(DataError, match=r"none\.jsonl: there is no such file or folder"):
        read_preferences(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="holds no comparison; write one a line"):
        read_preferences(a_file(tmp_path, ""))
    (tmp_path / "binary.jsonl").write_bytes(b'{"input_text": "\xff"}')
    with pytest.raises(DataError, match="not UTF-8"):
        read_preferences(tmp_path / "binary.jsonl")


# ---- Other forms


def in_form(folder: Path, suffix: str, rows: list[dict[str, Any]]) -> Path:
    """The rows as a file of that form, written with the form's own library."""
    path = folder / f"preferences{suffix}"
    match suffix:
        case ".jsonl" | ".ndjson":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".jsonl.gz":
            path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
        case ".json":
            path.write_text(json.dumps(rows))
        case ".csv" | ".tsv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0], delimiter="," if suffix == ".csv" else "\t")
                writer.writeheader()
                writer.writerows(rows)
        case ".parquet":
            parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        case "":
            datasets.Dataset.from_list(rows).save_to_disk(path)
        case "/dict":
            datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".jsonl.gz", ".json", ".csv", ".tsv", ".parquet", "", "/dict"])
def test_every_file_form_holds_the_same_comparisons(tmp_path: Path, suffix: str) -> None:
    rows = [
        a_row(candidate1=' said "no",\nand left', human_preference="1", annotator="anna"),
        a_row(candidate2="\tzwölf", human_preference="tie", annotator="ben"),
    ]
    first, second = read_preferences(in_form(tmp_path, suffix, rows))
    assert (first.candidate1, first.human_preference, first.annotator) == (' said "no",\nand left', 1.0, "anna")
    assert (second.candidate2, second.human_preference, second.annotator) == ("\tzwölf", 0.5, "ben")


def test_a_csv_row_is_named_by_the_line_it_begins_on(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text('input_text,candidate1,candidate2,human_preference\n"two\nlines",a,b,1\nx,a,b\nx,a,b,maybe\n')
    loaded = load_preferences(path)
    assert [p.input_text for p in loaded.preferences] == ["two\nlines"]
    assert [reject.where for reject in loaded.rejects] == [f"{path} line 4", f"{path} line 5"]
    assert "has 3 fields and line 1 names 4 columns" in loaded.rejects[0].reason
    assert '"human_preference" is "maybe"' in loaded.rejects[1].reason


def test_what_is_set_aside_is_written_with_its_reason_and_the_row_as_it_was(tmp_path: Path) -> None:
    loaded = load_preferences(a_file(tmp_path, a_row(), "{broken", a_row(human_preference=9)))
    assert len(loaded.preferences) == 1
    write_rejects(tmp_path / "rejects.jsonl", loaded.rejects)
    written = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [row["row"] for row in written] == ["{broken", a_row(human_preference=9)]
    assert [row["reason"].split(" ", 1)[0] for row in written] == [str(tmp_path / "preferences.jsonl")] * 2
    assert [row["where"].rsplit(" ", 1)[1] for row in written] == ["2", "3"]


GREETING = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]
HH = "\n\nHuman: Is it late?\n\nAssistant: A little.\n\nHuman: How late?\n\nAssistant: "


@pytest.mark.parametrize(
    ("row", "input_text", "candidates", "turns"),
    [
        (
            {"chosen": HH + "Ten minutes.", "rejected": HH + "Ten hours."},
            HH,
            ("Ten minutes.", "Ten hours."),
            (Turn("user", "Is it late?"), Turn("assistant", "A little."), Turn("user", "How late?")),
        ),
        ({"prompt": "The train", "chosen": " sang", "rejected": " sank"}, "The train", (" sang", " sank"), ()),
        ({"chosen": "The train sang", "rejected": "The train sank"}, "The train", (" sang", " sank"), ()),
        (
            {
                "prompt": [{"role": "user", "content": "Hi"}],
                "chosen": [{"role": "assistant", "content": "Yes"}],
                "rejected": [{"role": "assistant", "content": "No"}],
            },
            "Hi",
            ("Yes", "No"),
            (Turn("user", "Hi"),),
        ),
        (
            {
                "chosen": [*GREETING, {"role": "assistant", "content": "Yes"}],
                "rejected": [*GREETING, {"role": "assistant", "content": "No"}],
            },
            "\n\nSystem: S\n\nHuman: Hi\n\nAssistant: ",
            ("Yes", "No"),
            (Turn("system", "S"), Turn("user", "Hi")),
        ),
    ],
    ids=["hh-rlhf", "TRL explicit", "TRL implicit", "TRL conversational", "TRL conversational implicit"],
)
def test_the_forms_of_the_field_are_read(
    tmp_path: Path, row: Any, input_text: str, candidates: tuple[str, str], turns: tuple[Turn, ...]
) -> None:
    (preference,) = read_preferences(a_file(tmp_path, row | {"source": "s", "id": 7}))
    assert (preference.input_text, preference.turns) == (input_text, turns)
    assert (preference.candidate1, preference.candidate2) == candidates
    assert (preference.human_preference, preference.source, preference.pair_id) == (1.0, "s", "7")
    write_preferences(tmp_path / "again.jsonl", [preference])
    assert read_preferences(tmp_path / "again.jsonl") == [preference]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"}, "share no prompt"),
        (
            {"chosen": HH + "x\n\nHuman: more\n\nAssistant: y", "rejected": HH + "z"},
            "part before the last assistant turn",
        ),
        ({"chosen": "yes", "rejected": "no"}, "begin with no word in common"),
        ({"prompt": "p", "chosen": "same", "rejected": "same"}, "the two candidates are the same"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "the prompt is empty"),
        ({"prompt": "p", "chosen": [{"role": "assistant", "content": "a"}], "rejected": "b"}, "write all three alike"),
        ({"prompt": "p", "chosen": 3, "rejected": "b"}, '"chosen" must be text or a list of messages'),
        (
            {
                "prompt": [{"role": "user", "content": "p"}],
                "chosen": [],
                "rejected": [{"role": "assistant", "content": "b"}],
            },
            "must add one assistant message to the prompt; it adds 0 messages",
        ),
    ],
)
def test_a_pair_that_is_none_is_refused_with_the_reason(tmp_path: Path, row: Any, complaint: str) -> None:
    with pytest.raises(DataError) as caught:
        read_preferences(a_file(tmp_path, row))
    assert str(caught.value).startswith(f"{tmp_path / 'preferences.jsonl'} line 1: ")
    assert complaint in str(caught.value)


anything = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content"]), inner),
    max_leaves=6,
)
columns = st.sampled_from(
    ["input_text", "candidate1", "candidate2", "human_preference", "prompt", "chosen", "rejected", "weight", "messages"]
)


@given(rows=st.lists(st.dictionaries(columns, anything), max_size=4))
def test_whatever_a_row_holds_it_is_a_comparison_or_a_reject(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    path = a_file(tmp_path_factory.mktemp("anything"), *rows)
    loaded = load_preferences(path)
    assert len(loaded.preferences) + len(loaded.rejects) == len(rows)
    for preference in loaded.preferences:
        assert 0 <= preference.human_preference <= 1
        assert preference.candidate1 != preference.candidate2
        assert preference.input_text.strip()


@given(
    prompt=st.lists(st.sampled_from(["user", "assistant"]), min_size=1, max_size=4),
    texts=st.lists(st.text("ab \n", max_size=6), min_size=6, max_size=6),
)
def test_a_dialogue_as_one_text_comes_apart_into_its_turns(
    tmp_path_factory: pytest.TempPathFactory, prompt: list[str], texts: list[str]
) -> None:
    turns = tuple(Turn(role, text.strip()) for role, text in zip(prompt, texts, strict=False))
    text = as_dialogue(turns)
    row = {"chosen": f"{text}yes", "rejected": f"{text}no"}
    (preference,) = read_preferences(a_file(tmp_path_factory.mktemp("dialogue"), row))
    assert (preference.input_text, preference.turns) == (text, turns)


def test_a_file_of_no_known_form_is_refused_with_those_that_are(tmp_path: Path) -> None:
    (tmp_path / "p.xlsx").write_text("x")
    with pytest.raises(DataError, match=r"p\.xlsx: its ending says no form .*\.jsonl.*\.csv.*\.parquet"):
        read_preferences(tmp_path / "p.xlsx")
    (tmp_path / "p.parquet").write_text("x")
    with pytest.raises(DataError, match=r"p\.parquet is no Parquet file"):
        read_preferences(tmp_path / "p.parquet")
    (tmp_path / "p.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match=r"p\.json holds a dict; a \.json file of rows is one array"):
        read_preferences(tmp_path / "p.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"is no folder that datasets\.save_to_disk has written"):
        read_preferences(tmp_path / "folder")


# ---- Splitting


@given(
    prompts=st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=40).filter(lambda p: len(set(p)) > 1),
    share=st.floats(0.01, 0.99),
)
def test_a_split_keeps_every_pair_and_no_prompt_on_both_sides(prompts: list[str], share: float) -> None:
    preferences = [
        Preference(input_text=prompt, candidate1=str(i), candidate2="x", human_preference=1.0)
        for i, prompt in enumerate(prompts)
    ]
    train, holdout = split_by_prompt(preferences, share, seed=3)
    assert sorted(p.candidate1 for p in train + holdout) == sorted(p.candidate1 for p in preferences)
    held = {p.input_text for p in holdout}
    assert held
    assert {p.input_text for p in train}.isdisjoint(held)
    assert abs(len(held) - share * len(set(prompts))) <= 1
    assert split_by_prompt(preferences, share, seed=3) == (train, holdout)


def test_one_prompt_cannot_be_split() -> None:
    with pytest.raises(DataError, match="1 prompts cannot be split"):
        split_by_prompt([Preference(input_text="p", candidate1="a", candidate2="b", human_preference=1.0)], 0.5, seed=0)
