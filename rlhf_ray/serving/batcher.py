"""Natural batching: while one forward runs, what arrives waits, and shares the next.

Not ``@serve.batch``: that one counts items and not their tokens, pays for the padding of a short response beside a long
one, waits before every batch that is not full, and fails all callers of a batch for one of them. Here only an idle
model waits, and a batch is as many of the line as fit the budget of tokens: in their order where the model computes no
padding, else the item that waited longest with those nearest to it in length among the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rlhf_ray.errors import ForwardFailedError, ScorerError
from rlhf_ray.roles.scorer import Reading

log = logging.getLogger("rlhf_ray.serving")

Verdict = Reading | ScorerError

_LOOKAHEAD = 2
"""Batches' worth of the line that a padded batch is chosen from: one from further back would overtake too many."""

_RATE_WINDOW = 32
"""Forwards that the expected wait is reckoned from."""


class OverloadedError(Exception):
    """More waits than can be answered in time. Caught by the HTTP face."""

    def __init__(self, wait_seconds: float) -> None:
        super().__init__(wait_seconds)
        self.wait_seconds = wait_seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Forward:
    """One forward, as the metrics see it."""

    rows: int
    scored: int
    """Rows that got a score."""
    tokens: int
    """Without padding."""
    padded_tokens: int
    seconds: float
    waited_seconds: float
    """Of the row that waited longest."""


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    ids: Sequence[int]
    verdict: asyncio.Future[Verdict]
    since: float


