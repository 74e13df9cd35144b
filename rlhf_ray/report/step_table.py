"""The PPO steps as a person follows them: a live table in a terminal, one plain line per step elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

ROWS = 10
"""Newest steps that stay in view."""
PACE_STEPS = 10
"""Newest steps that the remaining time is reckoned from: the first ones also warm up."""
BAR_CELLS = 24

COLUMNS = (("step", 0), ("score_mean", 3), ("kl", 2), ("samples_per_second", 2), ("staleness_mean", 2))
"""(metric, digits) of the table's numbers."""

PARTS = {
    "train": ("seconds_train", "cyan"),
    "wait": ("seconds_wait", "yellow"),
    "publish": ("seconds_publish", "magenta"),
}
"""Where a step's time goes: name → (its metric, colour). The rest of the step is "other"."""


class StepTable:
    """Takes each step's metrics. ``write``, if given, gets one line per step; else rich draws the table itself."""

    def __init__(self, run: str, total: int, *, done: int = 0, write: Callable[[str], None] | None = None) -> None:
        self._run, self._total, self._done, self._write = run, total, done, write
        self._rows: deque[Mapping[str, float | None]] = deque(maxlen=ROWS)
        self._pace: deque[float] = deque(maxlen=PACE_STEPS)
        self._last = time.monotonic()

    def update(self, metrics: Mapping[str, float | None]) -> None:
        """Add a step: ``step`` and what the table shows of it; a missing number is shown as a dash."""
        self._rows.append(metrics)
        self._done = int(metrics.get("step") or self._done + 1)
        self._last = time.monotonic()
        if seconds := metrics.get("seconds_step"):
            self._pace.append(seconds)
        if self._write:
            self._write(self._line(metrics))

    def remaining_seconds(self) -> float | None:
        """Steps left times the recent seconds per step; None before the first step."""
        return (self._total - self._done) * sum(self._pace) / len(self._pace) if self._pace else None

    def __rich__(self) -> RenderableType:
        return Group(self._header(), self._table(), self._footer())

    def _header(self) -> RenderableType:
        grid = Table.grid(padding=(0, 2))
        remaining = self.remaining_seconds()
        grid.add_row(
            Text(self._run, style="bold"),
            ProgressBar(total=self._total, completed=self._done, width=30),
            Text(f"step {self._done}/{self._total}"),
            Text("" if remaining is None else f"{duration(remaining)} left", style="dim"),
        )
        return grid

    def _table(self) -> RenderableType:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for column in ("step", "score", "KL", "samples/s", "staleness"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("where the time goes", no_wrap=True)
        for row in self._rows:
            cells = [number(row.get(name), digits) for name, digits in COLUMNS]
            where = time_bar(row) if not row.get("skipped") else Text("skipped: not finite")
            table.add_row(*cells, where, style="red" if row.get("skipped") else None)
        return table

    def _footer(self) -> RenderableType:
        legend = Text()
        for name, (_, colour) in PARTS.items():
            legend.append("█ ", style=colour).append(f"{name}  ", style="dim")
        legend.append("█ ", style="bright_black").append("other", style="dim")
        if self._done < self._total:
            waited = duration(time.monotonic() - self._last)
            legend.append(f"    step {self._done + 1} under way for {waited}", style="dim")
        return legend

    def _line(self, metrics: Mapping[str, float | None]) -> str:
        step, score, kl, speed, staleness = (number(metrics.get(name), digits) for name, digits in COLUMNS)
        where = "  ".join(f"{name} {share:.0%}" for name, share in time_shares(metrics).items() if name != "other")
        remaining = self.remaining_seconds()
        parts = [
            f"step {step}/{self._total}",
            f"score {score}",
            f"KL {kl}",
            f"{speed} samples/s",
            f"staleness {staleness}",
            where,
            "skipped: not finite" if metrics.get("skipped") else "",
            "" if remaining is None else f"{duration(remaining)} left",
        ]
        return "  ".join(part for part in parts if part)


def time_shares(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """Share of a step's seconds for each of ``PARTS`` and "other"; {} when the step's seconds are unknown."""
    step = metrics.get("seconds_step")
    if not step:
        return {}
    seconds = {name: metrics.get(key) or 0.0 for name, (key, _) in PARTS.items()}
    whole = max(step, sum(seconds.values()))
    shares = {name: part / whole for name, part in seconds.items()}
    return {**shares, "other": max(0.0, 1.0 - sum(shares.values()))}


def time_bar(metrics: Mapping[str, float | None]) -> Text:
    """The shares as coloured cells, ``BAR_CELLS`` in all, and the largest in words for those who see no colour."""
    bar, drawn, until = Text(), 0, 0.0
    shares = time_shares(metrics)
    for name, share in shares.items():
        until += share
        cells = round(until * BAR_CELLS) - drawn
        drawn += cells
        bar.append("█" * cells, style=PARTS[name][1] if name in PARTS else "bright_black")
    if shares:
        most = max(shares, key=lambda name: shares[name])
        bar.append(f"  {most} {shares[most]:.0%}", style="dim")
    return bar


def number(value: float | None, digits: int) -> str:
    """A figure as the table shows it; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def duration(seconds: float) -> str:
    """``0.4 s``, ``12 s``, ``3 min 05 s``, ``2 h 04 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
