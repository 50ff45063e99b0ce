"""
Write and read the runtime file through which clients find a sidecar.

A sidecar writes ``sidecar-<pid>.json`` once its listeners accept connections, and removes it when it ends. After a
sidecar was killed, its file remains, and another process may have its pid. So a reader compares boot, pid and start
time, and deletes only the files of sidecars that are certainly dead. If that cannot be decided, the file stays.

This module imports only the standard library and `vitalsd.sources`, because clients import it without the service.
"""

import hmac
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vitalsd.discovery.atomic_file import draft, sync_directory
from vitalsd.discovery.directories import EndpointError, runtime_directories
from vitalsd.discovery.unix_socket import SocketLock, answers
from vitalsd.sources.platform import process_identities
from vitalsd.sources.process_identity import ANY_MACHINE, UNKNOWN_BOOT, IdentityUnknownError, ProcessIdentityReader

__all__ = [
    "PAGE_FILE",
    "Endpoint",
    "Liveness",
    "ProcessRun",
    "Published",
    "discover",
    "liveness",
    "new_token",
    "now",
    "proof",
    "publish",
    "published",
    "read",
    "sweep",
    "withdraw",
]

SCHEMA = 2
SERVICE = "vitalsd"
MAX_FILE_BYTES = 16 * 1024
"""Longest runtime file that is read, bytes."""
PAGE_FILE = "open.html"
"""File that redirects a browser to the page of the sidecar that was opened last, with its token; see `vitalsd open`."""
ORPHAN_S = 60
"""Age of a temporary file, s, from which on it is removed: its writer has died, because to write it takes ms."""

FILE = re.compile(r"sidecar-([0-9]{1,10})\.json", re.ASCII)
SOCKET = re.compile(r"metrics-([0-9]{1,10})\.sock", re.ASCII)
TEMPORARY = re.compile(r"\.sidecar-[0-9]{1,10}\.[0-9a-f]{16}\.tmp", re.ASCII)

Liveness = Literal["alive", "dead", "unknown"]


@dataclass(frozen=True, slots=True)
class ProcessRun:
    """The target of a sidecar: pid and `Identity.start_key`."""

    pid: int
    start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """The addresses of a sidecar, and which run of which process it is."""

    version: str
    pid: int
    start: int
    boot_id: str
    host_scope: str
    uid: int
    target: ProcessRun | None
    """``None``: a sidecar that waits for its target to start."""
    socket: str | None
    """Path of the Unix socket."""
    host: str | None
    """TCP address."""
    port: int | None
    token: str | None = field(repr=False)
    """The client sends it as ``Authorization: Bearer`` over TCP; ``None``: the sidecar requires no token."""
    started_at: str
    """ISO 8601 in UTC with microseconds, so that it sorts as text."""
    app: str | None = None
    """The application id that the client passed."""
    app_version: str | None = None
    signals: Mapping[str, str] | None = None
    """How to find the page for heartbeats and gauges, see `vitalsd.contract.signals_page`; ``None``: there is none."""

    @property
    def url(self) -> str | None:
        """Base URL over TCP, without a slash at the end; ``None``: the sidecar does not listen there."""
        if self.host is None or self.port is None:
            return None
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


class Published(NamedTuple):
    """A runtime file, and whether its sidecar runs."""

    path: Path
    endpoint: Endpoint
    liveness: Liveness


# Writing


def new_token() -> str:
    """Make a secret of 256 random bits in characters that a header may have."""
    return secrets.token_urlsafe(32)


def proof(token: str, nonce: str, port: int) -> str:
    """
    Compute the answer of a sidecar on `port` to ``GET /hello?nonce=``, which only a process that has its token can.

    A client requests it before it sends the token, because another user may have taken the port of a sidecar that has
    ended. The port is part of the proof, so that another process cannot forward the answer of a live sidecar.
    """
    return hmac.new(token.encode(), f"{nonce}:{port}".encode(), "sha256").hexdigest()


