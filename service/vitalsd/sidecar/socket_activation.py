"""
Take what a supervisor hands over: listeners from systemd or launchd, and the socket of systemd's notifications.

A sidecar that is run from a shell has none of these and uses none.
"""

import asyncio
import errno
import os
import socket
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from vitalsd.sidecar.frozen import is_one_file
from vitalsd.sidecar.listen_errors import ListenError

if TYPE_CHECKING:
    from vitalsd.sidecar.service import Service

__all__ = ["LAUNCHD_SOCKETS", "Notifier", "activated", "inherited", "launchd_sockets", "systemd_sockets"]

FIRST_FD = 3
"""Number of the first descriptor that systemd passes: SD_LISTEN_FDS_START, sd-daemon.h."""
LAUNCHD_SOCKETS = ("http", "unix")
"""Keys of the Sockets dictionary in our property list."""


def activated(environ: MutableMapping[str, str]) -> list[socket.socket]:
    """
    Return the listeners of the supervisor that started us; empty if none did.

    Raises:
        ListenError: what it handed over cannot be used.
    """
    if sys.platform == "darwin":
        import ctypes

        return launchd_sockets(ctypes.CDLL(None, use_errno=True))
    return systemd_sockets(environ)


def systemd_sockets(environ: MutableMapping[str, str]) -> list[socket.socket]:
    """
    Return the listeners of sd_listen_fds(3), once: the variables are removed, so that no child takes them for its own.

    Raises:
        ListenError: one of them is not a listening stream socket.
    """
    meant_for, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    environ.pop("LISTEN_FDNAMES", None)
    if not _is_meant(meant_for):
        return []
    if not (count.isascii() and count.isdigit()):
        raise ListenError(f"LISTEN_FDS is {count[:20]!r}, not a number")
    return [inherited(fd) for fd in range(FIRST_FD, FIRST_FD + int(count))]


def _is_meant(pid: str) -> bool:
    """Return whether systemd gave `pid` to this process, or to the launcher of this one-file application."""
    return pid in (str(os.getpid()), *([str(os.getppid())] if is_one_file() else []))


def launchd_sockets(lib: Any) -> list[socket.socket]:
    """
    Return the listeners that launchd holds for us, all of each key: one per address family.

    ``int launch_activate_socket(const char *name, int **fds, size_t *cnt)`` (launch.h) returns an
    errno value: ESRCH when launchd did not start us, ENOENT when the key is not in the property
    list. The array is ours to free.

    Args:
        lib: libSystem, or whatever exports ``launch_activate_socket`` and ``free``.

    Raises:
        ListenError: launchd refused, or one of them is not a listening stream socket.
    """
    import ctypes  # imported here, because on Linux no other module needs it

    descriptors = ctypes.POINTER(ctypes.c_int)
    lib.launch_activate_socket.argtypes = (
        ctypes.c_char_p,
        ctypes.POINTER(descriptors),
        ctypes.POINTER(ctypes.c_size_t),
    )
    lib.launch_activate_socket.restype = ctypes.c_int
    lib.free.argtypes = (ctypes.c_void_p,)
    lib.free.restype = None
    fds: list[int] = []
    for key in LAUNCHD_SOCKETS:
        array, count = descriptors(), ctypes.c_size_t()
        code = lib.launch_activate_socket(key.encode(), ctypes.byref(array), ctypes.byref(count))
        if code == errno.ESRCH:
            return []
        if code == errno.ENOENT:
            continue
        if code != 0:
            raise ListenError(f"launchd does not hand over the socket {key!r}: {os.strerror(code)}")
        try:
            fds += array[: count.value]
        finally:
            lib.free(array)
    return [inherited(fd) for fd in fds]


def inherited(fd: int) -> socket.socket:
    """
    Return the listener that a supervisor passed as descriptor `fd`.

    `proto` is given, which `socket.fromfd` does not do: macOS does not report it for a descriptor, and without it
    asyncio would leave Nagle's algorithm on.

    Raises:
        ListenError: it is not a listening stream socket, as far as the kernel reports that.
    """
    try:
        os.set_inheritable(fd, False)
        found = socket.socket(fileno=fd)
    except OSError as error:
        raise ListenError(f"descriptor {fd} is not a socket: {error.strerror}") from None
    if found.type != socket.SOCK_STREAM or not _may_listen(found):
        found.close()
        raise ListenError(f"descriptor {fd} is not a listening stream socket")
    if found.family in (socket.AF_INET, socket.AF_INET6):
        return socket.socket(found.family, socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=found.detach())
    return found


def _may_listen(stream: socket.socket) -> bool:
    """
    Return whether an inherited stream socket listens, as far as the kernel reports it.

    Platform limit: XNU has no getsockopt(SO_ACCEPTCONN) and returns ENOPROTOOPT (sogetoptlock, bsd/kern/uipc_socket.c
    of xnu-11417). There a connected socket is refused and the supervisor is trusted for the rest: a second listen(2)
    would replace its backlog, and on failure end the listening (solisten, the same file).
    """
    try:
        return bool(stream.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            return False
    try:
        stream.getpeername()
    except OSError:
        return True
    return False


class Notifier:
    """
    Report to systemd, by sd_notify(3), that the service is ready, and that it is alive.

    Args:
        environ: NOTIFY_SOCKET and WATCHDOG_USEC are removed from it, so that no child takes them for its own.
        alive: returns once the sampler has done the calls before this one.
    """

    def __init__(self, environ: MutableMapping[str, str], alive: Callable[[], Awaitable[None]]) -> None:
        self._alive = alive
        self._address = environ.pop("NOTIFY_SOCKET", "")
        usec, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", str(os.getpid()))
        # systemd restarts the service if it gets no message for so long; None: it has no watchdog.
        self._watchdog_s = int(usec) / 1e6 if usec.isdecimal() and _is_meant(pid) else None

    def send(self, message: str) -> None:
        """Send `message` to systemd; without systemd, or if the message cannot be sent, do nothing."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.connect(address)
            channel.send(message.encode())

    async def run(self, _: "Service") -> None:
        """
        Report that the service is ready, then that it is alive, three times per period of the watchdog.

        A kernel read that hangs stops the reports, although the event loop still answers.
        """
        self.send("READY=1")
        while self._watchdog_s is not None:
            await self._alive()
            self.send("WATCHDOG=1")
            await asyncio.sleep(self._watchdog_s / 3)
