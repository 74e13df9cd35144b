"""Line and stacked-area charts as plain geometry; ``report.html`` turns it into inline SVG.

Ours and small on purpose: a charting library would put megabytes of script into every report, where some lines of SVG
take their colours from the page, light or dark, need no script, and may be mailed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 520, 230
LEFT, RIGHT, TOP, BOTTOM = 54, 508, 30, 200
"""The plot's frame inside the drawing, in SVG units."""
MAX_POINTS = 200
"""Longer runs are drawn as means over neighbouring steps: more points than pixels show nothing."""

Row = Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChartSpec:
    """What to draw: metric → its name in the legend."""

    title: str
    about: str
    """One phrase on how to read it."""
    series: Mapping[str, str]
    stacked: bool = False
    from_zero: bool = False
    """The vertical axis includes 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One series: its SVG path, and the lone points that a path would not show."""

    name: str
    colour: int
    path: str
    dots: tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Hit:
    """A step that the pointer can rest on."""

    x: float
    left: float
    width: float
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """Geometry in SVG units, ready to be written out."""

    title: str
    about: str
    stacked: bool
    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    hits: tuple[Hit, ...]
    summary: str
    """The chart in words, for those who cannot see it."""


def draw(spec: ChartSpec, rows: Sequence[Row]) -> Chart | None:
    """The chart of ``rows`` (each with ``step``); None when none of its metrics was recorded."""
    names = {key: name for key, name in spec.series.items() if any(_number(row.get(key)) is not None for row in rows)}
    if not names:
        return None
    rows = thinned(rows, list(names))
    steps = [float(row["step"] or 0) for row in rows]
    values = {key: [_number(row.get(key)) for row in rows] for key in names}
    heights = _stacked(values) if spec.stacked else values
    known = [value for column in heights.values() for value in column if value is not None]
    low, high, ticks = axis(min(known), max(known), zero=spec.from_zero or spec.stacked)

    def x(step: float) -> float:
        span = steps[-1] - steps[0]
        return round(LEFT + (RIGHT - LEFT) * ((step - steps[0]) / span if span else 0.5), 1)

    def y(value: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low), 1)

    lines: list[Line] = []
    floor: Sequence[float | None] = [0.0] * len(rows)
    for colour, (key, name) in enumerate(names.items()):
        points = [None if v is None else (x(s), y(v)) for s, v in zip(steps, heights[key], strict=True)]
        if spec.stacked:
            under = [None if v is None else (x(s), y(v)) for s, v in zip(steps, floor, strict=True)]
            lines.append(Line(name=name, colour=colour, path=_area(points, under), dots=()))
            floor = heights[key]
        else:
            path, dots = _path(points)
            lines.append(Line(name=name, colour=colour, path=path, dots=dots))
    return Chart(
        title=spec.title,
        about=spec.about,
        stacked=spec.stacked,
        lines=tuple(lines),
        x_ticks=tuple((x(t), f"{t:g}") for t in _whole_ticks(steps[0], steps[-1])),
        y_ticks=tuple((y(t), short(t)) for t in ticks),
        hits=_hits(steps, values, names, x),
        summary=_in_words(spec.title, steps, values, names),
    )


def axis(low: float, high: float, *, zero: bool = False, wanted: int = 4) -> tuple[float, float, list[float]]:
    """Round ends and ticks (1, 2 or 5 times a power of ten apart) that hold every value from ``low`` to ``high``."""
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-30):
        pad = abs(high) * 0.5 if abs(high) > 1e-30 else 1.0
        low, high = (min(0.0, low), high + pad) if zero else (low - pad, high + pad)
    step = _nice((high - low) / wanted)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [n * step for n in range(first, last + 1)]
    return ticks[0], ticks[-1], ticks


