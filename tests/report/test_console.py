"""A person watching sees stages, progress and steps: drawn in a terminal, in plain lines elsewhere."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from rich.console import Console as RichConsole

from rlhf_ray.report.console import Console
from rlhf_ray.report.step_table import BAR_CELLS, duration, time_bar, time_shares


class Screen:
    """A console and what was written to it."""

    def __init__(self, *, terminal: bool) -> None:
        self.out = io.StringIO()
        rich = RichConsole(file=self.out, force_terminal=terminal, width=100, color_system=None, legacy_windows=False)
        self.console = Console(rich)

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.out.getvalue().splitlines()]


@pytest.fixture
def plain() -> Screen:
    return Screen(terminal=False)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Screen:
    monkeypatch.setenv("TERM", "xterm")
    return Screen(terminal=True)


@pytest.fixture
def our_logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("rlhf_ray_console_test")
    yield logger
    logger.handlers.clear()


METRICS = {
    "step": 3,
    "score_mean": 0.4321,
    "kl": 2.5,
    "samples_per_second": 4.2,
    "staleness_mean": 0.75,
    "seconds_step": 8.0,
    "seconds_train": 4.0,
    "seconds_wait": 2.0,
    "seconds_publish": 1.0,
}


def test_a_stage_is_numbered_named_and_timed(plain: Screen) -> None:
    plain.console.plan(["collect", "judge", "reward"])
    with plain.console.stage("reward", "training on 420 pairs [fast]") as stage:
        stage.outcome = "accuracy 0.74"
    assert plain.lines == ["[3/3] reward: training on 420 pairs [fast]", "      accuracy 0.74; took 0.0 s"]


def test_a_stage_that_fails_says_so_and_passes_the_error_on(plain: Screen) -> None:
    with pytest.raises(ValueError, match="no good"), plain.console.stage("reward"):
        raise ValueError("no good")
    assert plain.lines == ["reward", "      reward ended early, after 0.0 s"]


def test_progress_away_from_a_terminal_is_a_line_for_each_tenth(plain: Screen) -> None:
    with plain.console.progress("responses") as progress:
        for done in range(1, 201):
            progress(done, 200)
    assert plain.lines == [f"      responses: {n} of 200 ({n // 2}%)" for n in range(20, 201, 20)]


def test_slow_progress_away_from_a_terminal_is_a_line_at_least_every_half_minute(
    plain: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("rlhf_ray.report.console.time", clock)
    with plain.console.progress("steps") as progress:
        for done in range(1, 16):
            clock.now += 13
            progress(done, 100)
    assert [int(line.split()[1]) for line in plain.lines] == [3, 6, 9, 10, 13]


def test_progress_that_begins_anew_is_told_anew(plain: Screen) -> None:
    with plain.console.progress("responses") as progress:
        for done in (2, 4, 1, 4):
            progress(done, 4)
    assert [line.split()[1] for line in plain.lines] == ["2", "4", "1", "4"]


def test_progress_in_a_terminal_is_a_bar_with_counts(terminal: Screen) -> None:
    with terminal.console.progress("responses") as progress:
        progress(50, 200)
    assert " 50/200" in terminal.out.getvalue()
    assert "━" in terminal.out.getvalue()


def test_a_step_away_from_a_terminal_is_one_line(plain: Screen) -> None:
    with plain.console.steps("demo", 20) as table:
        table.update(METRICS)
    assert plain.lines == [
        "step 3/20  score 0.432  KL 2.50  4.20 samples/s  staleness 0.75  "
        "train 50%  wait 25%  publish 12%  2 min 16 s left"
    ]


def test_a_skipped_step_and_a_missing_number_are_shown_as_such(plain: Screen) -> None:
    with plain.console.steps("demo", 20) as table:
        table.update({"step": 1, "score_mean": None, "skipped": 1.0})
    assert plain.lines == ["step 1/20  score –  KL –  – samples/s  staleness –  skipped: not finite"]


def test_steps_in_a_terminal_are_a_table_with_its_head(terminal: Screen) -> None:
    with terminal.console.steps("demo", 20) as table:
        table.update(METRICS)
    text = terminal.out.getvalue()
    for part in ("demo", "step 3/20", "2 min 16 s left", "samples/s", "0.432", "2.50", "train 50%", "step 4 under way"):
        assert part in text


def test_the_table_keeps_the_newest_rows_in_view(terminal: Screen) -> None:
    with terminal.console.steps("demo", 50) as table:
        for step in range(1, 31):
            table.update({**METRICS, "step": step, "score_mean": step + 0.125})
    last_picture = terminal.out.getvalue().rpartition("where the time goes")[2]
    assert "30.125" in last_picture
    assert "21.125" in last_picture
    assert "20.125" not in last_picture


def test_a_resumed_run_starts_counting_where_it_was(terminal: Screen) -> None:
    with terminal.console.steps("demo", 20, done=12):
        pass
    assert "step 12/20" in terminal.out.getvalue()


def test_what_our_modules_log_is_printed_once(plain: Screen, our_logger: logging.Logger) -> None:
    plain.console.show_logs(our_logger.name)
    plain.console.show_logs(our_logger.name)
    our_logger.getChild("pool").info("waiting for %s", "generator-0 [1/2]")
    our_logger.debug("not for people")
    assert plain.lines == ["      waiting for generator-0 [1/2]"]


def test_shares_add_up_even_when_the_parts_exceed_the_step() -> None:
    assert time_shares(METRICS) == {"train": 0.5, "wait": 0.25, "publish": 0.125, "other": 0.125}
    crowded = time_shares({"seconds_step": 4.0, "seconds_train": 4.0, "seconds_wait": 4.0})
    assert crowded == {"train": 0.5, "wait": 0.5, "publish": 0.0, "other": 0.0}
    assert time_shares({"seconds_train": 1.0}) == {}


def test_the_time_bar_is_always_full() -> None:
    assert time_bar(METRICS).plain == "█" * BAR_CELLS + "  train 50%"
    thirds = {"seconds_step": 3.0, "seconds_train": 1.0, "seconds_wait": 1.0, "seconds_publish": 1.0}
    assert time_bar(thirds).plain.count("█") == BAR_CELLS


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.42, "0.4 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3600, "1 h 00 min"),
        (7499, "2 h 04 min"),
    ],
)
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert duration(seconds) == text


LOUD = """
import logging, os, warnings
os.environ["VLLM_LOGGING_LEVEL"] = "DEBUG"
from rlhf_ray.report.quiet import quiet_libraries
quiet_libraries()
import tqdm, transformers
warnings.warn_explicit("theirs", FutureWarning, "x.py", 1, module="somebody.elses")
warnings.warn_explicit("ours", UserWarning, "y.py", 1, module="rlhf_ray.pipeline")
logging.getLogger("ray.serve").warning("theirs")
transformers.logging.get_logger("transformers.models").warning("theirs")
for _ in tqdm.tqdm(range(3)): pass
print(os.environ["VLLM_LOGGING_LEVEL"], os.environ.get("HF_HUB_OFFLINE"))
"""


def test_libraries_fall_silent_but_for_what_the_user_asked_for() -> None:
    hidden = {"VLLM_LOGGING_LEVEL", "HF_HUB_OFFLINE", "TQDM_DISABLE", "PYTHONWARNINGS", "TRANSFORMERS_VERBOSITY"}
    clean = {key: value for key, value in os.environ.items() if key not in hidden}
    result = subprocess.run([sys.executable, "-c", LOUD], env=clean, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["DEBUG", "None"]
    assert result.stderr.strip().splitlines() == ["y.py:1: UserWarning: ours"]
