"""
The sidecars that this process has started, inside itself or beside it.

A client finds them here even where no runtime file can be written: in a container without a home, with a home that is
read-only, or whose path is too long.
"""

import os
import threading
from typing import NamedTuple
from urllib.parse import urlsplit

__all__ = ["OwnSidecar", "announce", "own_sidecars", "withdraw"]


class OwnSidecar(NamedTuple):
    """Where a sidecar of this process answers."""

    socket: str | None
    host: str | None
    port: int | None
    token: str | None

    @classmethod
    def at(cls, socket: str | None, url: str | None, token: str | None) -> "OwnSidecar":
        """Return the one with this socket and base URL."""
        parts = urlsplit(url or "")
        return cls(socket, parts.hostname, parts.port, token)


class _Registry:
    """What is one per process: in a forked child it is empty, for the sidecars stay the parent's."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.found: list[tuple[int, OwnSidecar]] = []


_registry = _Registry()


def announce(sidecar: OwnSidecar) -> None:
    """Add a sidecar that watches this process and answers."""
    with _registry.lock:
        _registry.found.append((os.getpid(), sidecar))


def withdraw(sidecar: OwnSidecar) -> None:
    """Remove a sidecar that has ended. A second call does nothing."""
    with _registry.lock:
        _registry.found = [each for each in _registry.found if each != (os.getpid(), sidecar)]


def own_sidecars() -> list[OwnSidecar]:
    """Return the sidecars of this process, the newest first."""
    with _registry.lock:
        return [sidecar for pid, sidecar in reversed(_registry.found) if pid == os.getpid()]
