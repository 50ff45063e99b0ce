"""
Determine the user at the other end of a TCP connection within this machine.

Linux: sock_diag(7) reports the owner of the socket with a given pair of addresses, in microseconds (struct
inet_diag_req_v2 and inet_diag_msg in linux/inet_diag.h). The owner is that of the socket's inode, in the user namespace
of this process. Platform limit: XNU does not report it, and neither does Linux for a listener in another network
namespace. Such a peer counts as the owner of the sidecar; ``--auth token`` keeps it out.
"""

import _socket
import errno
import ipaddress
import os
import socket
import struct
import sys

from starlette.types import Scope

from vitalsd.admission import OWNER, Peer

__all__ = ["PEER", "PeerUsers", "is_open", "peer_of"]

PEER = "vitalsd.peer"
"""Key in an ASGI scope for the `Peer` of the connection."""

NETLINK_SOCK_DIAG = 4  # linux/netlink.h
SOCK_DIAG_BY_FAMILY = 20  # linux/sock_diag.h
NLM_F_REQUEST = 1
NLMSG_ERROR = 2
HEADER = struct.Struct("=IHHII")
"""struct nlmsghdr: length, type, flags, sequence, port."""
REQUEST = struct.Struct("=BBBxI")
"""struct inet_diag_req_v2 up to its `id`: family, protocol, extensions, states."""
PORTS = struct.Struct("!HH16s16s")
"""First fields of struct inet_diag_sockid: local and remote port, local and remote address."""
LOOPBACK_AND_ANY_COOKIE = struct.pack("=III", 1, 0xFFFFFFFF, 0xFFFFFFFF)
"""
LOOPBACK_IFINDEX of include/net/flow.h: all traffic within a machine passes that interface. The kernel finds sockets
that are bound to it (SO_BINDTODEVICE, socket(7)) and those that are bound to none.
"""
REMOTE_PORT = struct.Struct("!H")
"""Second field of struct inet_diag_sockid, in network byte order."""
REMOTE_PORT_AT = HEADER.size + 4 + 2
"""Offset of the remote port in the reply, bytes: in the `id` of struct inet_diag_msg, after the local port."""
UID_AND_INODE = struct.Struct("=II")
"""Last fields of struct inet_diag_msg: user id and inode of the socket."""
UID_AT = HEADER.size + 4 + 48 + 12
"""Offset of the user id in the reply, bytes: after four bytes, the `id` of 48 bytes, expires, rqueue and wqueue."""
REPLY_BYTES = 4096
"""Size of the buffer for a reply, bytes: a header of 16, struct inet_diag_msg of 72, and some attributes."""
MAPPED = bytes(10) + b"\xff\xff"
"""Prefix of an IPv4 address in IPv6 form (RFC 4291 section 2.5.5.2)."""
TCP_ESTABLISHED = 1  # include/net/tcp_states.h; the first byte of struct tcp_info (linux/tcp.h)

Address = tuple[str, int]


def peer_of(scope: Scope) -> Peer:
    """Return the peer of a request; `OWNER` if the request did not come over a socket."""
    found: Peer = scope.get(PEER, OWNER)
    return found


