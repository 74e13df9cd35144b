"""What a person sees while a command runs: stages, progress, and the table of PPO steps.

Everything goes through one ``Console``: in a terminal it draws bars and a live table, elsewhere it writes plain lines.
``quiet_libraries`` keeps the libraries' own bars and warnings out of the picture.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console as RichConsole
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rlhf_ray.report.step_table import StepTable, duration

PLAIN_PROGRESS_LINES = 10
"""Lines that a whole piece of work is worth away from a terminal."""

PLAIN_PROGRESS_SECONDS = 30.0
"""Without a line for so long, the next progress is one."""


@dataclass(slots=True)
class Stage:
    """A stage under way; ``outcome`` is what its last line says of the result."""

    outcome: str = ""


class Console:
    """The one way to the person watching. Text is printed as it stands: brackets in it are no markup."""

    def __init__(self, rich: RichConsole | None = None) -> None:
        self._rich = rich or RichConsole(highlight=False)
        self._planned: list[str] = []

    @property
    def live(self) -> bool:
        """True where lines can be drawn over."""
        return self._rich.is_terminal and not self._rich.is_dumb_terminal

    def say(self, text: str, *, style: str = "") -> None:
        """One line; it never waits in a buffer."""
        self._rich.print(text, style=style or None, markup=False, highlight=False, soft_wrap=not self.live)
        self._rich.file.flush()

    def plan(self, stages: Sequence[str]) -> None:
        """The stages to come: each is then announced as number n of all."""
        self._planned = list(stages)

    @contextmanager
    def stage(self, name: str, about: str = "") -> Iterator[Stage]:
        """Announce a stage (``[3/7] reward: training on 420 pairs``), and say at its end how long it took."""
        number = f"[{self._planned.index(name) + 1}/{len(self._planned)}] " if name in self._planned else ""
        self.say(f"{number}{name}" + (f": {about}" if about else ""), style="bold")
        stage, start = Stage(), time.monotonic()
        try:
            yield stage
        except BaseException:
            self.say(f"      {name} ended early, after {duration(time.monotonic() - start)}", style="red")
            raise
        outcome = f"{stage.outcome}; " if stage.outcome else ""
        self.say(f"      {outcome}took {duration(time.monotonic() - start)}", style="green")

    @contextmanager
    def progress(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """Yields a function of (done, total) to call as the work goes on."""
        if not self.live:
            yield _PlainProgress(self, what)
            return
        label = TextColumn(f"      {what}", markup=False)
        columns = label, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=self._rich, transient=True) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)

    @contextmanager
    def steps(self, run: str, total: int, *, done: int = 0) -> Iterator[StepTable]:
        """The table of PPO steps; call ``update`` on it with each step's metrics.

        ``done`` is the number of steps that a resumed run had taken before.
        """
        if not self.live:
            yield StepTable(run, total, done=done, write=self.say)
            return
        table = StepTable(run, total, done=done)
        with Live(table, console=self._rich, refresh_per_second=4):
            yield table

    def show_logs(self, logger: str = "rlhf_ray") -> None:
        """Print what our own modules log (what a wait waits for, who joined or left), above the table."""
        handler = _ConsoleHandler(self)
        target = logging.getLogger(logger)
        target.handlers = [h for h in target.handlers if not isinstance(h, _ConsoleHandler)] + [handler]
        target.setLevel(logging.INFO)
        target.propagate = False


class _PlainProgress:
    def __init__(self, console: Console, what: str) -> None:
        self._console, self._what, self._said = console, what, 0
        self._said_at = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        reached = done * PLAIN_PROGRESS_LINES // max(total, 1)
        if reached < self._said:  # the same work begins anew, for the next model
            self._said = 0
        if reached > self._said or time.monotonic() - self._said_at >= PLAIN_PROGRESS_SECONDS:
            self._said, self._said_at = reached, time.monotonic()
            self._console.say(f"      {self._what}: {done} of {total} ({done / max(total, 1):.0%})")


class _ConsoleHandler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        style = "red" if record.levelno >= logging.ERROR else "yellow" if record.levelno >= logging.WARNING else "dim"
        try:
            self._console.say(f"      {self.format(record)}", style=style)
        except Exception:  # noqa: BLE001 (logging's own contract: a line that cannot be shown does not end the run)
            self.handleError(record)
