"""
Open the sockets of a sidecar: TCP, a Unix socket of its own, and those inherited from a supervisor.

Each is made here and not by the HTTP server, which would make the Unix socket writable by every user, replace the
socket of a live process, and notice a busy port only on its own thread.
"""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vitalsd.sidecar.config import DEFAULTS
from vitalsd.sidecar.listen_errors import ListenError
from vitalsd.sidecar.tcp_listener import bind_port, is_remote
from vitalsd.sidecar.unix_listener import UnixListener, default_unix_listener

__all__ = ["Listeners", "adopt", "listen"]


@dataclass(slots=True)
class Listeners:
    """Hold the sockets on which one sidecar listens."""

    tcp: list[socket.socket] = field(default_factory=list)
    unix: UnixListener | None = None
    others: list[socket.socket] = field(default_factory=list)
    """Unix sockets that a supervisor made, and removes."""
    notes: list[str] = field(default_factory=list)
    """What differs from what was requested or expected, in sentences for the user."""

    @property
    def sockets(self) -> list[socket.socket]:
        """All sockets that listen."""
        return [*self.tcp, *self.others, *([self.unix.socket] if self.unix else [])]

    @property
    def socket_path(self) -> str | None:
        """Path of the Unix socket, its own before one of a supervisor; ``None`` without any."""
        if self.unix is not None:
            return str(self.unix.path)
        return next((str(name) for each in self.others if (name := each.getsockname())), None)

    @property
    def address(self) -> tuple[str, int] | tuple[None, None]:
        """Host and TCP port, those of IPv4 if it listens there; ``None`` for both without TCP."""
        first = min(self.tcp, key=lambda each: each.family != socket.AF_INET, default=None)
        return (None, None) if first is None else first.getsockname()[:2]

    def close(self) -> None:
        """Close all of them. A second call does nothing."""
        for each in (*self.tcp, *self.others):
            each.close()
        if self.unix is not None:
            self.unix.close()

    def close_in_child(self) -> None:
        """Close them in a forked child; the file of the Unix socket stays the parent's."""
        for each in (*self.tcp, *self.others):
            each.close()
        if self.unix is not None:
            self.unix.close_in_child()


def listen(
    *,
    host: str = DEFAULTS.host,
    port: int | None = DEFAULTS.port,
    tcp: bool = DEFAULTS.tcp,
    uds: str | Path | None = DEFAULTS.uds,
    directory: Path | None = None,
    guarded: bool = False,
    allow_remote: bool = DEFAULTS.allow_remote,
) -> Listeners:
    """
    Open the listeners of a sidecar.

    Args:
        host: TCP address; with 127.0.0.1 the same port of ::1 too, if it is free.
        port: ``None`` is 9779, or a free one if that is taken; 0 is a free one.
        tcp: whether to listen on TCP at all.
        uds: path of the Unix socket; ``None`` puts it into `directory`.
        directory: of the runtime files; ``None``: no Unix socket unless `uds` names one.
        guarded: whether clients on TCP must send a token.
        allow_remote: whether other machines may connect; needs `guarded` too.

    Raises:
        PortInUseError: another process listens on `port`.
        ListenError: any other reason. Nothing is left open.
    """
    listeners = Listeners()
    try:
        if tcp:
            if is_remote(host):
                if not (guarded and allow_remote):
                    raise _unguarded(host)
                listeners.notes.append(_unencrypted(host))
            listeners.tcp += bind_port(host, port, listeners.notes)
        if uds is not None:
            listeners.unix = UnixListener(Path(os.path.abspath(uds)))
        elif directory is not None:
            listeners.unix = default_unix_listener(directory, listeners.notes if tcp else None)
        if not listeners.sockets:
            raise ListenError("there is nothing to listen on: no TCP, and no directory for a Unix socket")
    except BaseException:
        listeners.close()
        raise
    return listeners


def adopt(sockets: Sequence[socket.socket], *, guarded: bool, allow_remote: bool) -> Listeners:
    """
    Return the listeners that a supervisor made.

    Raises:
        ListenError: other machines could reach one of them, and that was not allowed.
    """
    unix = [each for each in sockets if each.family == socket.AF_UNIX]
    tcp = [each for each in sockets if each.family != socket.AF_UNIX]
    remote = [each.getsockname()[0] for each in tcp if is_remote(each.getsockname()[0])]
    if remote and not (guarded and allow_remote):
        for each in sockets:
            each.close()
        raise _unguarded(remote[0])
    return Listeners(tcp=tcp, others=unix, notes=[_unencrypted(host) for host in remote])


def _unguarded(host: str) -> ListenError:
    return ListenError(
        f"{host} can be reached from other machines; that needs both --auth token and --allow-remote"
        ' (in Python auth="token", allow_remote=True)'
    )


def _unencrypted(host: str) -> str:
    return f"{host} can be reached from other machines, and nothing is encrypted"
