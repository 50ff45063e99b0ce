"""
Tell whether a client has taken an answer to its last byte.

That bytes left this process proves nothing: the kernel holds them for the client. So the sidecar ends its half of the
connection after the answer and waits for the client to close its own. A client that has read everything sends FIN; one
that closed or died with unread bytes makes its kernel send RST (on Linux tcp_close() in net/ipv4/tcp.c and
unix_release_sock() in net/unix/af_unix.c). Platform limit: XNU may send FIN with unread bytes over TCP.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress

from vitalsd.contract.limits import CLOSE_S

__all__ = ["TAKEN", "OnTaken", "closed_after_reading"]

TAKEN = "vitalsd.taken"
"""Key in the ``extensions`` of an ASGI scope: an `OnTaken`, if the server can tell."""

OnTaken = Callable[[Callable[[], Awaitable[None]]], None]
"""Register what is to be done once the client has taken the answer to this request; the connection is closed then."""


async def closed_after_reading(connection: socket.socket) -> bool:
    """
    Wait until the client closes `connection`; return whether it had read everything.

    Args:
        connection: non-blocking; the kernel has taken everything.
    """
    loop = asyncio.get_running_loop()
    with suppress(OSError, TimeoutError):
        connection.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(CLOSE_S):
            while await loop.sock_recv(connection, 4096):
                pass  # a client may send more than its request; it is not answered
        # A client that closed before the last bytes arrived has sent FIN, and then RST for those.
        return connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
    return False
