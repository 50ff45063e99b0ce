"""
Determine whether a client has taken an answer to its last byte.

A successful write does not prove it: the kernel holds the bytes for the client. So the sidecar shuts down its half of
the connection after the answer, and waits until the client closes the other half. If the client has read everything,
its kernel sends FIN; if it closed or died with unread bytes, its kernel sends RST (Linux: tcp_close() in
net/ipv4/tcp.c, unix_release_sock() in net/unix/af_unix.c). Platform limit: XNU may send FIN with unread bytes over TCP.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress

from vitalsd.contract.limits import CLOSE_S

__all__ = ["TAKEN", "OnTaken", "closed_after_reading"]

TAKEN = "vitalsd.taken"
"""Key in the ``extensions`` of an ASGI scope for an `OnTaken`."""

OnTaken = Callable[[Callable[[], Awaitable[None]]], None]
"""Function that registers a call for when the client has taken the answer; after it the connection closes."""


async def closed_after_reading(connection: socket.socket) -> bool:
    """
    Wait until the client closes `connection`, at most `CLOSE_S`; return whether it had read everything.

    Args:
        connection: non-blocking, after the kernel has taken the whole answer.
    """
    loop = asyncio.get_running_loop()
    with suppress(OSError, TimeoutError):
        connection.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(CLOSE_S):
            while await loop.sock_recv(connection, 4096):
                pass  # discard what a client sends after its request
        # A client that closed before the last bytes arrived sends FIN, and then RST for those bytes.
        return connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
    return False
