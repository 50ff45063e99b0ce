"""Find the sidecar to ask, and have it prove that it is ours before it gets the token."""

import hmac
import ipaddress
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from vitalsd.discovery.directories import EndpointError, runtime_directories
from vitalsd.discovery.http_connection import Answer, Connection, ExchangeError
from vitalsd.discovery.own_sidecars import own_sidecars
from vitalsd.discovery.runtime_file import Endpoint, Liveness, discover, proof, published, read

__all__ = ["NoSidecarError", "RunningSidecar", "locate", "refusal", "responsive"]

CONNECT_S = 0.5
"""Time limit to connect to a Unix socket, s, if the sidecar has an address to try after it."""
HEALTH_TIMEOUT_S = 0.4
"""Time limit for an answer of ``/healthz``, s, if there is another sidecar to ask."""
MAX_SIDECARS = 3
"""Sidecars to try at most, best first: each that hangs costs `HEALTH_TIMEOUT_S`."""
MAX_ANSWER_BYTES = 8 << 20
"""Limit for the body of an answer, bytes."""
ANSWER_S = 0.2
"""Time to reserve for an answer that needs no measurement, s."""
TRY_AGAIN = (429, 503)
"""HTTP statuses of a sidecar that sheds load: with a ``Retry-After`` the request is sent again after it."""


class NoSidecarError(Exception):
    """Report that there is no sidecar to ask; ``str(error)`` has the places searched and what was wrong there."""


@dataclass(frozen=True, slots=True)
class RunningSidecar:
    """Hold the addresses of one sidecar, and the process to ask it about."""

    socket: str | None
    address: tuple[str, int] | None
    token: str | None = field(default=None, repr=False)
    pid: int | None = None
    """Pid to send in the query, because the sidecar's target is another process; ``None``: its own target."""

    @contextmanager
    def connected(self, deadline: float) -> Iterator[Callable[..., Answer]]:
        """
        Connect, let the other end prove itself, and yield a function that makes one request.

        The function sends a request again, after the pause that the sidecar asks for by ``Retry-After``, as long as the
        deadline leaves `needs_s` seconds for the answer after the pause.

        Raises:
            ExchangeError: no connection, another user's socket, or no proof.
        """
        with ExitStack() as stack:
            connection, headers = self._proven(stack, deadline)

            def request(
                path: str, query: Mapping[str, Any] | None = None, *, needs_s: float = ANSWER_S, **options: Any
            ) -> Answer:
                nonlocal connection, headers
                target = f"{path}?{urlencode(query)}" if query else path
                given = options.pop("headers", {})
                options = {"max_bytes": MAX_ANSWER_BYTES, **options}
                while True:
                    if not connection.is_reusable:
                        connection, headers = self._proven(stack, deadline)
                    answer = connection.request(target, **options, headers=headers | given)
                    pause_s = answer.retry_after_s
                    if answer.status not in TRY_AGAIN or pause_s is None:
                        return answer
                    if time.monotonic() + pause_s + needs_s > deadline:
                        return answer
                    time.sleep(pause_s)
                    connection, headers = self._proven(stack, deadline)

            yield request

    def _proven(self, stack: ExitStack, deadline: float) -> tuple[Connection, dict[str, str]]:
        """Return a connection that `stack` closes, and the headers for its requests. Raises `ExchangeError`."""
        connection = stack.enter_context(self._connect(deadline))
        if self.token is None or connection.place == self.socket:
            return connection, {}
        _demand_proof(connection, self.token, self.address[1] if self.address else 0)
        return connection, {"Authorization": f"Bearer {self.token}"}

    def _connect(self, deadline: float) -> Connection:
        """Connect to the Unix socket, else to the address. Raises `ExchangeError`."""
        if self.socket is None:
            assert self.address is not None
            return Connection(self.address, deadline)
        if self.address is None:
            return Connection(self.socket, deadline)
        try:
            return Connection(self.socket, deadline, connect_s=CONNECT_S)
        except ExchangeError as error:
            try:
                return Connection(self.address, deadline)
            except ExchangeError as other:
                raise ExchangeError(f"{error}; {other}") from None

    def get(self, path: str, query: Mapping[str, Any] | None = None, *, deadline: float, **options: Any) -> Answer:
        """Make one request on a connection of its own. Raises `ExchangeError`."""
        with self.connected(deadline) as request:
            return request(path, query, **options)


def responsive(sidecars: Sequence[RunningSidecar], deadline: float, reasons: list[str]) -> Iterator[RunningSidecar]:
    """
    Yield those of the first `MAX_SIDECARS` that respond, best first; the last one is yielded without a check.

    A check costs at most `HEALTH_TIMEOUT_S`, so a sidecar that hangs leaves time for the next one.

    Args:
        sidecars: at least one, best first.
        deadline: monotonic time, s.
        reasons: extended in place by what was wrong with the skipped sidecars.
    """
    *better, last = sidecars[:MAX_SIDECARS]
    for each in better:
        try:
            each.get("/healthz", deadline=min(deadline, time.monotonic() + HEALTH_TIMEOUT_S))
        except ExchangeError as error:
            reasons.append(str(error))
        else:
            yield each
    yield last


