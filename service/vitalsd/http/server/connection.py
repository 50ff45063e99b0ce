"""
Serve one client connection: the h11 protocol of uvicorn with deadlines, backpressure and a limit of memory.

uvicorn has no timeout for a request that does not arrive whole, nor for an answer that the client does not read, and
its limit of concurrency answers 503 to new clients while others are idle. ASGI middleware runs too late to correct
that. For each part of uvicorn that this module relies on, tests/http/test_connection.py has a test.
"""

import asyncio
import http
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

import h11
from fastapi import Response
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from vitalsd.admission import OWNER, Peer
from vitalsd.contract.limits import CLOSING_CONNECTIONS, REQUEST_S, WRITE_BYTES, WRITE_S
from vitalsd.discovery.unix_socket import peer_uid
from vitalsd.http.access.access_control import protected
from vitalsd.http.access.peer import PEER, PeerUsers, is_open
from vitalsd.http.parameters import READING
from vitalsd.http.responses import problem, truncate_for_display
from vitalsd.http.server.connection_limits import ConnectionLimiter
from vitalsd.http.server.delivery import TAKEN, closed_after_reading
from vitalsd.http.server.log_throttle import ThrottledLogger

__all__ = ["ServerConnection"]

PIECE_BYTES = 64 * 1024
"""Bytes of an answer to write at once: the rest is not copied while a slow client does not read."""


class UndeliveredError(Exception):
    """Report to the application that its answer does not reach the client, or not whole."""


