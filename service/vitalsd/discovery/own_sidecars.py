"""
The sidecars that this process has started, inside itself or beside it.

A client finds them here even where no runtime file can be written: in a container without a home, with a home that is
read-only, or has a path that is too long.
"""

import os
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import urlsplit

__all__ = ["OwnSidecar", "announce", "own_sidecars", "withdraw"]


class OwnSidecar(NamedTuple):
    """Where a sidecar of this process answers."""

    socket: str | None
    host: str | None
    port: int | None
    token: str | None
    alive: Callable[[], bool]
    """Return whether it still runs: another sidecar may have its port since."""

    @classmethod
    def at(cls, socket: str | None, url: str | None, token: str | None, alive: Callable[[], bool]) -> "OwnSidecar":
        """Return the one with this socket and base URL."""
        parts = urlsplit(url or "")
        return cls(socket, parts.hostname, parts.port, token, alive)


class _Registry:
    """
    What is one per process.

    A tuple that is replaced needs no lock: a lock that another thread holds at a fork would stay held in the child. The
    sidecars of a process are not those of its forked child.
    """

    found: tuple[tuple[int, OwnSidecar], ...] = ()


def announce(sidecar: OwnSidecar) -> None:
    """Add a sidecar that watches this process and answers."""
    _Registry.found = (*_Registry.found, (os.getpid(), sidecar))


def withdraw(sidecar: OwnSidecar) -> None:
    """Remove a sidecar that has ended. A second call does nothing."""
    _Registry.found = tuple(each for each in _Registry.found if each[1] is not sidecar)


def own_sidecars() -> list[OwnSidecar]:
    """Return the sidecars of this process that run, the newest first; those that have ended are removed."""
    found = []
    for pid, sidecar in reversed(_Registry.found):
        if pid != os.getpid():
            continue
        if sidecar.alive():
            found.append(sidecar)
        else:
            withdraw(sidecar)
    return found
