"""Run servers that misbehave, on real sockets."""

import json
import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

__all__ = ["FAULTS", "METRICS", "Behaviour", "Misbehaving", "answer", "drips", "floods", "hangs", "resets", "says"]

Behaviour = Callable[[socket.socket, threading.Event], None]
"""Function called with a connection, after its request has arrived, and with an event that ends the server."""


def answer(body: bytes, *, status: str = "200 OK", kind: str = "application/json", extra: str = "") -> bytes:
    """Return a well-formed answer."""
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{extra}\r\n"
    return head.encode() + body


METRICS = json.dumps(
    {
        "sample_window_ms": 10,
        "process": {"cpu_percent": 1.0, "rss_kb": 1, "vm_size_kb": 1, "uptime_secs": 1.0},
        "threads": [{"tid": 1, "name": "a", "cpu_percent": 0.0}],
        "platform": "linux",
    }
).encode()


def says(data: bytes) -> Behaviour:
    """Return a behaviour: send `data` and close."""
    return lambda connection, _: connection.sendall(data)


def hangs(after: bytes = b"") -> Behaviour:
    """Return a behaviour: send `after`, and then hang."""

    def behave(connection: socket.socket, over: threading.Event) -> None:
        connection.sendall(after)
        over.wait()

    return behave


def drips(data: bytes, then: bytes) -> Behaviour:
    """Return a behaviour: send `data`, and then `then` without end, one byte at a time."""

    def behave(connection: socket.socket, over: threading.Event) -> None:
        connection.sendall(data)
        while not over.wait(0.05):
            for i in range(len(then)):
                connection.sendall(then[i : i + 1])

    return behave


def floods(data: bytes, then: bytes) -> Behaviour:
    """Return a behaviour: send `data`, and then `then` without end, as fast as the client reads."""

    def behave(connection: socket.socket, over: threading.Event) -> None:
        connection.sendall(data)
        while not over.is_set():
            connection.sendall(then)

    return behave


def resets(connection: socket.socket, _: threading.Event) -> None:
    """Reset the connection."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"

FAULTS: dict[str, tuple[Behaviour, str]] = {
    "hung at the head": (hangs(), "sent no answer within"),
    "hung in the head": (hangs(b"HTTP/1.1 200 O"), "sent no answer within"),
    "hung in the body": (hangs(HEAD + b"Content-Length: 500\r\n\r\n{"), "had not sent all of its answer within"),
    "endless drip": (drips(HEAD + b"Content-Length: 500000\r\n\r\n", b" "), "had not sent all of its answer within"),
    "endless drip of head": (drips(b"HTTP/1.1 200 OK\r\n", b"A: b\r\n"), "within|does not speak HTTP"),
    "endless chunks": (
        floods(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1000\r\n" + b" " * 4096 + b"\r\n"),
        "sent more than",
    ),
    "huge body": (floods(HEAD + b"Content-Length: 99999999999\r\n\r\n", b" " * 65536), "sent more than"),
    "huge head": (floods(b"HTTP/1.1 200 OK\r\nA: ", b"b" * 4096), "does not speak HTTP"),
    "interim answers": (floods(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), "more than 8 interim responses"),
    "closed at once": (says(b""), "closed the connection|ended the connection"),
    "reset": (resets, "broke the connection|closed the connection"),
    "truncated": (says(answer(METRICS)[:-10]), "in the middle of its answer"),
    "garbage": (says(b"\x00\xff" * 500 + b"\r\n\r\n"), "does not speak HTTP"),
    "another protocol": (says(b"SSH-2.0-OpenSSH_9.6\r\n\r\n"), "does not speak HTTP"),
    "500": (
        says(answer(b'{"detail": "a bug"}', status="500 No", kind="application/problem+json")),
        "answered 500: a bug",
    ),
    "502 of a proxy": (says(answer(b"<html>", status="502 Bad Gateway", kind="text/html")), "answered 502"),
    "redirect": (says(answer(b"", status="307 Go", extra="Location: http://169.254.169.254/\r\n")), "answered 307"),
    "another service": (says(answer(b"<html>", kind="text/html")), "answered 200, which says nothing about metrics"),
    "no JSON": (says(answer(b"{")), "not a RuntimeMetrics"),
    "empty": (says(answer(b"")), "not a RuntimeMetrics"),
    "deep JSON": (says(answer(b"[" * 100_000)), "not a RuntimeMetrics"),
    "other JSON": (says(answer(b'{"status": "ok"}')), "not a RuntimeMetrics"),
    "no finite number": (says(answer(METRICS.replace(b"1.0", b"NaN"))), "not a RuntimeMetrics"),
    "null for a number": (says(answer(METRICS.replace(b"1.0", b"null"))), "not a RuntimeMetrics"),
    "control characters": (
        says(answer(b'{"platform":"linux","available":false,"reason":"\\u001b[31m\\n\\u202ered"}', status="410 Gone")),
        r"^\\x1b\[31m\\n\\u202ered$",
    ),
}
"""Faults of a sidecar by name: the behaviour, and a text that the reason must contain."""


class Misbehaving:
    """
    Serve on a free port, or on the Unix socket `path`, with the same behaviour for every connection.

    Args:
        behaviour: ``None``: accept no connection, with a full backlog.
        path: path of a Unix socket; ``None``: TCP on loopback.
    """

    def __init__(self, behaviour: Behaviour | None, path: Path | None = None) -> None:
        self._behaviour = behaviour
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._open: list[socket.socket] = []
        self.requests: list[bytes] = []
        """What was sent on each connection: one request."""
        if path is None:
            self._listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            self._listener.bind(("127.0.0.1", 0))
        else:
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._listener.bind(str(path))
        self._listener.listen(0 if behaviour is None else 32)
        self.address = self._listener.getsockname()
        if behaviour is None:
            self._fill()
        else:
            self._start(self._accept)

    @property
    def port(self) -> int:
        """Return the port of the listener."""
        return int(self.address[1])

    @property
    def url(self) -> str:
        """Return the URL of the server."""
        return f"http://127.0.0.1:{self.port}"

    def _fill(self) -> None:
        for _ in range(8):
            waiting = socket.socket(self._listener.family, socket.SOCK_STREAM)
            waiting.setblocking(False)
            with suppress(OSError):
                waiting.connect(self.address)
            self._open.append(waiting)

    def _start(self, work: Callable[[], None]) -> None:
        self._threads.append(threading.Thread(target=work, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._open.append(connection)
                self._start(lambda connection=connection: self._serve(connection))  # type: ignore[misc]

    def _serve(self, connection: socket.socket) -> None:
        assert self._behaviour is not None
        with suppress(OSError), connection:
            request = b""
            while b"\r\n\r\n" not in request and (data := connection.recv(65536)):
                request += data
            # To close with something unread would reset the connection.
            head, _, body = request.partition(b"\r\n\r\n")
            declared = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
            missing = int(declared[1]) - len(body) if declared else 0
            while missing > 0 and (data := connection.recv(65536)):
                request += data
                missing -= len(data)
            self.requests.append(request)
            self._behaviour(connection, self._over)

    def __enter__(self) -> "Misbehaving":
        """Return the running server."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the server and close its connections."""
        self._over.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in self._open:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        deadline = time.monotonic() + 5
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