class ServerConnection(H11Protocol):
    """
    Serve one connection of a client, which has 5 s for each request and must read the answers.

    It holds one answer at a time, and writes the next piece of it when the client has taken the last one. A large
    answer that does not fit into the `SendBudget` becomes a 503. If an answer does not reach the client,
    `UndeliveredError` is raised to the application, so that no step that depends on the delivery is made.

    Over the Unix socket only this user and root are served, whatever the mode of its file.

    There is no access log: uvicorn writes one if the logger ``uvicorn.access`` has handlers, as in a host program that
    uvicorn serves, and its switch would silence that logger for the host program too.

    Args:
        limiters: the limiter of connections of each `Peer.kind`.
        users: determines the users at the other end of TCP connections.
        log: logs bugs in the application.
    """

    def __init__(
        self,
        *args: Any,
        limiters: Mapping[str, ConnectionLimiter],
        users: PeerUsers,
        log: ThrottledLogger,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.access_log = False
        self.logger = log  # type: ignore[assignment]
        self._application, self.app = self.app, self._answer
        self._limiters, self._users = limiters, users
        self._limiter = limiters["other"]
        self._peer = Peer("other")
        self._undetermined: socket.socket | None = None
        """The connection, if the kernel finds no socket at its other end; ``None``: the peer is determined."""
        self._reading: asyncio.Task[Any] | None = None
        """Task of a GET or HEAD, which is cancelled when the client disconnects; ``None``: none runs."""
        self._left = False
        self._request_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._unsent = 0
        self._lost: asyncio.Future[bool] | None = None
        """Set at the loss of the connection: whether the kernel had taken all bytes before it."""

    # Callbacks of asyncio

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Determine the user of the client, and admit or refuse the connection."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # So `drain` waits until the kernel has taken everything.
        peer: socket.socket = transport.get_extra_info("socket")
        if peer.family == socket.AF_UNIX:
            self._peer, self._limiter = OWNER, self._limiters["unix"]
            if not _is_owner(peer):
                self._refuse(problem("another_user", "this socket is for the user it belongs to"))
                return
        elif self.client is None:
            # The client reset it before it was accepted, but the bytes that it sent can still be read. Without the
            # address of its peer it would count as a connection of the Unix socket, which needs no token.
            transport.abort()
            return
        else:
            found = self._users.peer(self.client, peer.getsockname()[:2])
            if found is None:
                found, self._undetermined = Peer("tcp"), peer
            self._peer, self._limiter = found, self._limiters[found.kind]
        if self._limiter.acquire(self, self._peer):
            self._watch()
        else:
            detail = f"{self._limiter.limit} connections are being served already"
            self._refuse(problem("full", detail, headers={"Retry-After": "1"}))

    def data_received(self, data: bytes) -> None:
        """Parse bytes of the client, and start or cancel the deadline of its request."""
        super().data_received(data)
        self._watch()

    def pause_writing(self) -> None:
        """Start the deadline of a client that does not read its answer."""
        super().pause_writing()
        self._unsent = self.transport.get_write_buffer_size()
        self._write_timer = self.loop.call_later(WRITE_S, self._not_reading)

    def resume_writing(self) -> None:
        """Cancel the deadline of a client that did not read its answer."""
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Release the connection, and cancel its timers and the task of a GET."""
        if self._lost is not None and not self._lost.done():
            self._lost.set_result(exc is None and not self.flow.write_paused)
        self._limiter.release(self)
        if self._reading is not None and not self.cycle.response_complete:
            self._left = True
            self._reading.cancel()
        self.app = self._application  # Otherwise this would be a cycle, which waits for the garbage collector.
        for timer in (self._request_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    # Callbacks of uvicorn

    def on_response_complete(self) -> None:
        """Start the deadline of the next request, if the client keeps the connection."""
        super().on_response_complete()
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """Refuse a request that h11 cannot parse, as a problem."""
        error = sys.exception()  # uvicorn calls this while it handles the exception of h11.
        detail = truncate_for_display(error or msg, 100)
        too_large = getattr(error, "error_status_hint", 400) == 431
        self._refuse(problem("head_too_large" if too_large else "bad_request", detail))

    def shutdown(self) -> None:
        """Close the connection after its answer, or at once if it is idle."""
        if not self.transport.is_closing():  # h11 accepts no other event after that.
            super().shutdown()

    def _unsupported_upgrade_warning(self) -> None:
        """Do nothing: a request for another protocol is answered in this one (RFC 9110 section 7.8)."""

    # Answers

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application, in place of uvicorn, and send its answer with backpressure."""
        if self.flow.write_paused:
            await self.flow.drain()  # A client that pipelines must take one answer before the next one is made.
            if self.transport.is_closing():
                return
        held: Message | None = None
        taken: list[Callable[[], Awaitable[None]]] = []
        scope["extensions"] = {**scope.get("extensions", {}), TAKEN: taken.append}
        if self._undetermined is not None and not is_open(self._undetermined):
            # A client may close its end before the kernel is asked, and its request can still be read.
            self._peer = Peer("other")
        scope[PEER] = self._peer

        async def deliver(message: Message) -> None:
            nonlocal held
            if message["type"] == "http.response.start":
                if taken:
                    message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
                    self._after_delivery(taken)
                if _length(message) > PIECE_BYTES:
                    held = message  # Until the body is counted in the budget.
                    return
            elif held is not None:
                start, held = held, None
                await self._send_large(start, message, send)
                return
            elif len(message.get("body", b"")) > PIECE_BYTES:  # An event of a stream.
                await self._send_in_pieces(message, send)
                return
            await send(message)

        if scope["method"] in READING:
            self._reading = asyncio.current_task()
        try:
            await self._application(scope, receive, deliver)
        except UndeliveredError:
            pass
        except asyncio.CancelledError:
            if not self._left:
                raise
        finally:
            self._reading = None

    def _after_delivery(self, taken: Sequence[Callable[[], Awaitable[None]]]) -> None:
        """Make the calls in `taken` when the client has taken the whole answer."""
        limiter, cycle, lost = self._limiter, self.cycle, self.loop.create_future()
        if limiter.closing >= CLOSING_CONNECTIONS:
            return
        # uvicorn closes the transport after the answer; the duplicate descriptor keeps the connection.
        try:
            connection = self.transport.get_extra_info("socket").dup()
        except OSError:  # The client has closed its side, so uvicorn has closed the connection.
            return
        self._lost = lost
        limiter.closing += 1

        async def wait() -> None:
            try:
                with closing(connection):
                    if await lost and cycle.response_complete and await closed_after_reading(connection):
                        for call in taken:
                            await call()
            finally:
                limiter.closing -= 1

        task = self.loop.create_task(wait())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _send_large(self, start: Message, message: Message, send: Send) -> None:
        """
        Send a large answer, or refuse it if the budget is used up.

        Raises:
            UndeliveredError: it is refused, or the client does not take all of it in time.
        """
        body, budget = message["body"], self._limiter.send_budget
        if not budget.acquire(body):
            detail = f"{budget.limit >> 20} MiB of answers wait already for clients that take them"
            refusal = problem("unread", detail, headers={"Retry-After": "1"})
            await send({**start, "status": refusal.status_code, "headers": protected(refusal.raw_headers)})
            await send({"type": "http.response.body", "body": refusal.body})
            raise UndeliveredError
        try:
            async with asyncio.timeout(budget.seconds(body)):
                await send(start)
                await self._send_in_pieces(message, send, large=True)
        except BaseException as error:
            # The client can detect that the answer is not whole: its length was declared.
            self.cycle.disconnected = True
            self.transport.abort()
            if isinstance(error, TimeoutError):
                raise UndeliveredError from None
            raise
        finally:
            budget.release(body)

    async def _send_in_pieces(self, message: Message, send: Send, *, large: bool = False) -> None:
        """
        Send a body in pieces, each when the client has taken the one before.

        Raises:
            UndeliveredError: the client of a `large` answer disconnected before the last piece.
        """
        body = message["body"]
        last = (len(body) - 1) // PIECE_BYTES * PIECE_BYTES
        for begin in range(0, last, PIECE_BYTES):
            await send({**message, "body": body[begin : begin + PIECE_BYTES], "more_body": True})
            if large and self.transport.is_closing():
                raise UndeliveredError
        await send({**message, "body": body[last:]})

    # Deadlines

    def _watch(self) -> None:
        """Start the deadline of the request if the connection waits for one, else cancel it."""
        idle = self.conn.their_state in (h11.IDLE, h11.SEND_BODY) and not self.transport.is_closing()
        if idle and self._request_timer is None:
            self._request_timer = self.loop.call_later(REQUEST_S, self._overdue)
        elif not idle and self._request_timer is not None:
            self._request_timer.cancel()
            self._request_timer = None
        self._limiter.set_idle(self, idle)

    def _overdue(self) -> None:
        """Close an idle connection, or refuse a request that did not arrive whole within `REQUEST_S`."""
        if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            self.transport.close()  # There is no request to answer.
        else:
            self._refuse(problem("too_slow", f"a request has {REQUEST_S:g} s to arrive whole"))

    def _not_reading(self) -> None:
        """Abort the connection if its client took fewer than `WRITE_BYTES` in `WRITE_S`."""
        unsent = self.transport.get_write_buffer_size()
        if unsent > self._unsent - WRITE_BYTES:
            self.transport.abort()
        else:
            self._unsent = unsent
            self._write_timer = self.loop.call_later(WRITE_S, self._not_reading)

    def _refuse(self, refusal: Response) -> None:
        """Send a refusal, unless the application has begun its answer, and close the connection."""
        if self.transport.is_closing():
            return
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            head = h11.Response(
                status_code=refusal.status_code,
                headers=[
                    *self.server_state.default_headers,
                    *protected(refusal.raw_headers),
                    (b"connection", b"close"),
                ],
                reason=http.HTTPStatus(refusal.status_code).phrase.encode(),
            )
            # In the state IDLE the request is not whole yet, and `scope` is that of the previous request.
            answers_head = self.conn.our_state is h11.SEND_RESPONSE and self.scope["method"] == "HEAD"
            body = b"" if answers_head else bytes(refusal.body)
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None and not self.cycle.response_complete:  # type: ignore[redundant-expr]
            # The application may still wait for the body: signal to it that the client has disconnected.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()


def _length(start: Message) -> int:
    """Return the declared length of a body, bytes; 0 if none is declared, as for a stream."""
    return next((int(value) for name, value in start["headers"] if name == b"content-length"), 0)


def _is_owner(peer: socket.socket) -> bool:
    """Return whether the client of a Unix socket is this user or root."""
    try:
        return peer_uid(peer) in (0, os.geteuid())
    except OSError:
        return False
