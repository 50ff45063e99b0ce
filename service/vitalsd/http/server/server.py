"""Run uvicorn inside a host process: no signal handlers, no log lines, no loop policy, a bounded shutdown."""

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable
from email.utils import formatdate
from functools import lru_cache, partial
from typing import cast

import uvicorn
from starlette.types import ASGIApp
from uvicorn.lifespan.on import LifespanOn
from uvicorn.server import ServerState

from vitalsd.contract.limits import OTHER_USERS_CONNECTIONS
from vitalsd.http.access.access_control import AccessControl
from vitalsd.http.access.peer import PeerUsers
from vitalsd.http.access.token_proof import TokenProof
from vitalsd.http.server.connection import ServerConnection
from vitalsd.http.server.connection_limits import ConnectionLimiter
from vitalsd.http.server.log_throttle import ThrottledLogger

__all__ = ["Server"]

QUEUE = 1024
"""Connections that the kernel completes in advance; with few, a client would try again only after a second."""
ACCEPTED_AT_A_TURN = 16
"""
asyncio uses its backlog for this as well. A connection that is closed for a new one keeps its descriptor for some turns
of the loop after the new one was accepted; when no descriptor is left, asyncio accepts nothing for a second.
"""
TURNS_TO_ACCEPT = 3
"""Of the event loop, until what asyncio has just accepted is a connection."""
SETTLE_S = 0.5
"""For the last answers to be sent, after access control has ended what was under way."""


class _State(ServerState):
    """Make the date header when it is needed; uvicorn would wake each second for it."""

    @property
    def default_headers(self) -> list[tuple[bytes, bytes]]:
        return [(b"date", _date(int(time.time())))]

    @default_headers.setter
    def default_headers(self, headers: list[tuple[bytes, bytes]]) -> None:
        """Do nothing: uvicorn sets an empty list."""


@lru_cache(maxsize=1)
def _date(unix_s: int) -> bytes:
    return formatdate(unix_s, usegmt=True).encode()


class _Config(uvicorn.Config):
    def configure_logging(self) -> None:
        """Do nothing: uvicorn's would change the levels and handlers of the host program."""

    def load(self) -> None:
        super().load()
        self.loaded_app = self.app  # uvicorn's would log each message if the host logs from level 5 on.


class _Lifespan(LifespanOn):
    """
    Log to `log` alone what fails at the start and at the end.

    uvicorn's logs each step to ``uvicorn.error``, a logger that the host may have for a server of its own.
    """

    def __init__(self, config: uvicorn.Config, log: ThrottledLogger) -> None:
        super().__init__(config)
        self.logger = log  # type: ignore[assignment]


class Server(uvicorn.Server):
    """
    Serve one application on sockets that listen already, until `stop`.

    uvicorn's loop wakes ten times a second to see whether it should end, and its shutdown waits for clients
    that do not read; both are replaced here.

    Args:
        app: the application.
        token: see `AccessControl`.
        grace_s: how long open windows may continue after `stop`.
        ready: called once requests are answered; an exception of it ends the server.
    """

    def __init__(self, app: ASGIApp, *, token: str | None, grace_s: float, ready: Callable[[], None]) -> None:
        self._ready = ready
        self._access = AccessControl(TokenProof(app, token=token), token=token)
        self._log = ThrottledLogger(logging.getLogger("vitalsd.http"))
        self._grace_s = grace_s
        self._stop = asyncio.Event()
        # On h11: httptools takes two Host headers and 5 MB of head.
        self._users = PeerUsers()
        limiters = {
            "unix": ConnectionLimiter.fitting(),
            "tcp": ConnectionLimiter.fitting(),
            "other": ConnectionLimiter(OTHER_USERS_CONNECTIONS),
        }
        protocol = partial(ServerConnection, limiters=limiters, users=self._users, log=self._log)
        super().__init__(
            _Config(
                self._access,
                http=cast("type[asyncio.Protocol]", protocol),
                ws="none",
                lifespan="on",
                workers=1,  # Otherwise WEB_CONCURRENCY decides.
                proxy_headers=False,
                forwarded_allow_ips=[],
                server_header=False,
                access_log=False,
                log_config=None,
                log_level=None,
                backlog=ACCEPTED_AT_A_TURN,
                timeout_keep_alive=60,  # `ServerConnection` closes it long before.
                h11_max_incomplete_event_size=16384,
            )
        )
        self.server_state = _State()

    def why_users_are_unknown(self, address: tuple[str, int]) -> str | None:
        """Return why the user of a connection to the listener at `address` cannot be determined; None if it can."""
        return self._users.why_not(address)

    def stop(self) -> None:
        """End the server; to be called on its event loop."""
        self.should_exit = True
        self._stop.set()

    def forget(self) -> None:
        """
        Give up, in a forked child, the connections that the parent is serving.

        They are replaced and not closed: the numbers stay taken, so whatever closes them later
        closes nothing else. The event loop is not touched, because the child shares its epoll set.
        """
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for connection in list(self.server_state.connections):
            with contextlib.suppress(OSError, AttributeError):
                os.dup2(null, connection.transport.get_extra_info("socket").fileno(), inheritable=False)
        self._users.forget(null)
        os.close(null)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """
        Serve until `stop`.

        uvicorn's would take over SIGINT and SIGTERM and raise them again at the end, and would log to
        ``uvicorn.error`` that the process of the host starts and ends.
        """
        try:
            self.config.load()
            self.lifespan = _Lifespan(self.config, self._log)
            await self.startup(sockets)
            if not self.should_exit:
                await self.main_loop()
            await self.shutdown(sockets)
        finally:
            self._users.close()

    # What `serve` calls

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(self._log.loop_failed)
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(QUEUE)

    async def main_loop(self) -> None:
        self._ready()
        await self._stop.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for listener in sockets or ():
            asyncio.get_running_loop().remove_reader(listener.fileno())
        for _ in range(TURNS_TO_ACCEPT):  # A closed server makes no connection of what it accepted, and closes none.
            await asyncio.sleep(0)
        for server in self.servers:
            server.close()
        for listener in sockets or ():
            listener.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        await self._settled(self._grace_s)
        self._access.close()
        await self._settled(SETTLE_S)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await self.lifespan.shutdown()

    async def _settled(self, timeout_s: float) -> None:
        """Wait until every request is answered and every connection closed, for up to `timeout_s`."""
        loop = asyncio.get_running_loop()
        deadline, pause_s = loop.time() + timeout_s, 0.001
        state = self.server_state
        while (state.connections or state.tasks) and loop.time() < deadline:
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.02)