def _demand_proof(connection: Connection, token: str, port: int) -> None:
    """Have the other end prove that it knows the token (HMAC over a nonce). Raises `ExchangeError`."""
    nonce = secrets.token_urlsafe(24)
    answer = connection.request(f"/hello?nonce={nonce}", max_bytes=4096)
    try:
        given = str(json.loads(answer.body)["proof"])
    except (ValueError, KeyError, TypeError, RecursionError):
        given = ""
    if not hmac.compare_digest(given.encode(), proof(token, nonce, port).encode()):
        raise ExchangeError(
            f"{connection.place} could not prove that it is the sidecar of the runtime file; the token was not sent"
        )


def locate(
    *, url: str | None = None, socket: str | os.PathLike[str] | None = None, pid: int | None = None
) -> list[RunningSidecar]:
    """
    Return the sidecars to ask, best first: the one that the caller names, else the live ones that discovery finds.

    Args:
        url: ``http://127.0.0.1:9779``: an IP address or localhost.
        socket: path of a Unix socket.
        pid: the process to ask about; ``None``: with `url` or `socket` the sidecar's own target, else this process.

    Raises:
        NoSidecarError: there is no sidecar to ask, or `url` is not the URL of one.
    """
    if url is not None or socket is not None:
        address = None if url is None else _address(url)
        path = None if socket is None else os.fspath(socket)
        return [RunningSidecar(socket=path, address=address, token=_token_for(address), pid=pid)]
    wanted = os.getpid() if pid is None else pid
    found = discover(wanted)
    watching = [each for each in found if each.target is not None and each.target.pid == wanted]
    # The sidecar of another process can be asked too, if it is in this pid namespace, which `discover` has made sure.
    sidecars = [_sidecar(each, None) for each in watching]
    sidecars += [each for each in _of_this_process(wanted) if each not in sidecars]
    sidecars += [_sidecar(each, wanted) for each in found if each not in watching]
    if not sidecars:
        raise NoSidecarError(_why_none())
    return sidecars


def _of_this_process(pid: int) -> list[RunningSidecar]:
    """Return the sidecars that this process has started for itself; these may have no runtime file."""
    if pid != os.getpid():
        return []
    return [
        RunningSidecar(own.socket, None if own.host is None or own.port is None else (own.host, own.port), own.token)
        for own in own_sidecars()
        if own.socket is not None or own.port is not None
    ]


def _sidecar(endpoint: Endpoint, pid: int | None) -> RunningSidecar:
    address = None
    if endpoint.url is not None:
        parts = urlsplit(endpoint.url)
        address = (parts.hostname or "", parts.port or 0)
    return RunningSidecar(socket=endpoint.socket, address=address, token=endpoint.token, pid=pid)


def _address(url: str) -> tuple[str, int]:
    """Return the IP address and the port of a sidecar's URL. Raises `NoSidecarError`."""
    try:
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.path not in ("", "/") or parts.query or parts.username is not None:
            raise ValueError
        host = "127.0.0.1" if parts.hostname == "localhost" else parts.hostname or ""
        return str(ipaddress.ip_address(host)), parts.port or 80
    except ValueError:
        raise NoSidecarError(f"{url!r} is not a sidecar's URL; one looks like http://127.0.0.1:9779") from None


def _token_for(address: tuple[str, int] | None) -> str | None:
    """Return the token of the live sidecar of this user with exactly this address; ``None``: there is none."""
    for each in discover() if address is not None else ():
        if each.token is not None and _sidecar(each, None).address == address:
            return each.token
    return None


def _why_none() -> str:
    """Return what is wrong with each runtime file, or that there is none, as text for a `NoSidecarError`."""
    reasons: list[str] = []
    directories = runtime_directories()
    for directory in directories:
        try:
            entries = sorted(name for name in os.listdir(directory) if name.startswith("sidecar-"))
            owner = os.stat(directory).st_uid
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                reasons.append(f"cannot look into {directory}: {error.strerror}")
            continue
        if owner != os.geteuid():
            reasons.append(f"{directory} belongs to user {owner}, so nothing in it is believed")
            continue
        states = {entry.path.name: entry.liveness for entry in published(directory)}
        reasons += [reason for name in entries if (reason := _why_not(directory / name, states.get(name)))]
    if not reasons:
        looked = " or ".join(map(str, directories)) or "any directory of this user"
        reasons.append(f"no runtime file in {looked}; start one with vitalsd.start() or `vitalsd serve`")
    return "no sidecar to ask: " + "; ".join(reasons[:3])


def _why_not(path: Path, state: Liveness | None) -> str | None:
    """Return why a runtime file is not usable; ``None``: it is usable now, or it has been removed."""
    if state == "dead":
        return f"{path.name} was left behind by a sidecar that is no longer running"
    if state == "unknown":
        return f"{path.name} is from another machine or container, or its process cannot be seen"
    try:
        read(path)
    except FileNotFoundError:
        return None
    except (EndpointError, OSError) as error:
        return str(error)
    return None


def refusal(answer: Answer) -> str:
    """Return the status and the detail of an answer without metrics, as a clause for a reason."""
    detail = ""
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        detail = f": {json.loads(answer.body)['detail']}"
    return f"the sidecar answered {answer.status}{detail or ', which says nothing about metrics'}"
