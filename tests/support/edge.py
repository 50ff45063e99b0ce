"""Test the HTTP server from outside: any ASGI application behind the real server, and raw bytes as requests."""

import asyncio
import http.client
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from vitalsd.contract.limits import STREAM_S
from vitalsd.http.app import create_app
from vitalsd.sampling.sampler import Sampler
from vitalsd.sampling.target_pool import Targets
from vitalsd.sidecar.listeners import listen
from vitalsd.sidecar.service import Service
from vitalsd.sources import list_processes, open_source

__all__ = ["Counted", "Edge", "Reply", "dial", "exchange", "get", "whole_app"]


@dataclass(frozen=True)
class Reply:
    """Hold an answer; `status` 0 is a connection that was closed without one."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        """Return the value of a header, None if it is missing."""
        return next((value for each, value in self.headers if each.lower() == name), None)


NOTHING = Reply(0, [], b"")


def dial(where: str, timeout: float = 20) -> socket.socket:
    """Return a connection to a URL, or to the path of a Unix socket."""
    if not where.startswith("http://"):
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(timeout)
        connection.connect(where)
        return connection
    host, _, port = where.removeprefix("http://").rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), timeout)


def exchange(where: str, content: bytes, method: str = "GET") -> Reply:
    """Send exactly these bytes on a new connection, and read one answer."""
    with dial(where) as connection:
        try:
            connection.sendall(content)
            return read_reply(connection, method)
        except (ConnectionResetError, BrokenPipeError):
            return NOTHING


def read_reply(connection: socket.socket, method: str = "GET") -> Reply:
    """Read one answer from a connection."""
    answer = http.client.HTTPResponse(connection, method=method)
    try:
        answer.begin()
        return Reply(answer.status, answer.getheaders(), answer.read())
    except (http.client.BadStatusLine, ConnectionResetError):
        return NOTHING
    finally:
        answer.close()


def get(where: str, path: str = "/healthz", *headers: str, host: str | None = None, method: str = "GET") -> Reply:
    """Send a request with these header lines, and the right Host unless `host` is given."""
    right = where.removeprefix("http://") if where.startswith("http://") else "localhost"
    lines = [f"{method} {path} HTTP/1.1", f"Host: {right if host is None else host}", *headers, "Connection: close"]
    return exchange(where, "\r\n".join([*lines, "", ""]).encode("latin-1"), method)


class Counted:
    """Wrap an application, and count the requests that reach it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.reached: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count the request, and pass it to the application."""
        if scope["type"] == "http":
            self.reached.append(f"{scope['method']} {scope['path']}")
        await self._app(scope, receive, send)


def whole_app(*, stream_s: float = STREAM_S) -> ASGIApp:
    """Return the application of ``vitalsd serve`` over this process, without a recorder."""
    return create_app(Targets(Sampler(open_source), open_source), list_processes, stream_s=stream_s)


class Edge:
    """Serve `app` with the real listeners and server on a thread; a context manager that ends it."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str | None = None,
        directory: Path | None = None,
        host: str = "127.0.0.1",
        adopted: Callable[[], Any] | None = None,
    ) -> None:
        listeners = adopted() if adopted else listen(host=host, port=0, uds=directory and directory / "a.sock")
        self._sidecar = Service(app, listeners, token=token, grace_s=0.1)
        self._started: Future[asyncio.AbstractEventLoop] = Future()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self._loop = self._started.result(10)
        self.url = self._sidecar.endpoint.url or ""
        self.socket = self._sidecar.endpoint.socket or ""

    @property
    def answered(self) -> int:
        """Return the number of requests that were answered or refused."""
        assert self._sidecar._server is not None
        return self._sidecar._server.server_state.total_requests

    def _run(self) -> None:
        def ready() -> None:
            self._started.set_result(asyncio.get_running_loop())

        try:
            with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
                runner.run(self._sidecar.run(ready))
        except BaseException as error:
            if self._started.done():
                raise
            self._started.set_exception(error)

    def __enter__(self) -> "Edge":
        """Return the running server."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the server and join its thread."""
        self._loop.call_soon_threadsafe(self._sidecar.stop)
        self._thread.join(10)
        assert not self._thread.is_alive()