def now() -> str:
    """Return the time of the wall clock in the format of `Endpoint.started_at`."""
    return _iso(time.time_ns())


def _iso(unix_ns: int) -> str:
    seconds, rest_ns = divmod(max(0, unix_ns), 1_000_000_000)
    moment = datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest_ns // 1000)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def publish(endpoint: Endpoint, directory: Path) -> Path:
    """
    Write the runtime file atomically: a reader gets the old content, the new content, or no file.

    Raises:
        OSError: the file could not be written; an older file of the same pid is unchanged.
    """
    body = {"schema": SCHEMA, "service": SERVICE, **asdict(endpoint)}
    path = directory / f"sidecar-{endpoint.pid}.json"
    temporary = directory / f".sidecar-{endpoint.pid}.{secrets.token_hex(8)}.tmp"
    with draft(temporary, json.dumps(body, indent=1).encode() + b"\n"):
        os.rename(temporary, path)
    sync_directory(directory)
    return path


def withdraw(path: Path, endpoint: Endpoint) -> None:
    """Remove the runtime file at `path` if this run wrote it, and `PAGE_FILE` if it has the token of this run."""
    with suppress(EndpointError, OSError):
        found = read(path)
        if (found.pid, found.start, found.boot_id) == (endpoint.pid, endpoint.start, endpoint.boot_id):
            os.unlink(path)
    with suppress(OSError):
        page = path.with_name(PAGE_FILE)
        if endpoint.token is not None and endpoint.token.encode() in page.read_bytes():
            os.unlink(page)


# Reading


def read(path: Path) -> Endpoint:
    """
    Read a runtime file that only this user can have written.

    Raises:
        FileNotFoundError: the file does not exist.
        EndpointError: the file is a link, belongs to another user, is open to other users, is too large, or has an
            unknown schema.
    """
    try:
        # O_NONBLOCK: open(2) of a FIFO in its place must not block.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise EndpointError(f"cannot open {path}: {error.strerror}") from None
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise EndpointError(f"{path} is not a regular file")
        if found.st_uid != os.geteuid():
            raise EndpointError(f"{path} belongs to user {found.st_uid}, not to {os.geteuid()}")
        if found.st_mode & 0o077:
            raise EndpointError(f"{path} is open to other users (mode {stat.S_IMODE(found.st_mode):04o})")
        content = os.read(fd, MAX_FILE_BYTES + 1)
    finally:
        os.close(fd)
    if len(content) > MAX_FILE_BYTES:
        raise EndpointError(f"{path} is larger than {MAX_FILE_BYTES} bytes")
    try:
        return _parse(json.loads(content))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise EndpointError(f"{path} is not a runtime file of schema {SCHEMA}: {error!r}") from None


def _parse(body: Any) -> Endpoint:
    if body["service"] != SERVICE or body["schema"] != SCHEMA:
        raise ValueError(f"service {body['service']!r}, schema {body['schema']!r}")

    def typed(key: str, kind: type, *, optional: bool = False, within: Any = body) -> Any:
        value = within[key]
        if not (type(value) is kind or (optional and value is None)):
            raise TypeError(f"{key} is {value!r}")
        return value

    target = typed("target", dict, optional=True)
    return Endpoint(
        version=typed("version", str),
        pid=typed("pid", int),
        start=typed("start", int),
        boot_id=typed("boot_id", str),
        host_scope=typed("host_scope", str),
        uid=typed("uid", int),
        target=target and ProcessRun(typed("pid", int, within=target), typed("start", int, within=target)),
        socket=typed("socket", str, optional=True),
        host=typed("host", str, optional=True),
        port=typed("port", int, optional=True),
        token=typed("token", str, optional=True),
        started_at=typed("started_at", str),
        app=typed("app", str, optional=True),
        app_version=typed("app_version", str, optional=True),
        signals=_reference(body.get("signals")),
    )


