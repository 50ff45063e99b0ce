"""Make large answers one at a time (single flight), in a fair order, so that they cost the memory of one answer."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

from vitalsd.admission import OWNER, BusyError, Peer, Shares
from vitalsd.contract.limits import WAITING_ANSWERS
from vitalsd.worker_thread import consume_exception

__all__ = ["SingleFlight"]

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Order(Generic[T]):
    """Hold one answer that is requested, and the number of requests that share it."""

    task: asyncio.Task[T] = field(init=False)
    waiting: int = 0
    """Number of requests that wait for it."""
    begun: bool = False


class SingleFlight:
    """
    Make answers one after the other, each from its sources to its bytes; equal requests share one answer.

    Kinds of client take turns (round robin): one that requests many answers delays another one by a single answer.

    Args:
        limit: queued answers of one kind of client, besides the one being made; see `Shares`.
    """

    def __init__(self, limit: int = WAITING_ANSWERS) -> None:
        self._shares = Shares(limit + 1)
        self._orders: dict[Hashable, _Order[Any]] = {}
        self._queues: dict[str, deque[asyncio.Future[None]]] = {}
        """Waiting answers by kind of client, in the order of their turns."""
        self._taken = False

    async def make(self, work: Callable[[], Awaitable[T]], key: Hashable = None, peer: Peer = OWNER) -> T:
        """
        Wait for the turn of `work`, and return what it returns or raise what it raises.

        If all requests for an answer are cancelled before its turn, it is not made.

        Args:
            work: makes the answer.
            key: requests of one kind of client with the same key share one answer; None: no sharing.
            peer: the client that requests it.

        Raises:
            BusyError: the client waits for too many answers already.
        """
        key = object() if key is None else (peer.kind, key)
        order: _Order[T] | None = self._orders.get(key)
        if order is None:
            if not self._shares.take(peer):
                raise BusyError(f"{self._shares.limit - 1} large answers are being waited for already")
            order = self._orders[key] = _Order()
            order.task = asyncio.create_task(self._in_turn(work, order, peer))
            order.task.add_done_callback(partial(self._done, key, order, peer))
        order.waiting += 1
        try:
            return await asyncio.shield(order.task)
        finally:
            order.waiting -= 1
            if not order.waiting and not order.begun:
                self._remove(key, order)
                order.task.cancel()

    async def _in_turn(self, work: Callable[[], Awaitable[T]], order: _Order[T], peer: Peer) -> T:
        await self._begin(peer.kind)
        try:
            order.begun = True
            return await work()
        finally:
            self._end()

    def _done(self, key: Hashable, order: _Order[T], peer: Peer, task: asyncio.Task[T]) -> None:
        self._remove(key, order)
        self._shares.release(peer)
        consume_exception(task)  # Every client may have disconnected.

    def _remove(self, key: Hashable, order: _Order[T]) -> None:
        if self._orders.get(key) is order:
            del self._orders[key]

    async def _begin(self, kind: str) -> None:
        """Wait for the turn of this kind of client."""
        if not self._taken:
            self._taken = True
            return
        turn = asyncio.get_running_loop().create_future()
        self._queues.setdefault(kind, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._end()
            raise

    def _end(self) -> None:
        """Pass the turn to the next waiting kind of client."""
        while self._queues:
            kind, queue = next(iter(self._queues.items()))
            turn = queue.popleft()
            del self._queues[kind]
            if queue:
                self._queues[kind] = queue
            if not turn.done():
                turn.set_result(None)
                return
        self._taken = False
