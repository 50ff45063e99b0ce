"""Open listening TCP sockets: on one address, or on 127.0.0.1 and ::1 with one port."""

import errno
import ipaddress
import socket

from vitalsd.discovery.unix_socket import direct_socket
from vitalsd.sidecar.config import DEFAULT_PORT
from vitalsd.sidecar.listen_errors import ListenError, NoAddressError, PortInUseError

__all__ = ["BACKLOG", "bind_port", "bind_tcp", "is_remote"]

LOOPBACK, LOOPBACK_6 = "127.0.0.1", "::1"
"""Loopback addresses of IPv4 and IPv6; ``localhost`` may mean either."""
PAIR_TRIES = 8
"""Number of free ports of 127.0.0.1 that are tried until one is free on ::1 too."""
BACKLOG = 64
"""
Connections that the kernel holds until they are accepted.

It is small because asyncio, without free descriptors, tries to accept them all at once and logs a traceback for each.
"""


def is_remote(host: str) -> bool:
    """
    Return whether another machine could reach a listener on `host`.

    Raises:
        ListenError: `host` is neither an address nor ``localhost``.
    """
    return not _address(host).is_loopback


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        return ipaddress.ip_address(LOOPBACK if host == "localhost" else host)
    except ValueError:
        raise ListenError(f"{host} is not an IP address; give one such as {LOOPBACK}") from None


def bind_tcp(host: str, port: int) -> socket.socket:
    """
    Return a listening TCP socket; `port` 0 takes a free one.

    `proto` is given because asyncio switches off Nagle's algorithm only for a listener that says
    TCP; without it every answer on a kept connection waits 40 ms for an acknowledgement.

    Raises:
        PortInUseError: the port is taken.
        NoAddressError: this machine has no such address.
        ListenError: any other refusal.
    """
    address = _address(host)
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    try:
        listener = direct_socket(family, socket.IPPROTO_TCP)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((str(address), port))
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortInUseError(f"port {port} on {address} is in use") from None
        if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            raise NoAddressError(f"this machine has no address {address}: {error.strerror}") from None
        raise ListenError(f"cannot listen on {address} port {port}: {error.strerror}") from None
    return listener


def bind_port(host: str, port: int | None, notes: list[str]) -> list[socket.socket]:
    """
    Bind `host`, and with 127.0.0.1 also ::1.

    Args:
        host: an IP address, or ``localhost``.
        port: ``None`` is 9779, or a free one if that is taken; 0 is a free one.
        notes: what differs from the request is added here.

    Raises:
        ListenError: see `bind_tcp`.
    """
    if port is not None:
        return _bind(host, port, notes)
    try:
        return _bind(host, DEFAULT_PORT, notes)
    except PortInUseError as error:
        notes.append(f"{error}; taking a free one")
        return _bind(host, 0, notes)


def _bind(host: str, port: int, notes: list[str]) -> list[socket.socket]:
    """
    Bind `host`, and with 127.0.0.1 also ::1.

    Clients that look up ``localhost`` may try ::1 first. If another user listened there, that user would get their
    requests, with the token that some of them send. A port that is free on 127.0.0.1 alone is used all the same: it
    is the address that documents and the runtime file name.
    """
    if _address(host) != _address(LOOPBACK):
        return [bind_tcp(host, port)]
    passed_over: list[socket.socket] = []
    """Sockets that stay open until the end, so that the kernel gives another port at the next try."""
    try:
        for _ in range(PAIR_TRIES if port == 0 else 1):
            try:
                listener = bind_tcp(host, port)
            except PortInUseError:
                if not passed_over:
                    raise
                break
            number = listener.getsockname()[1]
            try:
                return [listener, bind_tcp(LOOPBACK_6, number)]
            except NoAddressError:
                return [listener]
            except PortInUseError:
                reason = "is held by another process"
                passed_over.append(listener)
            except ListenError as error:
                reason = f"cannot be held ({error})"
                passed_over.append(listener)
                break
        listener = passed_over.pop()
        number = listener.getsockname()[1]
        notes.append(
            f"[{LOOPBACK_6}]:{number} {reason}, so http://localhost:{number} may lead to another program;"
            f" use http://{LOOPBACK}:{number}"
        )
        return [listener]
    finally:
        for each in passed_over:
            each.close()
