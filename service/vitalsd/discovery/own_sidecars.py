"""
Keep a list of the sidecars that this process has started, in a thread or as another process.

A client in this process finds them here even if no runtime file can be written: in a container without a home
directory, or with one that is read-only or has a path that is too long.
"""

import os
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import urlsplit

__all__ = ["OwnSidecar", "announce", "own_sidecars", "withdraw"]


class OwnSidecar(NamedTuple):
    """The addresses of a sidecar of this process."""

    socket: str | None
    host: str | None
    port: int | None
    token: str | None
    alive: Callable[[], bool]
    """Return whether the sidecar still runs. After it has ended, another sidecar may get its port."""

    @classmethod
    def at(cls, socket: str | None, url: str | None, token: str | None, alive: Callable[[], bool]) -> "OwnSidecar":
        """Make an entry from a socket and a base URL."""
        parts = urlsplit(url or "")
        return cls(socket, parts.hostname, parts.port, token, alive)


class _Registry:
    """
    The list, one per process.

    A tuple that is replaced needs no lock; a lock that another thread holds at a fork is never released in the child.
    """

    found: tuple[tuple[int, OwnSidecar], ...] = ()
    """(pid, sidecar): a forked child does not own the sidecars of its parent."""


def announce(sidecar: OwnSidecar) -> None:
    """Add a sidecar that watches this process and answers."""
    _Registry.found = (*_Registry.found, (os.getpid(), sidecar))


def withdraw(sidecar: OwnSidecar) -> None:
    """Remove a sidecar that has ended. A second call does nothing."""
    _Registry.found = tuple(each for each in _Registry.found if each[1] is not sidecar)


def own_sidecars() -> list[OwnSidecar]:
    """Return the running sidecars of this process, the newest first; remove those that have ended."""
    found = []
    for pid, sidecar in reversed(_Registry.found):
        if pid != os.getpid():
            continue
        if sidecar.alive():
            found.append(sidecar)
        else:
            withdraw(sidecar)
    return found