class PeerUsers:
    """Determine the users at the other end of TCP connections; ask the kernel over one netlink socket."""

    def __init__(self) -> None:
        self._netlink: _socket.socket | None = None
        self._number = 0
        if sys.platform == "linux":
            try:
                # A host program may have replaced `socket.socket`.
                self._netlink = _socket.socket(
                    socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, NETLINK_SOCK_DIAG
                )
            except OSError:
                self._netlink = None

    def close_in_child(self, null: int) -> None:
        """Replace the netlink socket, which the parent uses, by /dev/null; called in a forked child."""
        if self._netlink is not None:
            os.dup2(null, self._netlink.fileno(), inheritable=False)

    def close(self) -> None:
        """Close the netlink socket. A second call does nothing; later peers are not determined."""
        if self._netlink is not None:
            self._netlink.close()
            self._netlink = None

    def why_not(self, listener: Address) -> str | None:
        """
        Return why the users of connections to `listener` cannot be determined; None if they can.

        Platform limit: on macOS they never can, which is documented, and the result is None.

        Args:
            listener: address and port of a listening socket of this process, for which the kernel is asked as a test.
        """
        if sys.platform != "linux":
            return None
        if self._netlink is None:
            return "this process cannot open a netlink socket"
        anywhere = "::" if ":" in listener[0] else "0.0.0.0"
        return None if self._owner(listener, (anywhere, 0)) else "the kernel does not answer sock_diag requests"

    def peer(self, client: Address, server: Address) -> Peer | None:
        """
        Return the peer of an accepted TCP connection; None if it cannot be determined.

        A client on loopback is on this machine. If the kernel finds only this end, the client has bound its socket to
        an interface, which hides it from the request, its address is translated, or it has closed its end. Any user
        can do that, so the peer does not count as the owner.

        Args:
            client: address and port of the other end.
            server: address and port of this end.
        """
        owner = self._owner(client, server)
        if owner is None:
            is_answering = _is_loopback(server[0]) and self._owner(server, client) is not None
            return Peer("other") if is_answering else None
        uid, inode = owner
        # A socket without an inode has been closed by its process, and the kernel reports 0 as its owner.
        if not inode:
            return Peer("other")
        return Peer("tcp") if uid in (0, os.geteuid()) else Peer("other", uid)

    def _owner(self, local: Address, remote: Address) -> tuple[int, int] | None:
        """Return user id and inode of the socket with these addresses; None: there is none, or no answer."""
        if self._netlink is None:
            return None
        source, destination = _packed(local[0]), _packed(remote[0])
        family = socket.AF_INET if len(source) == 4 else socket.AF_INET6
        body = b"".join(
            (
                REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0xFFFFFFFF),
                PORTS.pack(local[1], remote[1], source, destination),
                LOOPBACK_AND_ANY_COOKIE,
            )
        )
        self._number = self._number % 0xFFFFFFFF + 1
        header = HEADER.pack(HEADER.size + len(body), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, self._number, 0)
        try:
            self._netlink.send(header + body)
            while True:
                # The kernel has put its answer into the socket when send returns.
                reply = self._netlink.recv(REPLY_BYTES)
                _, kind, _, number, _ = HEADER.unpack_from(reply)
                if number == self._number:
                    break
        except (OSError, struct.error):
            return None
        if kind != SOCK_DIAG_BY_FAMILY or len(reply) < UID_AT + UID_AND_INODE.size:
            return None
        if REMOTE_PORT.unpack_from(reply, REMOTE_PORT_AT)[0] != remote[1]:
            return None  # Without such a connection, the kernel reports a listener at the local address.
        uid, inode = UID_AND_INODE.unpack_from(reply, UID_AT)
        return uid, inode


def is_open(connection: socket.socket) -> bool:
    """
    Return whether the other end of an accepted connection has neither closed nor reset it.

    Platform limit: Linux; elsewhere always True.
    """
    if sys.platform != "linux":
        return True
    try:
        return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == TCP_ESTABLISHED
    except OSError as error:
        return error.errno not in (errno.EBADF, errno.ENOTCONN)


def _is_loopback(address: str) -> bool:
    """Return whether an IP address is a loopback address, also an IPv4 one in IPv6 form."""
    return ipaddress.ip_address(_packed(address)).is_loopback


def _packed(address: str) -> bytes:
    """Return the bytes of an address; of an IPv4 address in IPv6 form those of IPv4, the family of the other end."""
    if ":" not in address:
        return socket.inet_pton(socket.AF_INET, address)
    packed = socket.inet_pton(socket.AF_INET6, address.partition("%")[0])
    return packed[len(MAPPED) :] if packed.startswith(MAPPED) else packed
