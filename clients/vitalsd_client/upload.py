"""
One attempt to send one report: multipart over httpx, a total deadline, and a receipt or it did not happen.

httpx limits each read and write but not their number, so a server that drips one byte at a time keeps
it for ever. The attempt runs on a thread of its own; at the deadline its socket is shut down under it.

Its transport is used without `httpx.Client`: that would write a line with the URL to the log of the host program for
every request, at level INFO.
"""

import email.utils
import ipaddress
import json
import os
import re
import socket as sockets
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, cast
from urllib.parse import urlsplit

from vitalsd_client.daemon_call import Call
from vitalsd_client.redaction import harmless

if TYPE_CHECKING:
    import ssl

    import httpx

__all__ = [
    "Attempt",
    "Failed",
    "Parcel",
    "Progress",
    "Receipt",
    "check_proxy",
    "check_url",
    "read_ca_file",
    "send",
]

Progress = Callable[[int, int], None]
"""Called with the bytes of the report sent so far, and all of them."""

ATTEMPT_S = 120.0
CONNECT_S, IDLE_S = 5.0, 30.0
MAX_RECEIPT_BYTES = 64 * 1024
MAX_RETRY_AFTER_S = 24 * 3600.0
RETRIED = frozenset((408, 425, 429))
MAX_CA_BYTES = 16 << 20

STORES = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Ubuntu, Arch
    "/etc/pki/tls/certs/ca-bundle.crt",  # Fedora, Red Hat
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",  # the same, newer
    "/etc/ssl/ca-bundle.pem",  # SUSE
    "/etc/ssl/cert.pem",  # Alpine
)
"""Certificates of authorities on Linux. A frozen program brings an OpenSSL that looks where its builder had them."""

HASHED = re.compile(r"[0-9a-f]{8}\.[0-9]+", re.ASCII)
"""The only names of files that OpenSSL looks at in a directory of certificates."""

# As OpenSSL and Apple's Security framework number them.
WRONG_TIME = frozenset((9, 10, -67818, -67819))
WRONG_HOST = frozenset((62, 64, -67602))


@dataclass(frozen=True, slots=True)
class Parcel:
    """What is to be sent."""

    report_id: str
    size: int
    sha256: str
    file: BinaryIO
    """Positioned at its start."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """The server has the report, and named its hash to show it."""

    number: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The server does not have the report, or it is not known whether it has."""

    reason: str
    final: bool
    """Sending the same again would end the same."""
    retry_after_s: float = 0.0
    """The server asked not to be asked again before."""


Attempt = Receipt | Failed


