"""
Send HTTP requests to a sidecar on one connection, with one deadline.

This module does not use httpx, which has no deadline for a whole request, takes proxies and certificates from the
environment, and does not report the user at the other end of a Unix socket. h11 parses the answers; the timeout of each
operation of the socket is the time that remains.
"""

import errno
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType

import h11

from vitalsd.discovery.unix_socket import direct_socket, peer_uid
from vitalsd.text import one_line

__all__ = ["Answer", "Connection", "ExchangeError"]

MAX_HEAD_BYTES = 16 * 1024
"""Longest head of an answer, bytes."""
MAX_INTERIM = 8
"""Interim answers, such as ``100 Continue``, that are accepted before the answer; more would only delay it."""
READ_BYTES = 65536
"""Bytes of one recv(2)."""
RETRY_AFTER = re.compile(rb"[0-9]{1,5}")


class ExchangeError(Exception):
    """
    The request got no complete answer; ``str(error)`` states the reason.

    Args:
        reason: may quote bytes that the server sent; it is escaped and cut.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(one_line(reason))


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer."""

    status: int
    content_type: str
    body: bytes
    retry_after_s: int | None = None
    """Whole seconds of the header ``Retry-After``; ``None``: there is no such header, or it has a date."""


class Connection:
    """
    A connection to a Unix socket, or to an IP address over TCP; closed with the context.

    Args:
        place: path of the socket, or (address, port). A host name is not resolved, because that has no deadline.
        deadline: monotonic time, s, at which every operation fails.
        connect_s: time limit for connecting, s.

    Raises:
        ExchangeError: no connection was accepted, or the socket belongs to another user.
    """

    def __init__(self, place: str | tuple[str, int], deadline: float, *, connect_s: float = 2.0) -> None:
        self._deadline = deadline
        self._begun = time.monotonic()
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
        if isinstance(place, str):
            self.place, self._host = place, "localhost"
            self._socket = direct_socket(socket.AF_UNIX)
        else:
            address, port = place
            v6 = ":" in address
            self.place = self._host = f"[{address}]:{port}" if v6 else f"{address}:{port}"
            self._socket = direct_socket(socket.AF_INET6 if v6 else socket.AF_INET)
        try:
            self._connect(place, min(deadline, self._begun + connect_s))
            if isinstance(place, str):
                self._check_owner()
        except BaseException:
            self._socket.close()
            raise

    def _connect(self, place: str | tuple[str, int], deadline: float) -> None:
        while True:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise ExchangeError(f"{self.place} did not accept a connection within {self._elapsed()}")
            self._socket.settimeout(remaining)
            try:
                self._socket.connect(place)
                return
            except TimeoutError:
                continue
            except BlockingIOError:
                time.sleep(min(0.01, remaining))  # Linux: the backlog of a Unix socket is full
            except OSError as error:
                raise ExchangeError(f"cannot connect to {self.place}: {error.strerror or error}") from None

    def _check_owner(self) -> None:
        """Accept a socket of this user or of root: launchd listens as root, and root can read the target anyway."""
        try:
            uid = peer_uid(self._socket)
        except OSError as error:
            reason = errno.errorcode.get(error.errno or 0)
            raise ExchangeError(f"the owner of the socket {self.place} is not known: {reason}") from None
        if uid not in (0, os.geteuid()):
            raise ExchangeError(f"{self.place} is served by user {uid}, not by you; nothing was asked there")

    def request(
        self,
        target: str,
        *,
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        max_bytes: int,
    ) -> Answer:
        """
        Send one request and read its complete answer; redirects are not followed.

        Args:
            target: path and query.
            method: of HTTP.
            headers: added to the default ones.
            body: sent with every method but GET.
            max_bytes: longest accepted body of the answer.

        Raises:
            ExchangeError: no complete, well-formed answer arrived before the deadline.
        """
        fields = {"Host": self._host, "Accept": "application/json", **(headers or {})}
        if method != "GET":
            fields["Content-Length"] = str(len(body))
        with self._failures():
            head = self._http.send(h11.Request(method=method, target=target, headers=list(fields.items())))
            data = self._http.send(h11.Data(data=body)) if body else None
            self._send((head or b"") + (data or b"") + (self._http.send(h11.EndOfMessage()) or b""))
            answer = self._receive(max_bytes)
            if self.is_reusable:
                self._http.start_next_cycle()
            return answer

    @property
    def is_reusable(self) -> bool:
        """Whether another request can be sent on this connection."""
        return {self._http.our_state, self._http.their_state} <= {h11.IDLE, h11.DONE}

    def _receive(self, max_bytes: int) -> Answer:
        head: h11.Response | None = None
        body = bytearray()
        interim = 0
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                self._arm("sent no answer" if head is None else "had not sent all of its answer")
                data = self._socket.recv(READ_BYTES)
                if not data and head is None:
                    raise ExchangeError(f"{self.place} closed the connection without an answer")
                self._http.receive_data(data)
            elif isinstance(event, h11.InformationalResponse):
                interim += 1
                if interim > MAX_INTERIM:
                    raise ExchangeError(f"{self.place} sent more than {MAX_INTERIM} interim responses (status 1xx)")
            elif isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > max_bytes:
                    raise ExchangeError(f"{self.place} sent more than {max_bytes} bytes")
            elif isinstance(event, h11.EndOfMessage) and head is not None:
                headers = dict(head.headers)
                found = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip()
                after = RETRY_AFTER.fullmatch(headers.get(b"retry-after", b""))
                return Answer(head.status_code, found, bytes(body), int(after[0]) if after else None)
            else:
                raise ExchangeError(f"{self.place} answered out of turn")

    def _send(self, data: bytes) -> None:
        self._arm("took no request")
        with suppress(BrokenPipeError):  # A server that refuses the request may have answered before it read all of it.
            self._socket.sendall(data)

    def _arm(self, complaint: str) -> None:
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise ExchangeError(f"{self.place} {complaint} within {self._elapsed()}")
        self._complaint = complaint
        self._socket.settimeout(remaining)

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            raise ExchangeError(f"{self.place} {self._complaint} within {self._elapsed()}") from None
        except OSError as error:
            raise ExchangeError(f"{self.place} broke the connection: {error.strerror or error}") from None
        except h11.RemoteProtocolError as error:
            cut = "without sending complete" in str(error)
            what = "closed the connection in the middle of its answer" if cut else "does not speak HTTP"
            raise ExchangeError(f"{self.place} {what}: {error}") from None
        except h11.LocalProtocolError as error:
            raise ExchangeError(f"{self.place} ended the connection too early: {error}") from None

    def _elapsed(self) -> str:
        return f"{time.monotonic() - self._begun:.1f} s"

    def close(self) -> None:
        """Close the connection. A second call does nothing."""
        self._socket.close()

    def __enter__(self) -> "Connection":
        """Return this connection, which is connected already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connection."""
        self.close()
