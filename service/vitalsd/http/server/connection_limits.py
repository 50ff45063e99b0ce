"""
Limit the connections, and the bytes of large answers that clients have not taken yet (backpressure).

At the limit of connections the longest idle one is evicted; if all are being served, the new one is refused. Large
answers share a budget of bytes; an answer that does not fit is refused (load shedding).
"""

import asyncio
import resource
import select
from collections import Counter
from itertools import islice
from typing import Protocol

from vitalsd.admission import OWNER, Peer, Shares
from vitalsd.contract.limits import CONNECTIONS, DESCRIPTOR_SHARE, SEND_BUDGET_BYTES, SEND_BYTES_PER_S, WRITE_S

__all__ = ["Client", "ConnectionLimiter", "SendBudget"]

EVICTION_SCAN = 64
"""Idle connections to check at most, longest idle first, for one to evict: each check is a system call."""


class Client(Protocol):
    """Declare what the limiter uses of a connection."""

    transport: asyncio.Transport


class ConnectionLimiter:
    """
    Count the connections over one kind of listener.

    At the limit the longest idle connection is evicted. So idle clients take no place from others, and a new client is
    refused only if all connections are being served.

    Args:
        limit: number of connections; see `Shares`.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._shares = Shares(limit)
        self.send_budget = SendBudget(SEND_BUDGET_BYTES)
        self.closing = 0
        """Number of connections that are kept until their client has closed its half."""
        self._present: dict[Client, Peer] = {}
        self._idle: dict[Client, None] = {}
        """Connections that wait for a request of their client, longest idle first."""

    @classmethod
    def fitting(cls) -> "ConnectionLimiter":
        """Return a limiter of `CONNECTIONS`, or of a quarter of the descriptors that this process may have if fewer."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        unlimited = soft == resource.RLIM_INFINITY
        return cls(CONNECTIONS if unlimited else max(2, min(CONNECTIONS, soft // DESCRIPTOR_SHARE)))

    def __len__(self) -> int:
        """Return the number of admitted connections."""
        return len(self._present)

    def acquire(self, connection: Client, peer: Peer = OWNER) -> bool:
        """Admit the connection of `peer`; return False if the limit is reached and none can be evicted."""
        while not self._shares.take(peer):
            # A user that has its whole share must not evict the connections of another user.
            own_only = self._shares.exhausted(peer)
            idle = (each for each in self._idle if not own_only or self._present[each] == peer)
            stalled = next((each for each in islice(idle, EVICTION_SCAN) if not _has_unread(each)), None)
            if stalled is None:
                return False
            self.release(stalled)
            stalled.transport.abort()
        self._present[connection] = peer
        return True

    def release(self, connection: Client) -> None:
        """Stop counting a connection; a second call does nothing."""
        self._idle.pop(connection, None)
        peer = self._present.pop(connection, None)
        if peer is not None:
            self._shares.release(peer)

    def set_idle(self, connection: Client, idle: bool) -> None:
        """Record whether the connection waits for a request (`idle`), or is being served."""
        if idle and connection in self._present:
            self._idle.setdefault(connection)
        else:
            self._idle.pop(connection, None)


def _has_unread(connection: Client) -> bool:
    """Return whether the kernel holds bytes of the client, perhaps its request."""
    poll = select.poll()
    poll.register(connection.transport.get_extra_info("socket"), select.POLLIN)
    return bool(poll.poll(0))


class SendBudget:
    """
    Count the bytes of large answers that clients have not taken yet; bytes that several clients share count once.

    Args:
        limit: limit, bytes; a single answer is admitted whatever its size.
        bytes_per_s: lowest rate at which a client must take an answer.
    """

    def __init__(self, limit: int, bytes_per_s: int = SEND_BYTES_PER_S) -> None:
        self.limit = limit
        self.bytes_per_s = bytes_per_s
        self.size = 0
        """Bytes counted now."""
        self._clients: Counter[int] = Counter()
        """Number of clients by the `id` of the answer, which exists until all of them have released it."""

    def acquire(self, body: bytes) -> bool:
        """Count `body` for one more client; return False, and count nothing, if it does not fit."""
        if not self._clients[id(body)]:
            if self.size and self.size + len(body) > self.limit:
                return False
            self.size += len(body)
        self._clients[id(body)] += 1
        return True

    def release(self, body: bytes) -> None:
        """End one count of `acquire`."""
        self._clients[id(body)] -= 1
        if not self._clients[id(body)]:
            del self._clients[id(body)]
            self.size -= len(body)

    def seconds(self, body: bytes) -> float:
        """Return the time limit to take `body`, s."""
        return WRITE_S + len(body) / self.bytes_per_s
