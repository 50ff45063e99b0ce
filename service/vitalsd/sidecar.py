"""Listeners and the life of the service: bind, serve, end cleanly."""

import asyncio
import contextlib
import errno
import ipaddress
import logging
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

__all__ = ["DEFAULT_PORT", "PortInUse", "bind_tcp", "serve"]

DEFAULT_PORT = 9779
BACKLOG = 64
"""Kept small: without free descriptors asyncio retries the whole backlog at once, a traceback each."""


class PortInUse(OSError):
    """Somebody else listens there."""


def bind_tcp(host: str, port: int) -> socket.socket:
    """
    A listening TCP socket.

    `proto` is given because asyncio switches off Nagle's algorithm only for a listener that says
    TCP; without it every answer on a kept connection waits 40 ms for an acknowledgement.

    Raises:
        ValueError: `host` is not a loopback address.
        PortInUse: the port is taken.
        OSError: any other refusal.
    """
    address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    if not address.is_loopback:
        raise ValueError(f"{host} is not a loopback address; vitalsd answers on this machine only")
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((str(address), port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(error.errno, f"port {port} on {address} is in use") from None
        raise
    return listener


class _Server(uvicorn.Server):
    """uvicorn without its signal handling: that one kills the process again at the end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _server(app: FastAPI) -> _Server:
    return _Server(
        uvicorn.Config(
            app,
            http="h11",  # httptools takes two Host headers and 5 MB of head
            ws="none",
            loop="asyncio",
            lifespan="on",
            proxy_headers=False,
            server_header=False,
            access_log=False,
            log_config=None,
            backlog=BACKLOG,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=2,
            h11_max_incomplete_event_size=16384,
        )
    )


def serve(app: FastAPI, listeners: list[socket.socket], *, ready: Callable[[], None]) -> None:
    """
    Serve until SIGINT or SIGTERM; a second one ends at once, without waiting for open windows.

    Args:
        ready: called once, when requests are answered.
    """
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    asyncio.run(_serve(_server(app), listeners, ready))


async def _serve(server: _Server, listeners: list[socket.socket], ready: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()

    def stop() -> None:
        server.force_exit = server.should_exit
        server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    serving = asyncio.create_task(server.serve(sockets=listeners))
    while not server.started and not serving.done():
        await asyncio.sleep(0.005)
    if server.started:
        ready()
    await serving
