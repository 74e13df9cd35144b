"""``rlhf-ray data check``: every figure by hand on a small file, bad rows refused or set aside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rlhf_ray.cli import app
from rlhf_ray.data.preference_report import Spread
from rlhf_ray.errors import DataError
from rlhf_ray.stages.data_check import DataCheck, check_data

ROWS = [
    # One pair, three annotators: two agree; shown the other way round to the third, who disagrees with both.
    {"input_text": "a b", "candidate1": "long one", "candidate2": "x", "human_preference": 1, "annotator": "anna"},
    {"input_text": "a b", "candidate1": "long one", "candidate2": "x", "human_preference": 0.9, "annotator": "ben"},
    {"input_text": "a b", "candidate1": "x", "candidate2": "long one", "human_preference": 1, "annotator": "cleo"},
    # The same annotator says the same again, with the candidates the other way round.
    {"input_text": "a b", "candidate1": "x", "candidate2": "long one", "human_preference": 2, "annotator": "anna"},
    {"input_text": "c", "candidate1": "p", "candidate2": "q r s", "human_preference": "tie", "source": "survey"},
    {"input_text": "d e f", "candidate1": "p", "candidate2": "q", "human_preference": 2, "source": "survey"},
]


def a_file(folder: Path, *rows: Any) -> Path:
    path = folder / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def check(path: Path, **changes: Any) -> DataCheck:
    options = {"skip_bad_rows": False, "rejects_path": path.parent / "rejects.jsonl", "holdout": 0.3, "seed": 0}
    return check_data(str(path), **(options | changes))


def test_every_figure_of_a_small_file(tmp_path: Path) -> None:
    found = check(a_file(tmp_path, *ROWS))
    report = found.report
    assert (report.pairs, report.prompts, report.decided, report.ties) == (6, 3, 4, 1)
    assert report.first_preferred == pytest.approx(3 / 5)
    assert report.longer_preferred == pytest.approx(3 / 4)
    assert (report.duplicates, report.contradictions) == (1, 1)
    assert (report.judged_by_several, report.agreement) == (1, pytest.approx(1 / 3))
    assert dict(report.annotators) == {"anna": 2, "ben": 1, "cleo": 1}
    assert dict(report.sources) == {"survey": 2}
    assert report.prompt_words == Spread(median=2, p95=3, largest=3)
    assert report.candidate_words == Spread(median=1, p95=3, largest=3)
    assert (found.rejects, found.rejects_path) == (0, None)
    assert found.train_pairs + found.holdout_pairs == 6
    assert found.holdout_pairs in (1, 4), "one of three prompts, with all of its pairs"


def test_bad_rows_are_refused_together_with_their_number(tmp_path: Path) -> None:
    path = a_file(tmp_path, ROWS[0], *({"input_text": "?"} for _ in range(7)))
    with pytest.raises(DataError) as caught:
        check(path)
    first, *reasons, last = str(caught.value).splitlines()
    assert first.startswith(f"7 of 8 rows of {path} are no comparison; mend them, or use --on-bad-row skip")
    assert [reason.split(":")[0] for reason in reasons] == [f"{path} line {n}" for n in range(2, 7)]
    assert last == "and 2 more"
    assert not (tmp_path / "rejects.jsonl").exists()


def test_skipped_rows_are_written_and_the_others_described(tmp_path: Path) -> None:
    found = check(a_file(tmp_path, ROWS[0], {"input_text": "?"}), skip_bad_rows=True)
    assert (found.report.pairs, found.rejects, found.train_pairs, found.holdout_pairs) == (1, 1, 1, 0)
    assert json.loads((tmp_path / "rejects.jsonl").read_text())["row"] == {"input_text": "?"}


def test_a_file_of_nothing_but_bad_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no comparison; why not is in .*rejects\.jsonl"):
        check(a_file(tmp_path, {"input_text": "?"}), skip_bad_rows=True)


def test_the_command_prints_lines_or_json_and_refuses_with_2(tmp_path: Path) -> None:
    path = a_file(tmp_path, *ROWS)
    lines = CliRunner().invoke(app, ["data", "check", str(path)])
    assert lines.exit_code == 0
    assert "6 comparisons of 3 prompts" in lines.output
    assert "agreement            33.3%, over 1 pairs" in lines.output
    as_json = CliRunner().invoke(app, ["data", "check", str(path), "--json"])
    assert json.loads(as_json.output)["report"]["contradictions"] == 1
    refused = CliRunner().invoke(app, ["data", "check", str(tmp_path / "none.csv")])
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: ")


HH = Path(__file__).resolve().parents[3] / "shared" / "data" / "hh-rlhf" / "harmless-base-1600.jsonl.gz"


@pytest.mark.skipif(not HH.is_file(), reason="the human preferences of shared/data are not beside this checkout")
def test_real_human_dialogues_are_read_and_the_few_that_part_early_set_aside(tmp_path: Path) -> None:
    found = check_data(str(HH), skip_bad_rows=True, rejects_path=tmp_path / "rejects.jsonl", holdout=0.25, seed=0)
    assert (found.report.pairs, found.rejects) == (1596, 4)
    assert found.report.decided == 1596
    assert 0.3 < found.report.longer_preferred < 0.7