def check_url(url: str) -> str:
    """
    Return `url` if a report may be sent there: https, or plain http on this machine.

    Raises:
        ValueError: it is anything else.
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        usable = False
    if not usable:
        raise ValueError(f"{url!r} is not an http or https URL; one looks like https://reports.example.com/reports")
    if parts.username is not None:
        raise ValueError("a password in a URL ends up in logs; let the server accept reports without one")
    if parts.scheme == "http" and not _is_here(parts.hostname or ""):
        raise ValueError(f"a report goes to another machine over https only, not to {url!r}")
    return url


def check_proxy(proxy: str) -> str:
    """
    Return `proxy` if it is the URL of one.

    Raises:
        ValueError: it is anything else; a password in it is not in the message.
    """
    import httpx  # only where there is a proxy

    try:
        host = httpx.Proxy(proxy).url.host
    except (ValueError, httpx.InvalidURL):
        host = ""
    if not host:
        raise ValueError("proxy is not the URL of one; such looks like http://127.0.0.1:3128")
    return proxy


def read_ca_file(ca_file: str | os.PathLike[str]) -> str:
    """
    Return the certificates in a PEM file as text, for `send`.

    Args:
        ca_file: may hold other text between the certificates.

    Raises:
        ValueError: the file cannot be read, or has no certificate.
    """
    import ssl  # only for an own authority: to keep a report it is not needed

    try:
        with open(ca_file, "rb") as file:
            content = file.read(MAX_CA_BYTES)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ValueError(
            f"cannot read the certificates in {os.fspath(ca_file)!r}: {why}; name a file in PEM form"
        ) from None
    # What is not ASCII stands in comments, and OpenSSL's parser for text in memory refuses it.
    text = content.decode("ascii", "ignore")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text)
    except (ssl.SSLError, ValueError):  # ValueError: an empty text
        raise ValueError(
            f"cannot use {os.fspath(ca_file)!r} as certificates of authorities: it has no certificate in PEM form, or a"
            " damaged one; name a file with lines -----BEGIN CERTIFICATE-----"
        ) from None
    return text


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def send(
    url: str,
    parcel: Parcel,
    *,
    attempt_s: float = ATTEMPT_S,
    proxy: str | None = None,
    authorities: str | None = None,
    progress: Progress | None = None,
) -> Attempt:
    """
    Send it once; never raises for what the network or the server does.

    Args:
        attempt_s: for all of it, s.
        proxy: of the network; those of the environment are not used.
        authorities: certificates in PEM form, see `read_ca_file`, to trust besides those of the system.
        progress: called on another thread.
    """
    attempt = _Attempt(url, parcel, time.monotonic() + attempt_s, proxy, authorities, progress)
    try:
        call = Call(attempt.run)
    except RuntimeError as error:
        return Failed(f"no thread can be started: {error}", final=False)
    if not call.wait(attempt_s):
        attempt.abort()
        # Looking up a name cannot be interrupted; what comes after it is.
        if not call.wait(1.0):
            return Failed(f"no answer within {attempt_s:g} s", final=False)
    try:
        return call.result()
    except _Aborted:
        return Failed(f"no answer within {attempt_s:g} s", final=False)


class _Aborted(Exception):
    """The deadline has passed."""


class _Attempt:
    def __init__(
        self,
        url: str,
        parcel: Parcel,
        deadline: float,
        proxy: str | None,
        authorities: str | None,
        progress: Progress | None,
    ) -> None:
        self._url, self._parcel, self._deadline = url, parcel, deadline
        self._proxy, self._authorities, self._progress = proxy, authorities, progress
        self._lock = threading.Lock()
        self._socket: sockets.socket | None = None
        self._aborted = False

    def abort(self) -> None:
        """Make whatever it is doing fail, now."""
        with self._lock:
            self._aborted = True
            if self._socket is not None:
                with suppress(OSError):
                    sockets.socket.shutdown(self._socket, sockets.SHUT_RDWR)

    def run(self) -> Attempt:
        import httpx  # only now: to keep a report it is not needed, and it brings half a command line with it

        try:
            request = httpx.Request(
                "POST",
                self._url,
                files={"report": (f"{self._parcel.report_id}.zip", cast(BinaryIO, _Counted(self)), "application/zip")},
                headers={
                    "Idempotency-Key": self._parcel.report_id,
                    "X-Content-SHA256": self._parcel.sha256,
                    "Accept": "application/json",
                    "Accept-Encoding": "identity",
                    # The same bytes on every attempt.
                    "Content-Type": f"multipart/form-data; boundary={self._parcel.report_id}",
                    "User-Agent": "vitalsd",
                },
                extensions={
                    "timeout": httpx.Timeout(IDLE_S, connect=CONNECT_S, pool=CONNECT_S).as_dict(),
                    "trace": self._trace,
                },
            )
            with self._transport() as transport, closing(transport.handle_request(request)) as answer:
                return self._judged(answer)
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            return Failed(harmless(str(error)), final=True)
        except (httpx.HTTPError, httpx.StreamError, OSError) as error:
            self.check()
            return Failed(harmless(_distrust(error) or f"{type(error).__name__}: {error}"), final=False)
        except ImportError as error:
            return Failed(harmless(f"a Python package that the upload needs does not load: {error}"), final=False)

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
        context = _trusting(self._authorities)
        if tls_to_proxy:
            # Of its own accord httpcore would make one that trusts certifi, and writes keys to SSLKEYLOGFILE.
            proxy = httpx.Proxy(cast(str, self._proxy), ssl_context=context)
        return httpx.HTTPTransport(verify=context, trust_env=False, proxy=proxy)

    def check(self) -> None:
        """Raise `_Aborted` if the deadline has passed."""
        if self._aborted or time.monotonic() > self._deadline:
            raise _Aborted

    def sent(self, size: int) -> None:
        if self._progress is not None:
            self._progress(size, self._parcel.size)

    def open_report(self) -> BinaryIO:
        return self._parcel.file

    def _trace(self, event: str, info: Mapping[str, Any]) -> None:
        """Take the socket that httpx has opened. Raises `_Aborted`."""
        self.check()
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            with self._lock:
                self._socket = info["return_value"].get_extra_info("socket")
            self.check()

    def _judged(self, answer: "httpx.Response") -> Attempt:
        status = answer.status_code
        if 300 <= status < 400:
            return Failed(f"the server answered {status}: redirects are not followed", final=True)
        if status >= 400:
            final = status < 500 and status not in RETRIED
            return Failed(f"the server answered {status}", final, retry_after_s(answer.headers.get("retry-after")))
        body = bytearray()
        for chunk in answer.iter_raw(8192):
            self.check()
            body += chunk
            if len(body) > MAX_RECEIPT_BYTES:
                return Failed("the server's receipt does not end", final=False)
        return self._receipt(status, bytes(body))

    def _receipt(self, status: int, body: bytes) -> Attempt:
        """Read the receipt. A 200 alone is no proof: a captive portal sends one, and so does a cut connection."""
        try:
            found = json.loads(body)
            number, report_id, sha256 = found["receipt"], found["report_id"], found["sha256"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return Failed(f"the server answered {status} without a receipt", final=False)
        if not isinstance(number, str) or not number:
            return Failed("the server's receipt has no number", final=False)
        if (report_id, sha256) != (self._parcel.report_id, self._parcel.sha256):
            return Failed("the server's receipt is for something else", final=False)
        return Receipt(harmless(number, 100))


def _trusting(authorities: str | None) -> "ssl.SSLContext":
    """
    Return a TLS context that trusts the authorities of the system, and `authorities` besides.

    Linux: the files of OpenSSL, or those that SSL_CERT_FILE and SSL_CERT_DIR name. macOS: the keychains.

    `ssl.create_default_context` would write the keys of the connection to the file that SSLKEYLOGFILE names, which
    cannot be taken back, and since Python 3.13 it refuses the authorities that `openssl req -x509` makes, for an
    extension that only VERIFY_X509_STRICT asks for.

    Args:
        authorities: certificates in PEM form, as `read_ca_file` returns them.

    Raises:
        OSError: a file of the system has damaged certificates.
        ImportError: macOS: truststore is not installed.
    """
    import ssl

    context: ssl.SSLContext
    if sys.platform == "darwin":
        import truststore

        context = truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_default_certs()
        if (store := _store_elsewhere()) is not None:
            context.load_verify_locations(cafile=store)
        # A certificate that was named is trusted even if it is not that of a root: an own server's, for example.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    if authorities is not None:
        context.load_verify_locations(cadata=authorities)
    return context


def _store_elsewhere() -> str | None:
    """Return the certificates of this Linux if OpenSSL was built to look for them where none are."""
    import ssl

    # Set to restrict what is trusted, so what they name is all, even if it is not there.
    if "SSL_CERT_FILE" in os.environ or "SSL_CERT_DIR" in os.environ:
        return None
    looked = ssl.get_default_verify_paths()
    if looked.cafile is not None:
        return None
    if looked.capath is not None and _has_certificates(looked.capath):
        return None
    return next(filter(os.path.isfile, STORES), None)


def _distrust(error: BaseException) -> str | None:
    """Return why a certificate was refused, and what to do; ``None``: `error` has another cause."""
    import ssl

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return None
    why = getattr(cause, "verify_message", str(cause)).rstrip(".")
    code = getattr(cause, "verify_code", None)
    if code in WRONG_TIME:
        return f"the server's certificate is not valid now ({why}); check the clock of this machine and the certificate"
    if code in WRONG_HOST:
        return f"the server's certificate is for another host ({why}); check the URL and the certificate"
    fault = _fault_of_environment()
    if fault is not None:
        why += f"; {fault}"
        return f"the server's certificate is not trusted ({why}); correct the variable, or unset it"
    return (
        f"the server's certificate is not trusted ({why}); install the certificate of its authority on this machine, or"
        " name a file with it by ca_file, on the command line by --ca-file"
    )


def _fault_of_environment() -> str | None:
    """Return what is wrong with SSL_CERT_FILE or SSL_CERT_DIR, which OpenSSL does not say; ``None``: nothing is."""
    import ssl

    if sys.platform == "darwin":  # the keychains are asked, and no variable
        return None
    file, directories = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    if file is not None:
        try:
            if not os.path.isfile(file):
                os.stat(file)
                return f"SSL_CERT_FILE is {file!r}, which is not a file"
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=file)
        except ssl.SSLError:
            return f"SSL_CERT_FILE is {file!r}, which has no certificate in PEM form, or a damaged one"
        except OSError as error:
            return f"SSL_CERT_FILE is {file!r}, which cannot be read: {error.strerror}"
    if directories is not None and not any(map(_has_certificates, directories.split(os.pathsep))):
        return f"SSL_CERT_DIR is {directories!r}, where no file has a name that OpenSSL looks at"
    return None


def _has_certificates(directory: str) -> bool:
    with suppress(OSError):
        return any(map(HASHED.fullmatch, os.listdir(directory)))
    return False


class _Counted:
    """The report as a file that tells how much of it has been read, and ends when the attempt does."""

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
    """Return the seconds that a Retry-After header asks for, 0 to a day; a date or a number, else 0."""
    if not header:
        return 0.0
    try:
        seconds = float(header) if header.strip().isascii() and header.strip().isdigit() else _until(header, now)
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return min(max(0.0, seconds), MAX_RETRY_AFTER_S)


def _until(date: str, now: float | None) -> float:
    return email.utils.parsedate_to_datetime(date).timestamp() - (time.time() if now is None else now)
