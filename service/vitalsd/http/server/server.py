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
"""Backlog of each listener, connections: if it is full, a client tries again only after a second."""
ACCEPTED_AT_A_TURN = 16
"""
Connections to accept at one turn of the event loop; asyncio uses its backlog for it. An evicted connection keeps its
descriptor for some turns after the new one was accepted; without a free descriptor asyncio accepts nothing for 1 s.
"""
TURNS_TO_ACCEPT = 3
"""Turns of the event loop until an accepted socket is a connection of the server."""
SETTLE_S = 0.5
"""Time to send the last answers, s, after access control has ended the requests that were being served."""


class _State(ServerState):
    """Make the date header for each answer; uvicorn would wake up every second for it."""

    @property
    def default_headers(self) -> list[tuple[bytes, bytes]]:
        return [(b"date", _date(int(time.time())))]

    @default_headers.setter
    def default_headers(self, headers: list[tuple[bytes, bytes]]) -> None:
        """Do nothing: uvicorn assigns an empty list."""


@lru_cache(maxsize=1)
def _date(unix_s: int) -> bytes:
    return formatdate(unix_s, usegmt=True).encode()


class _Config(uvicorn.Config):
    def configure_logging(self) -> None:
        """Do nothing: uvicorn's would change the levels and handlers of the host program."""

    def load(self) -> None:
        super().load()
        self.loaded_app = self.app  # Without the wrapper of uvicorn that logs each message if the level is 5 or less.


class _Lifespan(LifespanOn):
    """
    Log failures of the start and the end of the application, and only to `log`.

    uvicorn logs each step to ``uvicorn.error``, which the host program may use for a server of its own.
    """

    def __init__(self, config: uvicorn.Config, log: ThrottledLogger) -> None:
        super().__init__(config)
        self.logger = log  # type: ignore[assignment]


class Server(uvicorn.Server):
    """
    Serve one application on listening sockets, until `stop`.

    The main loop of uvicorn wakes up ten times a second to check whether it should end, and its shutdown waits for
    clients that do not read; both are replaced here.

    Args:
        app: the application.
        token: see `AccessControl`.
        grace_s: time that open requests, as for a window, have after `stop`, s.
        ready: called when requests are answered; its exception ends the server.
    """

    def __init__(self, app: ASGIApp, *, token: str | None, grace_s: float, ready: Callable[[], None]) -> None:
        self._ready = ready
        self._access = AccessControl(TokenProof(app, token=token), token=token)
        self._log = ThrottledLogger(logging.getLogger("vitalsd.http"))
        self._grace_s = grace_s
        self._stop = asyncio.Event()
        self._users = PeerUsers()
        limiters = {
            "unix": ConnectionLimiter.fitting(),
            "tcp": ConnectionLimiter.fitting(),
            "other": ConnectionLimiter(OTHER_USERS_CONNECTIONS),
        }
        # h11, because httptools accepts two Host headers and a head of 5 MB.
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
                timeout_keep_alive=60,  # `ServerConnection` closes it long before that.
                h11_max_incomplete_event_size=16384,
            )
        )
        self.server_state = _State()

    def why_users_are_unknown(self, address: tuple[str, int]) -> str | None:
        """Return why the user of a connection to the listener at `address` cannot be determined; None if it can."""
        return self._users.why_not(address)

    def stop(self) -> None:
        """End the server. Call it on its event loop."""
        self.should_exit = True
        self._stop.set()

    def close_in_child(self) -> None:
        """
        Replace the connections that the parent serves by /dev/null; called in a forked child.

        The descriptors are not closed, so that a later close of the same numbers closes no other file. The event loop
        is not used, because the child shares its epoll set.
        """
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for connection in list(self.server_state.connections):
            with contextlib.suppress(OSError, AttributeError):
                os.dup2(null, connection.transport.get_extra_info("socket").fileno(), inheritable=False)
        self._users.close_in_child(null)
        os.close(null)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """
        Serve until `stop`.

        The method of uvicorn would handle SIGINT and SIGTERM and raise them again at the end, and would log the start
        and the end of the host's process to ``uvicorn.error``.
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

    # Steps of `serve`

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application and the listeners."""
        asyncio.get_running_loop().set_exception_handler(self._log.loop_failed)
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(QUEUE)

    async def main_loop(self) -> None:
        """Call `ready`, and wait for `stop`."""
        self._ready()
        await self._stop.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, wait for open requests at most the grace period, and close all connections."""
        for listener in sockets or ():
            asyncio.get_running_loop().remove_reader(listener.fileno())
        for _ in range(TURNS_TO_ACCEPT):  # A closed server would leave accepted sockets open, without a connection.
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
        """Wait until every request is answered and every connection is closed, at most `timeout_s`."""
        loop = asyncio.get_running_loop()
        deadline, pause_s = loop.time() + timeout_s, 0.001
        state = self.server_state
        while (state.connections or state.tasks) and loop.time() < deadline:
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.02)
