"""
Admission: count what each kind of client uses, so that one client cannot take what another needs.

A sidecar serves its owner over the Unix socket, its owner over TCP, and other users of the machine over TCP. Each of
the three has limits of its own, and none of them can use up those of another.
"""

from collections import Counter
from typing import Literal, NamedTuple

__all__ = ["OWNER", "BusyError", "Peer", "Shares"]


class BusyError(Exception):
    """More is under way than the limits allow; the client should try again later."""


class Peer(NamedTuple):
    """The user at the other end of a connection."""

    kind: Literal["unix", "tcp", "other"]
    """
    ``unix``: the owner of the sidecar or root, over the Unix socket. ``tcp``: the owner or root over TCP, or a user
    that the kernel does not report. ``other``: another user, over TCP.
    """
    uid: int | None = None
    """User id, if `kind` is ``other`` and the kernel reports it."""

    @property
    def is_owner(self) -> bool:
        """Whether this peer may use every route."""
        return self.kind != "other"


OWNER = Peer("unix")
"""The peer of a caller that does not come over a socket."""


class Shares:
    """
    Count the uses of one resource by peer, and refuse those beyond a limit.

    The owner has `limit` over the Unix socket and `limit` over TCP. All other users together have `limit`, and one of
    them has at most half of it, but at least 1.

    Args:
        limit: uses at the same time.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._used: Counter[Peer | str] = Counter()

    def __len__(self) -> int:
        """Return the number of uses under way, of all peers."""
        return sum(count for key, count in self._used.items() if isinstance(key, str))

    def exhausted(self, peer: Peer) -> bool:
        """Return whether `peer` has used its own share; the uses of other peers of its kind do not count."""
        share = self.limit if peer.is_owner else max(1, self.limit // 2)
        return self._used[peer] >= share

    def take(self, peer: Peer) -> bool:
        """Count one more use; return False, and count nothing, if that is beyond the limit."""
        if self.exhausted(peer) or self._used[peer.kind] >= self.limit:
            return False
        self._used[peer] += 1
        self._used[peer.kind] += 1
        return True

    def release(self, peer: Peer) -> None:
        """End one use that `take` has counted."""
        for key in (peer, peer.kind):
            self._used[key] -= 1
            if not self._used[key]:
                del self._used[key]