def thinned(rows: Sequence[Row], keys: Sequence[str]) -> list[Row]:
    """At most ``MAX_POINTS`` rows: means over equal runs of neighbouring steps, at the last step of each."""
    size = math.ceil(len(rows) / MAX_POINTS)
    if size <= 1:
        return list(rows)
    result: list[Row] = []
    for start in range(0, len(rows), size):
        group = rows[start : start + size]
        mean: dict[str, float | None] = {"step": group[-1]["step"]}
        for key in keys:
            known = [value for row in group if (value := _number(row.get(key))) is not None]
            mean[key] = sum(known) / len(known) if known else None
        result.append(mean)
    return result


def short(value: float) -> str:
    """A number in few characters: ``0.003``, ``12``, ``1.5k``, ``2e-06``."""
    size = abs(value)
    if size >= 10_000:
        return f"{value / 1000:.4g}k"
    if size and size < 1e-3:
        return f"{value:.2g}"
    return f"{value:.4g}"


def _nice(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * (1 - 1e-9))


def _whole_ticks(first: float, last: float) -> list[float]:
    if first == last:
        return [first]
    step = max(1.0, _nice((last - first) / 5))
    return [n * step for n in range(math.ceil(first / step), math.floor(last / step) + 1)]


def _number(value: float | None) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _stacked(values: Mapping[str, Sequence[float | None]]) -> dict[str, list[float | None]]:
    """Running sums over the series; a part that is unknown counts as nothing."""
    result: dict[str, list[float | None]] = {}
    below = [0.0] * len(next(iter(values.values())))
    for key, column in values.items():
        below = [b + (v or 0.0) for b, v in zip(below, column, strict=True)]
        result[key] = list(below)
    return result


def _path(points: Sequence[tuple[float, float] | None]) -> tuple[str, tuple[tuple[float, float], ...]]:
    """An SVG path with a gap wherever a value is missing; points without a neighbour come back as dots."""
    path: list[str] = []
    dots: list[tuple[float, float]] = []
    for i, point in enumerate(points):
        if point is None:
            continue
        joined = i > 0 and points[i - 1] is not None
        path.append(f"{'L' if joined else 'M'}{point[0]} {point[1]}")
        if not joined and (i + 1 == len(points) or points[i + 1] is None):
            dots.append(point)
    return " ".join(path), tuple(dots)


def _area(above: Sequence[tuple[float, float] | None], under: Sequence[tuple[float, float] | None]) -> str:
    outline = [p for p in above if p is not None] + [p for p in reversed(under) if p is not None]
    if len(above) == 1:  # one step has no width: draw a bar
        (x, top), (_, bottom) = outline
        outline = [(x - 12, top), (x + 12, top), (x + 12, bottom), (x - 12, bottom)]
    return "M" + " L".join(f"{x} {y}" for x, y in outline) + " Z"


def _hits(
    steps: Sequence[float],
    values: Mapping[str, Sequence[float | None]],
    names: Mapping[str, str],
    x: Callable[[float], float],
) -> tuple[Hit, ...]:
    centres = [x(step) for step in steps]
    edges = [LEFT, *((a + b) / 2 for a, b in itertools.pairwise(centres)), RIGHT]
    hits: list[Hit] = []
    for i, step in enumerate(steps):
        read = [f"{name} {short(v)}" for key, name in names.items() if (v := values[key][i]) is not None]
        text = f"step {step:g}: {', '.join(read) or 'not recorded'}"
        hits.append(Hit(x=centres[i], left=round(edges[i], 1), width=round(edges[i + 1] - edges[i], 1), text=text))
    return tuple(hits)


def _in_words(
    title: str, steps: Sequence[float], values: Mapping[str, Sequence[float | None]], names: Mapping[str, str]
) -> str:
    parts: list[str] = []
    for key, name in names.items():
        known = [(step, v) for step, v in zip(steps, values[key], strict=True) if v is not None]
        (first, start), (last, end) = known[0], known[-1]
        parts.append(f"{name} from {short(start)} at step {first:g} to {short(end)} at step {last:g}")
    return f"{title}: {'; '.join(parts)}"
