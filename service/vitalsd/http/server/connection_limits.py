"""Who stays when there is not room for all: connections, and the answers that their clients have yet to take."""

import asyncio
import resource
import select
from dataclasses import dataclass
from itertools import islice
from math import inf
from typing import Protocol

from vitalsd.admission import OWNER, Peer, Shares

__all__ = ["MAX_CONNECTIONS", "OUTBOX_BYTES", "Delivery", "Outbox", "Room"]

MAX_CONNECTIONS = 1024
LOOKED_AT = 64
"""So many are looked at, those first who have been silent the longest, for one that may have to make way."""
OUTBOX_BYTES = 32 << 20
SETTLED_S = 1.0
"""An answer this young is left alone: nobody can say how fast it is being taken. When none of it is for so long ..."""
TAKEN_S = 10.0
"""... or its client would need longer than this for the whole of it, it may have to make way."""


class Guest(Protocol):
    """A connection, as far as it matters here."""

    transport: asyncio.Transport


class Room:
    """
    Connections over one kind of listener: at most so many at once, with at most so much to send.

    When it is full, the one that has owed its request the longest makes way. So those who stall cost
    nobody else anything, and only a crowd that is really being served keeps others out.

    Args:
        limit: of connections; see `Shares`.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._shares = Shares(limit)
        self.outbox = Outbox(OUTBOX_BYTES)
        self.closing = 0
        """Connections that are kept until their client has closed its half."""
        self._present: dict[Guest, Peer] = {}
        self._owing: dict[Guest, None] = {}

    @classmethod
    def fitting(cls) -> "Room":
        """Return a room that takes no more than a quarter of the descriptors that this process may have."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        unlimited = soft == resource.RLIM_INFINITY
        return cls(MAX_CONNECTIONS if unlimited else max(2, min(MAX_CONNECTIONS, soft // 4)))

    def __len__(self) -> int:
        return len(self._present)

    def enter(self, connection: Guest, peer: Peer = OWNER) -> bool:
        """Admit the connection of `peer`; return False if there is no room for it."""
        while not self._shares.take(peer):
            # A user that has its whole share must not evict the connections of another user.
            own_only = self._shares.exhausted(peer)
            owing = (each for each in self._owing if not own_only or self._present[each] == peer)
            stalled = next((each for each in islice(owing, LOOKED_AT) if not _has_unread(each)), None)
            if stalled is None:
                return False
            self.leave(stalled)
            stalled.transport.abort()
        self._present[connection] = peer
        return True

    def leave(self, connection: Guest) -> None:
        """It is closed. A second call does nothing."""
        self._owing.pop(connection, None)
        peer = self._present.pop(connection, None)
        if peer is not None:
            self._shares.release(peer)

    def owes(self, connection: Guest, owing: bool) -> None:
        """Whether it owes a request, or is owed an answer."""
        if owing and connection in self._present:
            self._owing.setdefault(connection)
        else:
            self._owing.pop(connection, None)


def _has_unread(connection: Guest) -> bool:
    """Whether something of the client has come that is yet to be read: its request, like as not."""
    poll = select.poll()
    poll.register(connection.transport.get_extra_info("socket"), select.POLLIN)
    return bool(poll.poll(0))


@dataclass(slots=True, eq=False)
class Delivery:
    """A large answer on its way to one client."""

    transport: asyncio.Transport
    body: bytes
    since_s: float
    """On the clock of the event loop."""
    handed: int = 0
    """Bytes of it that the transport was given ..."""
    handed_s: float = 0.0
    """... until when."""

    def hand(self, count: int, now_s: float) -> None:
        """So many more bytes have been handed over, which is done when those before have been taken."""
        self.handed += count
        self.handed_s = now_s

    def pace(self, now_s: float) -> float:
        """Of the whole answer, the part that is taken in a second; infinite as long as nobody can say."""
        age_s = now_s - self.since_s
        if age_s < SETTLED_S:
            return inf
        # What the kernel holds for a client that has stopped reading looks like a good beginning.
        if now_s - self.handed_s >= SETTLED_S:
            return 0.0
        return (self.handed - self.transport.get_write_buffer_size()) / len(self.body) / age_s


class Outbox:
    """
    Large answers that clients have yet to take: of at most so many bytes, or a single one.

    Bytes that several clients share count once. When a new answer does not fit, the slowest readers make
    way, those that stall before those that drip. So whoever reads is never cut off for one who does not, and
    who sits there with an answer of megabytes keeps nobody from theirs.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        """Bytes in it."""
        self._readers: dict[int, list[Delivery]] = {}

    def enter(self, delivery: Delivery) -> bool:
        """Take it in; ``False`` if there is no room, and then nobody has been cut off for it."""
        shared = self._readers.get(id(delivery.body))
        if shared is not None:
            shared.append(delivery)
            return True
        excess = self.size + len(delivery.body) - self.limit
        if self.size and excess > 0 and not self._make_way(excess, delivery.since_s):
            return False
        self._readers[id(delivery.body)] = [delivery]
        self.size += len(delivery.body)
        return True

    def leave(self, delivery: Delivery) -> None:
        """It is over, one way or the other. A second call does nothing."""
        readers = self._readers.get(id(delivery.body), [])
        if delivery in readers:
            readers.remove(delivery)
            if not readers:
                del self._readers[id(delivery.body)]
                self.size -= len(delivery.body)

    def _make_way(self, excess: int, now_s: float) -> bool:
        found = [(max(each.pace(now_s) for each in readers), readers) for readers in self._readers.values()]
        leaving: list[Delivery] = []
        for pace, readers in sorted(found, key=lambda one: one[0]):
            if excess <= 0 or pace >= 1 / TAKEN_S:
                break
            leaving += readers
            excess -= len(readers[0].body)
        if excess > 0:
            return False
        for each in leaving:
            self.leave(each)
            each.transport.abort()
        return True
