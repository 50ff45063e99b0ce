"""
Make one attempt to send one report: multipart over httpx, with a total deadline; without a receipt it has failed.

httpx limits the time of each read and write but not their number, so a server that sends one byte at a time would keep
an attempt without end. The attempt runs on a thread of its own; at the deadline the caller shuts down its socket.

The transport is used without `httpx.Client`, which would log a line with the URL for every request to the log of the
host program, at level INFO.
"""

import email.utils
import json
import socket as sockets
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, cast
from urllib.parse import urlsplit

from vitalsd_client.daemon_call import Call
from vitalsd_client.redaction import redact_host_details
from vitalsd_client.upload_tls import explain_distrust, tls_context

if TYPE_CHECKING:
    import httpx

__all__ = [
    "Progress",
    "UploadFailure",
    "UploadReceipt",
    "UploadRequest",
    "UploadResult",
    "send",
]

Progress = Callable[[int, int], None]
"""Function called with the bytes of the report sent so far, and its size."""

ATTEMPT_S = 120.0
"""Default time limit for one whole attempt, s."""
CONNECT_S, IDLE_S = 5.0, 30.0
"""Time limits of an attempt to connect, and for each read and write, s."""
MAX_RECEIPT_BYTES = 64 * 1024
"""Limit for the body of a receipt, bytes."""
MAX_RETRY_AFTER_S = 24 * 3600.0
"""Longest delay that a server can ask for by ``Retry-After``, s."""
RETRIED = frozenset((408, 425, 429))
"""Statuses below 500 after which the report is sent again: timeout, too early, too many requests."""


@dataclass(frozen=True, slots=True)
class UploadRequest:
    """Describe the report to send."""

    report_id: str
    size: int
    sha256: str
    file: BinaryIO
    """The zip, positioned at its start."""


@dataclass(frozen=True, slots=True)
class UploadReceipt:
    """State that the server has stored the report: its answer contained the id and the hash."""

    number: str


@dataclass(frozen=True, slots=True)
class UploadFailure:
    """State that an attempt has failed: the server does not have the report, or has not confirmed it."""

    reason: str
    final: bool
    """Whether a further attempt would fail for the same reason."""
    retry_after_s: float = 0.0
    """Delay that the server asks for before the next attempt, s; 0: none."""


UploadResult = UploadReceipt | UploadFailure


def send(
    url: str,
    request: UploadRequest,
    *,
    attempt_s: float = ATTEMPT_S,
    proxy: str | None = None,
    authorities: str | None = None,
    progress: Progress | None = None,
) -> UploadResult:
    """
    Send a report once; return an `UploadFailure`, not an exception, for every error of the network and of the server.

    Args:
        url: URL that `check_url` has accepted.
        request: the report; its file is read on another thread.
        attempt_s: time limit for the whole attempt, s.
        proxy: URL of a proxy; the proxies of the environment are not used.
        authorities: certificates in PEM form, see `read_ca_file`, to trust besides those of the system.
        progress: called on another thread.
    """
    attempt = _Attempt(url, request, time.monotonic() + attempt_s, proxy, authorities, progress)
    try:
        call = Call(attempt.run)
    except RuntimeError as error:
        return UploadFailure(f"no thread can be started: {error}", final=False)
    if not call.wait(attempt_s):
        attempt.abort()
        # Looking up a name cannot be interrupted; what comes after it is.
        if not call.wait(1.0):
            return UploadFailure(f"no answer within {attempt_s:g} s", final=False)
    try:
        return call.result()
    except _AbortedError:
        return UploadFailure(f"no answer within {attempt_s:g} s", final=False)


class _AbortedError(Exception):
    """The deadline has passed."""


