"""Many callers, one worker that takes lists: what comes in while a call runs waits, and shares the next."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class SharedCalls(Generic[T, R]):
    """One call of ``call`` at a time, for every item that waits.

    Args:
        call: items → one result each; when it raises, each of its callers gets the error.
    """

    def __init__(self, call: Callable[[Sequence[T]], Awaitable[Sequence[R]]]) -> None:
        self._call = call
        self._waiting: list[tuple[T, asyncio.Future[R]]] = []
        self._drain: asyncio.Task[None] | None = None

    async def __call__(self, item: T) -> R:
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._drain is None or self._drain.done():
            self._drain = asyncio.create_task(self._call_for_all())
        return await future

    async def _call_for_all(self) -> None:
        """Call for everything that waits, again and again until nothing does."""
        while self._waiting:
            batch, self._waiting = self._waiting, []
            try:
                results = await self._call([item for item, _ in batch])
            except Exception as error:  # noqa: BLE001 (each caller gets the cause)
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
            else:
                for (_, future), result in zip(batch, results, strict=True):
                    if not future.done():
                        future.set_result(result)
