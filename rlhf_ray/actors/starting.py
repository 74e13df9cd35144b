"""Actors that a pool asks for by name: started, found a place, come up; and where each of them is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar


class Startable(Protocol):
    """A client of an actor that may still be without a place."""

    async def placed(self) -> None:
        """Wait until the actor's process runs somewhere."""
        ...

    async def ready(self) -> None:
        """Wait until it has loaded what it needs."""
        ...

    async def close(self) -> None:
        """End the actor, placed or not."""
        ...


C = TypeVar("C", bound=Startable)


class ActorStarter(Generic[C]):
    """A factory for a ``WorkerPool``.

    Args:
        start: starts the actor of a name and returns its client at once.
        ahead: names to start now, before the pool asks for them: they load their model while others load theirs.
    """

    def __init__(self, start: Callable[[str], C], *, ahead: Sequence[str]) -> None:
        self._start = start
        self._ahead = {name: start(name) for name in ahead}
        self.unplaced: set[str] = set()
        """Names of those that wait for a place on the cluster, or for their process."""

    async def __call__(self, name: str) -> C:
        client = self._ahead.pop(name, None) or self._start(name)
        self.unplaced.add(name)
        try:
            await client.placed()
            self.unplaced.discard(name)
            await client.ready()
        except BaseException:
            await client.close()
            raise
        finally:
            self.unplaced.discard(name)
        return client

    async def close(self) -> None:
        """End those that nobody has asked for."""
        while self._ahead:
            await self._ahead.popitem()[1].close()
