"""A run's numbers are on disk as soon as they are known, each step once."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from rlhf_ray.metrics import MetricsWriter, read_lines, read_summary, status_kept, write_summary


def steps(path: Path) -> list[float]:
    return [row["step"] for row in read_lines(path)]


def test_a_step_can_be_read_before_the_writer_is_closed(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write({"step": 1, "kl": 0.5}, [{"prompt": "Once", "response": "upon 'a' <time>", "score": 0.25}])
        assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "kl": 0.5}]
        assert read_lines(tmp_path / "samples.jsonl") == [
            {"step": 1, "prompt": "Once", "response": "upon 'a' <time>", "score": 0.25}
        ]


def test_a_sample_with_an_odd_line_separator_stays_one_row(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write({"step": 1}, [{"response": "one\u2028two\x85three\nfour"}])
    assert read_lines(tmp_path / "samples.jsonl") == [{"step": 1, "response": "one\u2028two\x85three\nfour"}]


def test_a_number_that_is_not_finite_is_written_as_null(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write({"step": 1, "kl": math.nan, "grad_norm": math.inf})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "kl": None, "grad_norm": None}


def test_a_new_writer_appends(tmp_path: Path) -> None:
    for step in (1, 2):
        with MetricsWriter(tmp_path) as writer:
            writer.write({"step": step})
    assert steps(tmp_path / "metrics.jsonl") == [1, 2]


def test_a_resumed_run_drops_the_steps_that_it_takes_again_and_the_torn_line(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write({"step": step, "kl": 0.1 * step}, [{"response": f"text {step}"}])
    with (tmp_path / "metrics.jsonl").open("a") as out:
        out.write('{"step": 4, "kl"')
    with MetricsWriter(tmp_path, resume_step=2) as writer:
        writer.write({"step": 3, "kl": 9.0}, [{"response": "text 3 again"}])
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3]
    assert read_lines(tmp_path / "metrics.jsonl")[-1]["kl"] == 9.0
    assert [row["response"] for row in read_lines(tmp_path / "samples.jsonl")] == ["text 1", "text 2", "text 3 again"]


def test_the_quarantine_has_a_row_a_prompt_and_a_resumed_run_keeps_those_that_are_still_in_it(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        assert not (tmp_path / "quarantine.jsonl").exists()
        for prompt_id in (3, 5):
            writer.quarantine({"prompt_id": prompt_id, "prompt": "p", "cause": "it died", "step": 1})
            assert read_lines(tmp_path / "quarantine.jsonl")[-1]["prompt_id"] == prompt_id
    with MetricsWriter(tmp_path, resume_step=1, quarantined={3}) as writer:
        writer.quarantine({"prompt_id": 5, "prompt": "p", "cause": "again", "step": 1})
    rows = read_lines(tmp_path / "quarantine.jsonl")
    assert [(row["prompt_id"], row["cause"]) for row in rows] == [(3, "it died"), (5, "again")]


def test_tensorboard_reads_the_scalars_back_and_a_resume_replaces_the_later_ones(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write({"step": step, "score_mean": 10.0 * step, "kl": math.nan})
    with MetricsWriter(tmp_path, resume_step=2) as writer:
        writer.write({"step": 3, "score_mean": 33.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["score/score_mean"]
    assert [(e.step, e.value) for e in events.Scalars("score/score_mean")] == [(1, 10.0), (2, 20.0), (3, 33.0)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
@pytest.mark.parametrize("room", [0, 5, 30])
def test_what_a_full_disk_does_not_take_is_said_and_written_with_the_next_step(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    largest_file: Callable[[int], AbstractContextManager[None]],
    room: int,
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path) as writer:
        writer.write({"step": 1, "kl": 0.1}, [{"response": "one"}])
    with MetricsWriter(tmp_path, resume_step=1) as writer:
        writer.write({"step": 2, "kl": 0.2}, [{"response": "two"}])
        writer.quarantine({"prompt_id": 7})
        lines = (tmp_path / "metrics.jsonl").stat().st_size
        with largest_file(lines + room):
            for step in (3, 4, 5):
                writer.write({"step": step, "kl": 0.3}, [{"response": "the next one"}])
            writer.quarantine({"prompt_id": 8})
        assert f"a row of {tmp_path / 'metrics.jsonl'} is kept and written with the next one" in caplog.text
        assert steps(tmp_path / "metrics.jsonl") != [1, 2, 3, 4, 5]
        writer.write({"step": 6, "kl": 0.6}, [{"response": "six"}])
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert steps(tmp_path / name) == [1, 2, 3, 4, 5, 6]
    assert [row["prompt_id"] for row in read_lines(tmp_path / "quarantine.jsonl")] == [7, 8]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    seen = [event.step for event in events.Scalars("kl/kl")]
    assert {1, 2, 6} <= set(seen), "what TensorBoard had before stays"


def test_a_full_disk_does_not_hide_why_a_run_ended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, largest_file: Callable[[int], AbstractContextManager[None]]
) -> None:
    with pytest.raises(ValueError, match="the cause"), largest_file(60), status_kept(tmp_path):
        raise ValueError("the cause" * 100)
    assert "still says that the run goes on" in caplog.text


def test_a_writer_that_logs_nothing_makes_no_event_file(tmp_path: Path) -> None:
    MetricsWriter(tmp_path).close()
    assert not (tmp_path / "tensorboard").exists()


def test_the_summary_keeps_what_earlier_stages_wrote(tmp_path: Path) -> None:
    write_summary(tmp_path, {"reward_accuracy": 0.75, "status": "running"})
    whole = write_summary(tmp_path, {"status": "finished", "kl_last": math.nan, "stage_seconds": {"ppo": 1.5}})
    assert whole == {
        "reward_accuracy": 0.75,
        "status": "finished",
        "kl_last": None,
        "stage_seconds": {"ppo": 1.5},
    }
    assert read_summary(tmp_path) == whole
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"], "no temporary file is left"


def test_what_was_never_written_reads_as_empty(tmp_path: Path) -> None:
    assert read_summary(tmp_path) == {}
    assert read_lines(tmp_path / "metrics.jsonl") == []
