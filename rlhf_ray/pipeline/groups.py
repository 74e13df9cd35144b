"""Groups of tasks that end with the error which ended them, and not with a group of one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


@asynccontextmanager
async def task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """An ``asyncio.TaskGroup``.

    Raises:
        BaseException: the first error of a task or of the block, itself and with its own cause.
    """
    try:
        async with asyncio.TaskGroup() as tasks:
            yield tasks
    except BaseExceptionGroup as group:
        cause = first_error(group)
        raise cause from cause.__cause__


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first one that is no group."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