def _reference(value: Any) -> Mapping[str, str] | None:
    """Return how to find the page of a sidecar. Raises `TypeError`."""
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(each, str) for each in value.values()):
        raise TypeError(f"signals is {value!r:.80}")
    return value


def liveness(endpoint: Endpoint, kernel: ProcessIdentityReader) -> Liveness:
    """
    Return whether the sidecar that wrote `endpoint` still runs; ``unknown`` if that cannot be decided.

    Two containers may see different boot ids in the same boot, or one of them none. Then a process with the same pid
    and start is that sidecar; if there is no such process, the sidecar is dead only if it wrote before this boot.
    """
    try:
        if endpoint.host_scope != kernel.host_scope():
            return "unknown"
        boot_id = kernel.boot_id()
        found = kernel.start_key(endpoint.pid) == endpoint.start
        anywhere = endpoint.host_scope.startswith(ANY_MACHINE)
        if endpoint.boot_id == boot_id and not (anywhere and boot_id == UNKNOWN_BOOT):
            return "alive" if found else "dead"
        if anywhere:
            return "alive" if found and endpoint.boot_id == boot_id else "unknown"
        before = endpoint.started_at < _iso(kernel.booted_unix_ns())
        if found:
            return "unknown" if before else "alive"
        return "dead" if before else "unknown"
    except IdentityUnknownError:
        return "unknown"


def published(directory: Path, kernel: ProcessIdentityReader | None = None) -> list[Published]:
    """Return the readable runtime files of this user in `directory`, the newest first."""
    kernel = kernel or process_identities()
    found = []
    for path in _entries(directory, FILE):
        with suppress(EndpointError, OSError):
            endpoint = read(path)
            found.append(Published(path, endpoint, liveness(endpoint, kernel)))
    return sorted(found, key=lambda entry: entry.endpoint.started_at, reverse=True)


def discover(
    pid: int | None = None, *, directories: list[Path] | None = None, kernel: ProcessIdentityReader | None = None
) -> list[Endpoint]:
    """
    Return the running sidecars of this user: those with the target `pid` first, and then the newest first.

    This changes no file and raises no error about a file.
    """
    kernel = kernel or process_identities()
    found = [
        entry.endpoint
        for directory in (runtime_directories() if directories is None else directories)
        for entry in published(directory, kernel)
        if entry.liveness == "alive"
    ]
    found.sort(key=lambda endpoint: endpoint.started_at, reverse=True)
    if pid is not None:
        try:
            watched = ProcessRun(pid, kernel.start_key(pid) or 0)
        except IdentityUnknownError:
            return found
        found.sort(key=lambda endpoint: endpoint.target != watched)
    return found


# Cleaning up


def sweep(directory: Path, kernel: ProcessIdentityReader | None = None) -> list[Path]:
    """
    Remove the files of dead sidecars in `directory`: runtime files, sockets with their locks, temporary files.

    Returns:
        The paths of the removed files.
    """
    kernel = kernel or process_identities()
    removed = [entry.path for entry in published(directory, kernel) if entry.liveness == "dead" and _remove(entry.path)]
    for path in _entries(directory, SOCKET):
        with suppress(OSError, EndpointError):
            held = SocketLock(path)
            try:
                if not answers(path) and _remove(path):
                    removed.append(path)
            finally:
                held.release()
    for path in _entries(directory, TEMPORARY):
        with suppress(OSError):
            if time.time() - os.lstat(path).st_mtime > ORPHAN_S and _remove(path):
                removed.append(path)
    return removed


def _entries(directory: Path, pattern: re.Pattern[str]) -> list[Path]:
    """Return the paths in `directory` that match, or none if another user can write there."""
    try:
        found = os.lstat(directory)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            return []
        return sorted(directory / name for name in os.listdir(directory) if pattern.fullmatch(name))
    except OSError:
        return []


def _remove(path: Path) -> bool:
    with suppress(OSError):
        if os.lstat(path).st_uid == os.geteuid():
            os.unlink(path)
            return True
    return False