class _Attempt:
    def __init__(
        self,
        url: str,
        request: UploadRequest,
        deadline: float,
        proxy: str | None,
        authorities: str | None,
        progress: Progress | None,
    ) -> None:
        self._url, self._request, self._deadline = url, request, deadline
        self._proxy, self._authorities, self._progress = proxy, authorities, progress
        self._lock = threading.Lock()
        self._socket: sockets.socket | None = None
        self._aborted = False

    def abort(self) -> None:
        """Shut down the socket, so that the running call on the other thread fails at once."""
        with self._lock:
            self._aborted = True
            if self._socket is not None:
                with suppress(OSError):
                    sockets.socket.shutdown(self._socket, sockets.SHUT_RDWR)

    def run(self) -> UploadResult:
        import httpx  # only here: to keep a report it is not needed, and its import is slow

        try:
            request = httpx.Request(
                "POST",
                self._url,
                files={
                    "report": (f"{self._request.report_id}.zip", cast(BinaryIO, _ProgressFile(self)), "application/zip")
                },
                headers={
                    "Idempotency-Key": self._request.report_id,
                    "X-Content-SHA256": self._request.sha256,
                    "Accept": "application/json",
                    "Accept-Encoding": "identity",
                    # A fixed boundary: every attempt sends the same bytes.
                    "Content-Type": f"multipart/form-data; boundary={self._request.report_id}",
                    "User-Agent": "vitalsd",
                },
                extensions={
                    "timeout": httpx.Timeout(IDLE_S, connect=CONNECT_S, pool=CONNECT_S).as_dict(),
                    "trace": self._trace,
                },
            )
            with self._transport() as transport, closing(transport.handle_request(request)) as answer:
                return self._result_of(answer)
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            return UploadFailure(redact_host_details(str(error)), final=True)
        except (httpx.HTTPError, httpx.StreamError, OSError) as error:
            self.check()
            return UploadFailure(
                redact_host_details(explain_distrust(error) or f"{type(error).__name__}: {error}"), final=False
            )
        except ImportError as error:
            return UploadFailure(
                redact_host_details(f"a Python package that the upload needs does not load: {error}"), final=False
            )

    def _transport(self) -> "httpx.HTTPTransport":
        """
        Return a connection to the server or the proxy, not opened yet.

        Raises:
            OSError: the certificates of the system cannot be read.
            ImportError: truststore, or what httpx needs for a SOCKS proxy, is not installed.
        """
        import httpx

        proxy = None if self._proxy is None else httpx.Proxy(self._proxy)
        tls_to_proxy = proxy is not None and proxy.url.scheme == "https"
        if urlsplit(self._url).scheme != "https" and not tls_to_proxy:
            # Making a context reads all certificates of the system, which plain http does not need.
            return httpx.HTTPTransport(verify=False, trust_env=False, proxy=proxy)
        context = tls_context(self._authorities)
        if tls_to_proxy:
            # By default httpcore makes a context that trusts certifi, and writes keys to SSLKEYLOGFILE.
            proxy = httpx.Proxy(cast(str, self._proxy), ssl_context=context)
        return httpx.HTTPTransport(verify=context, trust_env=False, proxy=proxy)

    def check(self) -> None:
        """Raise `_AbortedError` if the deadline has passed."""
        if self._aborted or time.monotonic() > self._deadline:
            raise _AbortedError

    def sent(self, size: int) -> None:
        if self._progress is not None:
            self._progress(size, self._request.size)

    def open_report(self) -> BinaryIO:
        return self._request.file

    def _trace(self, event: str, info: Mapping[str, Any]) -> None:
        """Keep the socket that httpx has opened, for `abort`. Raises `_AbortedError`."""
        self.check()
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            with self._lock:
                self._socket = info["return_value"].get_extra_info("socket")
            self.check()

    def _result_of(self, answer: "httpx.Response") -> UploadResult:
        """Return the result of an attempt from the server's answer, by its status and receipt."""
        status = answer.status_code
        if 300 <= status < 400:
            return UploadFailure(f"the server answered {status}: redirects are not followed", final=True)
        if status >= 400:
            final = status < 500 and status not in RETRIED
            return UploadFailure(
                f"the server answered {status}", final, retry_after_s(answer.headers.get("retry-after"))
            )
        body = bytearray()
        for chunk in answer.iter_raw(8192):
            self.check()
            body += chunk
            if len(body) > MAX_RECEIPT_BYTES:
                return UploadFailure("the server's receipt does not end", final=False)
        return self._receipt(status, bytes(body))

    def _receipt(self, status: int, body: bytes) -> UploadResult:
        """Check the receipt: the status 200 alone proves nothing, a captive portal sends it too."""
        try:
            found = json.loads(body)
            number, report_id, sha256 = found["receipt"], found["report_id"], found["sha256"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return UploadFailure(f"the server answered {status} without a receipt", final=False)
        if not isinstance(number, str) or not number:
            return UploadFailure("the server's receipt has no number", final=False)
        if (report_id, sha256) != (self._request.report_id, self._request.sha256):
            return UploadFailure("the server's receipt is for something else", final=False)
        return UploadReceipt(redact_host_details(number, 100))


class _ProgressFile:
    """Wrap the file of the report: count the bytes that are read, and raise `_AbortedError` after the deadline."""

    def __init__(self, attempt: _Attempt) -> None:
        self._attempt = attempt
        self._file = attempt.open_report()

    def read(self, size: int = -1) -> bytes:
        self._attempt.check()
        chunk = self._file.read(size)
        self._attempt.sent(self._file.tell())
        return chunk

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def retry_after_s(header: str | None, now: float | None = None) -> float:
    """Return the delay of a ``Retry-After`` header, a date or a number, from 0 s to a day; 0 if it is malformed."""
    if not header:
        return 0.0
    try:
        seconds = float(header) if header.strip().isascii() and header.strip().isdigit() else _until(header, now)
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return min(max(0.0, seconds), MAX_RETRY_AFTER_S)


def _until(date: str, now: float | None) -> float:
    """Return the seconds from `now`, Unix time in s, until an HTTP date. Raises `ValueError`, `TypeError`."""
    return email.utils.parsedate_to_datetime(date).timestamp() - (time.time() if now is None else now)
