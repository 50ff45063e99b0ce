"""
Limits of connections, and of the large answers that their clients have yet to take.

At the limit of connections the one that has owed its request the longest is closed; if all are being served, the new
one is refused. Large answers share a budget of bytes; an answer that does not fit is refused.
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

EVICTION_SCAN = 64  # Connections that are looked at for one to close, those first that have been silent the longest.


class Client(Protocol):
    """A connection."""

    transport: asyncio.Transport


class ConnectionLimiter:
    """
    Count the connections over one kind of listener.

    At the limit the connection that has owed its request the longest is closed. So clients that stall cost others
    nothing, and only clients that are all being served keep others out.

    Args:
        limit: connections; see `Shares`.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._shares = Shares(limit)
        self.send_budget = SendBudget(SEND_BUDGET_BYTES)
        self.closing = 0
        """Connections that are kept until their client has closed its half."""
        self._present: dict[Client, Peer] = {}
        self._idle: dict[Client, None] = {}
        """Connections that owe a request, those first that have owed it the longest."""

    @classmethod
    def fitting(cls) -> "ConnectionLimiter":
        """Return one with at most a quarter of the descriptors that this process may have."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        unlimited = soft == resource.RLIM_INFINITY
        return cls(CONNECTIONS if unlimited else max(2, min(CONNECTIONS, soft // DESCRIPTOR_SHARE)))

    def __len__(self) -> int:
        return len(self._present)

    def acquire(self, connection: Client, peer: Peer = OWNER) -> bool:
        """Admit the connection of `peer`; return False if the limit is reached and none can be closed."""
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
        """Count a connection that was closed no more; a second call does nothing."""
        self._idle.pop(connection, None)
        peer = self._present.pop(connection, None)
        if peer is not None:
            self._shares.release(peer)

    def set_idle(self, connection: Client, idle: bool) -> None:
        """Note whether the connection owes a request (`idle`) or is owed an answer."""
        if idle and connection in self._present:
            self._idle.setdefault(connection)
        else:
            self._idle.pop(connection, None)


def _has_unread(connection: Client) -> bool:
    """Return whether bytes of the client, perhaps its request, wait to be read."""
    poll = select.poll()
    poll.register(connection.transport.get_extra_info("socket"), select.POLLIN)
    return bool(poll.poll(0))


class SendBudget:
    """
    Count the bytes of large answers that clients have yet to take; bytes that several clients share count once.

    Args:
        limit: bytes; a single answer is admitted whatever its size.
        bytes_per_s: the rate at which a client must take an answer.
    """

    def __init__(self, limit: int, bytes_per_s: int = SEND_BYTES_PER_S) -> None:
        self.limit = limit
        self.bytes_per_s = bytes_per_s
        self.size = 0
        """Bytes that are counted."""
        self._clients: Counter[int] = Counter()
        """Clients by `id` of the answer, which lives until they have released it."""

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
        """Return how long a client may take for `body`."""
        return WRITE_S + len(body) / self.bytes_per_s
