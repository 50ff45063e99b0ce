"""Large answers are made one at a time, and whoever waits for one holds nothing of it yet."""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Any, TypeVar

from vitalsd.sampler import Busy
from vitalsd.worker import seen

__all__ = ["Turns"]

T = TypeVar("T")

MAX_WAITING = 16
"""A large table takes more than a second: who comes later would wait longer than anybody does."""


class Turns:
    """
    One after the other, from the sources of an answer to its bytes: a crowd costs the memory of one.

    Args:
        limit: answers that may wait for their turn.
    """

    def __init__(self, limit: int = MAX_WAITING) -> None:
        self._limit = limit
        self._turn = asyncio.Lock()
        self._under_way: dict[Hashable, asyncio.Task[Any]] = {}

    async def make(self, work: Callable[[], Awaitable[T]], key: Hashable = None) -> T:
        """
        What `work` returns or raises, once it is its turn.

        Args:
            key: all who ask for the same before it is made share it; ``None`` for nobody.

        Raises:
            Busy: too many wait already.
        """
        key = object() if key is None else key
        task: asyncio.Task[T] | None = self._under_way.get(key)
        if task is None:
            if len(self._under_way) > self._limit:
                raise Busy(f"{self._limit} large answers are being waited for already")
            task = asyncio.create_task(self._in_turn(work))
            self._under_way[key] = task
            task.add_done_callback(lambda task: self._done(key, task))
        return await asyncio.shield(task)

    async def _in_turn(self, work: Callable[[], Awaitable[T]]) -> T:
        async with self._turn:
            return await work()

    def _done(self, key: Hashable, task: asyncio.Task[Any]) -> None:
        self._under_way.pop(key, None)
        seen(task)  # all who asked may have left
