"""Which share of the recent time each stage of the loop had something to do."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

STAGES = ("generate", "score", "reference", "train", "publish", "checkpoint")

WINDOW_SECONDS = 60.0


@dataclass
class _Stage:
    under_way: int = 0
    since: float = 0.0
    ended: deque[tuple[float, float]] = field(default_factory=deque)  # (from, to) of busy stretches


class Occupancy:
    """Adds up busy time over the last minute. A stage is busy while at least one call of it is under way.

    Args:
        now: the clock, seconds.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._began: float | None = None
        self.moved = 0
        """Calls of any stage that began or ended so far."""
        self._stages = {stage: _Stage() for stage in STAGES}

    def enter(self, stage: str) -> None:
        """A call of ``stage`` begins."""
        now, at = self._now(), self._stages[stage]
        self.moved += 1
        self._began = now if self._began is None else self._began
        at.since = at.since if at.under_way else now
        at.under_way += 1

    def leave(self, stage: str) -> None:
        """A call of ``stage`` is over."""
        now, at = self._now(), self._stages[stage]
        self.moved += 1
        at.under_way -= 1
        if not at.under_way:
            at.ended.append((at.since, now))
        while at.ended and at.ended[0][1] < now - WINDOW_SECONDS:
            at.ended.popleft()

    @contextmanager
    def busy(self, stage: str) -> Iterator[None]:
        """One call of ``stage``."""
        self.enter(stage)
        try:
            yield
        finally:
            self.leave(stage)

    def under_way(self) -> dict[str, int]:
        """Calls under way of each stage that has some."""
        return {name: stage.under_way for name, stage in self._stages.items() if stage.under_way}

    def shares(self) -> dict[str, float]:
        """Stage → share of the last ``WINDOW_SECONDS``, 0 to 1; of the time since the first call where that is less."""
        if self._began is None:
            return dict.fromkeys(STAGES, 0.0)
        now = self._now()
        start = max(self._began, now - WINDOW_SECONDS)
        shares = {}
        for name, stage in self._stages.items():
            stretches = [*stage.ended, *([(stage.since, now)] if stage.under_way else [])]
            busy = sum(max(0.0, end - max(begin, start)) for begin, end in stretches)
            shares[name] = busy / (now - start) if now > start else 0.0
        return shares