class Batcher:
    """Collects sequences from many callers into forwards, one forward at a time."""

    def __init__(
        self,
        forward: Callable[[Sequence[Sequence[int]]], Sequence[Verdict]],
        *,
        max_batch_size: int,
        max_batch_tokens: int,
        wait_seconds: float,
        packs: bool = False,
        warm_up: Forward | None = None,
        on_forward: Callable[[Forward], None] = lambda forward: None,
    ) -> None:
        """
        Args:
            forward: scores a batch of token-id sequences; runs in a thread of its own.
            max_batch_tokens: most tokens in a forward, padding included; a longer sequence goes alone.
            wait_seconds: how long an idle model waits for company before it begins.
            packs: the forward computes no padding, so lengths need not be alike.
            warm_up: one that has been, which the expected wait is reckoned from until there are others.
            on_forward: hears of each forward; where it fails, the log says so and scoring goes on.
        """
        self._forward = forward
        self._max_batch_size = max_batch_size
        self._max_batch_tokens = max_batch_tokens
        self._wait_seconds = wait_seconds
        self._packs = packs
        self._on_forward = on_forward
        self._reports = True
        self._waiting: list[_Waiting] = []
        self._running_tokens = 0
        self._running_since: float | None = None
        self._warm_up = [warm_up] if warm_up else []
        self.failures = 0
        """Forwards in a row that gave no score at all."""
        self._recent: deque[Forward] = deque(maxlen=_RATE_WINDOW)
        self._full = asyncio.Event()
        self._drain: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="forward")

    async def score(
        self, sequences: Sequence[Sequence[int]], *, max_wait_seconds: float | None = None
    ) -> list[Reading]:
        """One reading for each sequence, in order.

        Args:
            max_wait_seconds: refuse the call where it would wait longer than that for its forward to begin.

        Raises:
            ScorerError: a sequence of this call has no score; other callers are not concerned.
            OverloadedError: it would wait too long.
        """
        if max_wait_seconds is not None:
            self.refuse_if_overloaded(max_wait_seconds)
        loop, now = asyncio.get_running_loop(), time.monotonic()
        entries = [_Waiting(ids, loop.create_future(), now) for ids in sequences]
        self._waiting += entries
        if len(self._waiting) >= self._max_batch_size:
            self._full.set()
        if self._drain is None or self._drain.done():
            self._drain = asyncio.create_task(self._score_all())
        readings = []
        for verdict in await asyncio.gather(*(entry.verdict for entry in entries)):
            if isinstance(verdict, ScorerError):
                raise verdict
            readings.append(verdict)
        return readings

    def refuse_if_overloaded(self, max_wait_seconds: float) -> None:
        """Raises:
        OverloadedError: what comes now would wait longer than that for its forward to begin.
        """
        if (wait := self.expected_wait()) > max_wait_seconds:
            raise OverloadedError(wait)

    def expected_wait(self) -> float:
        """Seconds until a sequence that came now would begin, at the rate of the last forwards; 0 before the first.

        The warm-up counts among them: after a few short sequences alone, the rate says little about full batches.
        """
        seen = [*self._warm_up, *self._recent]
        seconds = sum(forward.seconds for forward in seen)
        tokens = sum(forward.tokens for forward in seen)
        ahead = self._running_tokens + sum(len(entry.ids) for entry in self._waiting if not entry.verdict.done())
        return ahead * seconds / tokens if tokens else 0.0

    def running_seconds(self) -> float:
        """Age of the forward under way; 0 between two of them."""
        return 0.0 if self._running_since is None else time.monotonic() - self._running_since

    async def idle(self) -> None:
        """Returns once nothing waits."""
        if self._drain is not None:
            await asyncio.wait([self._drain])

    async def _score_all(self) -> None:
        """Forward batch after batch until nothing waits."""
        with contextlib.suppress(TimeoutError):  # nobody else came: that is what the time was for
            async with asyncio.timeout(self._wait_seconds):
                await self._full.wait()
        while batch := self._next_batch():
            tokens = [len(entry.ids) for entry in batch]
            self._running_tokens = sum(tokens)
            began = self._running_since = time.monotonic()
            try:
                verdicts = await asyncio.get_running_loop().run_in_executor(
                    self._thread, self._forward, [entry.ids for entry in batch]
                )
                if len(verdicts) != len(batch):
                    raise ValueError(f"{len(verdicts)} verdicts on {len(batch)} sequences")
            except Exception as error:  # noqa: BLE001 (each caller gets the cause)
                cause = ForwardFailedError(f"the forward of the reward model failed: {type(error).__name__}: {error}")
                verdicts = [cause] * len(batch)
            self._running_tokens = 0
            self._running_since = None
            for entry, verdict in zip(batch, verdicts, strict=True):
                if not entry.verdict.done():
                    entry.verdict.set_result(verdict)
            scored = sum(isinstance(verdict, Reading) for verdict in verdicts)
            self.failures = 0 if scored else self.failures + 1
            forward = Forward(
                rows=len(batch),
                scored=scored,
                tokens=sum(tokens),
                padded_tokens=self._cost(tokens),
                seconds=time.monotonic() - began,
                waited_seconds=began - min(entry.since for entry in batch),
            )
            if scored:
                self._recent.append(forward)
            self._report(forward)

    def _report(self, forward: Forward) -> None:
        """Tell the meters. One that breaks must not end this task: whoever waits in the line would wait for ever."""
        try:
            self._on_forward(forward)
        except Exception:
            if self._reports:  # once, not for each of many forwards a second
                log.exception("forwards are not counted from now on, scoring goes on: a meter failed")
            self._reports = False
        else:
            self._reports = True

    def _next_batch(self) -> list[_Waiting]:
        """The item that waited longest and those that go with it best; callers who gave up are left out."""
        alive = [entry for entry in self._waiting if not entry.verdict.done()]
        line = alive
        if not self._packs:  # the first stays first, since the sort is stable
            near = alive[: _LOOKAHEAD * self._max_batch_size]
            line = sorted(near, key=lambda entry: abs(len(entry.ids) - len(alive[0].ids)))
        batch: list[_Waiting] = []
        tokens: list[int] = []
        for entry in line[: self._max_batch_size]:
            tokens.append(len(entry.ids))
            if batch and self._cost(tokens) > self._max_batch_tokens:
                break
            batch.append(entry)
        taken = set(map(id, batch))
        self._waiting = [entry for entry in alive if id(entry) not in taken]
        if len(self._waiting) < self._max_batch_size:
            self._full.clear()
        return batch

    def _cost(self, tokens: Sequence[int]) -> int:
        """Tokens that a forward over sequences of these lengths computes."""
        return sum(tokens) if self._packs else len(tokens) * max(tokens)
