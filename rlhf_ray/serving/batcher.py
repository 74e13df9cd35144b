"""Natural batching: while one forward runs, what arrives waits, and shares the next.

Not ``@serve.batch``: that one fills its batch in order of arrival, so a short response pays for the padding of a long
one, waits before every batch that is not full, and fails all callers of a batch for one of them. Here only an idle
model waits, and a batch is the item that waited longest with those nearest to it in length.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rlhf_ray.errors import ScorerError
from rlhf_ray.types import Score

Verdict = Score | ScorerError


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    ids: Sequence[int]
    verdict: asyncio.Future[Verdict]


class Batcher:
    """Collects sequences from many callers into forwards of at most ``max_batch_size``, one forward at a time."""

    def __init__(
        self,
        forward: Callable[[Sequence[Sequence[int]]], Sequence[Verdict]],
        *,
        max_batch_size: int,
        wait_seconds: float,
    ) -> None:
        """
        Args:
            forward: scores a batch of token-id sequences; runs in a thread of its own.
            wait_seconds: how long an idle model waits for company before it begins.
        """
        self._forward = forward
        self._max_batch_size = max_batch_size
        self._wait_seconds = wait_seconds
        self._waiting: list[_Waiting] = []
        self._full = asyncio.Event()
        self._drain: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="forward")

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[Score]:
        """One score for each sequence, in order.

        Raises:
            ScorerError: a sequence of this call has no score; other callers are not concerned.
        """
        loop = asyncio.get_running_loop()
        entries = [_Waiting(ids, loop.create_future()) for ids in sequences]
        self._waiting += entries
        if len(self._waiting) >= self._max_batch_size:
            self._full.set()
        if self._drain is None or self._drain.done():
            self._drain = asyncio.create_task(self._score_all())
        scores = []
        for verdict in await asyncio.gather(*(entry.verdict for entry in entries)):
            if isinstance(verdict, ScorerError):
                raise verdict
            scores.append(verdict)
        return scores

    async def _score_all(self) -> None:
        """Forward batch after batch until nothing waits."""
        with contextlib.suppress(TimeoutError):  # nobody else came: that is what the time was for
            async with asyncio.timeout(self._wait_seconds):
                await self._full.wait()
        while batch := self._next_batch():
            try:
                verdicts = await asyncio.get_running_loop().run_in_executor(
                    self._thread, self._forward, [entry.ids for entry in batch]
                )
            except Exception as error:  # noqa: BLE001 (each caller gets the cause)
                cause = ScorerError(f"the forward of the reward model failed: {type(error).__name__}: {error}")
                verdicts = [cause] * len(batch)
            for entry, verdict in zip(batch, verdicts, strict=True):
                if not entry.verdict.done():
                    entry.verdict.set_result(verdict)

    def _next_batch(self) -> list[_Waiting]:
        """The item that waited longest and those nearest to it in length; callers who gave up are left out."""
        alive = [entry for entry in self._waiting if not entry.verdict.done()]
        nearest = sorted(
            alive, key=lambda entry: abs(len(entry.ids) - len(alive[0].ids))
        )  # stable: the first stays first
        batch = nearest[: self._max_batch_size]
        taken = set(map(id, batch))
        self._waiting = [entry for entry in alive if id(entry) not in taken]
        if len(self._waiting) < self._max_batch_size:
            self._full.clear()
        return batch
