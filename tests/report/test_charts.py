"""Charts put every number where it belongs."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.report.charts import BOTTOM, LEFT, MAX_POINTS, RIGHT, TOP, ChartSpec, axis, draw, short, thinned

LINE = ChartSpec(title="Chart", about="", series={"a": "first", "b": "second"})
STACK = ChartSpec(title="Chart", about="", series={"a": "first", "b": "second"}, stacked=True)


def test_a_line_spans_the_frame_between_round_ends() -> None:
    chart = draw(LINE, [{"step": 1, "a": 0.0}, {"step": 2, "a": 5.0}, {"step": 3, "a": 10.0}])
    assert chart is not None
    assert chart.lines[0].path == f"M{LEFT}.0 {BOTTOM}.0 L{(LEFT + RIGHT) / 2} {(TOP + BOTTOM) / 2} L{RIGHT}.0 {TOP}.0"
    assert [label for _, label in chart.y_ticks] == ["0", "5", "10"]
    assert [label for _, label in chart.x_ticks] == ["1", "2", "3"]


def test_a_missing_value_leaves_a_gap_and_a_lone_one_is_a_dot() -> None:
    values = [1.0, 2.0, None, 3.0, math.nan, 4.0, 4.0]
    chart = draw(LINE, [{"step": i, "a": value} for i, value in enumerate(values)])
    assert chart is not None
    (line,) = chart.lines
    assert line.path.count("M") == 3
    assert line.path.count("L") == 2
    assert len(line.dots) == 1
    assert chart.hits[2].text == "step 2: not recorded"


def test_a_metric_that_was_never_recorded_is_left_out() -> None:
    chart = draw(LINE, [{"step": 1, "a": 1.0, "b": None}])
    assert chart is not None
    assert [line.name for line in chart.lines] == ["first"]
    assert draw(LINE, [{"step": 1, "c": 1.0}]) is None
    assert draw(LINE, []) is None


def test_a_stack_adds_its_parts_up_and_reads_each_alone() -> None:
    chart = draw(STACK, [{"step": 1, "a": 4.0, "b": 6.0}, {"step": 2, "a": 5.0, "b": 5.0}])
    assert chart is not None
    assert [label for _, label in chart.y_ticks][-1] == "10"
    lower, upper = (line.path for line in chart.lines)
    assert lower.startswith(f"M{LEFT}.0 132.0 L{RIGHT}.0 115.0"), "40 % and 50 % of the height"
    assert upper.startswith(f"M{LEFT}.0 {TOP}.0 L{RIGHT}.0 {TOP}.0")
    assert chart.hits[0].text == "step 1: first 4, second 6"


def test_one_step_alone_is_drawn_too() -> None:
    line, stack = draw(LINE, [{"step": 4, "a": 2.0}]), draw(STACK, [{"step": 4, "a": 2.0}])
    assert line is not None
    assert len(line.lines[0].dots) == 1
    assert stack is not None
    assert stack.lines[0].path.count("L") == 3


def test_a_long_run_is_drawn_as_means() -> None:
    rows = [{"step": step, "a": float(step)} for step in range(1, 4 * MAX_POINTS + 1)]
    few = thinned(rows, ["a"])
    assert len(few) == MAX_POINTS
    assert few[0] == {"step": 4, "a": 2.5}
    assert few[-1]["step"] == 4 * MAX_POINTS


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_an_axis_holds_what_it_must_with_few_round_ticks(low: float, span: float) -> None:
    start, end, ticks = axis(low, low + span)
    slack = 1e-6 * max(1.0, abs(low), abs(low + span))
    assert start <= low + slack
    assert end >= low + span - slack
    assert 2 <= len(ticks) <= 7
    assert ticks == sorted(set(ticks))


def test_an_axis_from_zero_shows_zero() -> None:
    assert axis(3.0, 9.0, zero=True)[0] == 0
    assert axis(0.0, 0.0, zero=True)[:2] == (0.0, 1.0)
    assert axis(-3.0, -1.0, zero=True)[1] == 0


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.25, "0.25"), (12.0, "12"), (1234.5, "1234"), (25_000.0, "25k"), (2e-6, "2e-06")]
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert short(value) == text
