"""Two policies side by side, as the terminal shows them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rlhf_ray.report.comparison import TERMINAL_SAMPLES, comparison_lines
from rlhf_ray.stages.evaluate import Evaluation, load_evaluation


def found(run_dir: Path) -> Evaluation:
    evaluation = load_evaluation(run_dir)
    assert evaluation is not None
    return replace(evaluation, base_name="first", trained_name="second", judge="my_judge:helpful")


def test_the_means_stand_under_the_names_and_the_win_rate_has_its_interval(
    write_run: Callable[..., Path], tmp_path: Path
) -> None:
    lines = list(comparison_lines(found(write_run(tmp_path / "run"))))
    assert [line.rsplit(maxsplit=2) for line in lines[:8]] == [
        ["mean", "first", "second"],
        ["Gold score", "0.100", "0.600"],
        ["Score, as PPO raises it", "0.000", "1.500"],
        ["KL to the reference, nats per response", "0.00", "6.00"],
        ["Tokens per response", "23.5", "23.5"],
        ["Truncated", "50%", "50%"],
        ["Distinct words", "0.23", "0.33"],
        ["Distinct word pairs", "0.27", "0.44"],
    ]
    assert lines[8] == (
        "second wins 100.0% (95 % interval 100.0% to 100.0%), ties (0%) count half; judged by my_judge:helpful"
    )


def test_the_first_responses_stand_side_by_side_and_long_ones_are_cut(
    write_run: Callable[..., Path], tmp_path: Path
) -> None:
    evaluation = found(write_run(tmp_path / "run"))
    first, *others = evaluation.samples
    long = replace(first, base=" one two" * 100, trained="brief\nand to the point")
    lines = list(comparison_lines(replace(evaluation, samples=(long, *others))))
    assert sum(line.startswith("> ") for line in lines) == TERMINAL_SAMPLES
    start = lines.index("> The <train> number 0") + 1
    assert lines[start].split("|") == [f"{'first (gold 0.10)':<36} ", " second (gold 0.60)"]
    assert lines[start + 1] == "one two one two one two one two one  | brief and to the point"
    assert lines[start + 4] == "two one two one two one two one ...  | "
    assert lines[start + 5] == ""
