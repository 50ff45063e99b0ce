"""The user at the other end of a TCP connection, as the running kernel reports it."""

import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator

import pytest

from support.edge import Edge, get, whole_app
from vitalsd.admission import Peer
from vitalsd.http.access.peer import PeerUsers, is_open

pytestmark = [pytest.mark.live, pytest.mark.skipif(sys.platform != "linux", reason="XNU does not report the user")]

SO_BINDTODEVICE = 25  # asm-generic/socket.h; the module has no such name on macOS
LOOPBACKS = ["127.0.0.1", "::1", "::ffff:127.0.0.1"]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be another user")


@pytest.fixture
def users() -> Iterator[PeerUsers]:
    users = PeerUsers()
    yield users
    users.close()


def accepted(listener: socket.socket) -> tuple[socket.socket, tuple[str, int], tuple[str, int]]:
    connection, address = listener.accept()
    return connection, address[:2], connection.getsockname()[:2]


def listening(address: str) -> socket.socket:
    """A listener that is reached at `address`; the mapped one over a socket for both families."""
    if ":" not in address:
        return socket.create_server((address, 0))
    try:
        listener = socket.socket(socket.AF_INET6)
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(("::", 0))
        listener.listen()
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    return listener


@pytest.mark.parametrize("address", LOOPBACKS)
def test_peer_of_a_connection_from_this_process_is_the_owner(users: PeerUsers, address: str) -> None:
    """Over IPv4, IPv6, and IPv4 into a socket of both families."""
    with listening(address) as listener, socket.create_connection((address, listener.getsockname()[1])):
        connection, client, server = accepted(listener)
        with connection:
            assert users.peer(client, server) == Peer("tcp")
            assert is_open(connection)
        assert users.why_not(listener.getsockname()[:2]) is None


@needs_root
@pytest.mark.parametrize("address", LOOPBACKS)
def test_peer_of_a_connection_from_another_user_has_its_uid(users: PeerUsers, address: str) -> None:
    """The uid is known as long as the other user keeps its end open."""
    dial = (
        "import encodings.idna, os, socket, sys; os.setgroups([]); os.setgid(65501); os.setuid(65501);"
        " c = socket.create_connection((sys.argv[1], int(sys.argv[2]))); sys.stdin.read()"
    )
    with listening(address) as listener:
        command = [sys.executable, "-c", dial, address, str(listener.getsockname()[1])]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
            connection, client, server = accepted(listener)
            with connection:
                assert users.peer(client, server) == Peer("other", 65501)
            assert process.stdin is not None
            process.stdin.close()


@needs_root
@pytest.mark.parametrize("address", LOOPBACKS)
@pytest.mark.parametrize("first", [True, False])
def test_peer_that_binds_its_socket_to_an_interface_is_not_the_owner(
    users: PeerUsers, address: str, first: bool
) -> None:
    """Any user may do so (Linux 5.7), and the kernel then finds the socket only by that interface."""
    # Before the connection it leaves only the loopback interface, after it any.
    names = [name for _, name in socket.if_nameindex() if (name == "lo") == first]
    if not names:
        pytest.skip("there is only the loopback interface here")
    bind = f"c.setsockopt(socket.SOL_SOCKET, {SO_BINDTODEVICE}, {names[0]!r}.encode())"
    connect = "c.connect((sys.argv[1], int(sys.argv[2])))"
    code = "\n".join(
        (
            "import encodings.idna, os, socket, sys",
            "os.setgroups([]); os.setgid(65501); os.setuid(65501)",
            "c = socket.socket(socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET)",
            *((bind, connect) if first else (connect, bind)),
            "print('bound', flush=True); sys.stdin.read()",
        )
    )
    with listening(address) as listener:
        command = [sys.executable, "-c", code, address, str(listener.getsockname()[1])]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            if process.stdout.readline() != b"bound\n":
                pytest.skip("this kernel lets only root bind a socket to an interface")
            connection, client, server = accepted(listener)
            with connection:
                assert users.peer(client, server) == Peer("other", 65501 if first else None)
            process.stdin.close()


def test_peer_that_the_kernel_does_not_know_at_another_address_is_not_determined(users: PeerUsers) -> None:
    """It may be another machine. This one binds its socket to an interface, so that the kernel does not find it."""
    others = [name for _, name in socket.if_nameindex() if name != "lo"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError as error:
            pytest.skip(f"no other address here: {error}")
        address = probe.getsockname()[0]
    with socket.create_server((address, 0)) as listener, socket.create_connection(listener.getsockname()) as dialled:
        try:
            dialled.setsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, others[0].encode())
        except PermissionError:
            pytest.skip("this kernel lets only root bind a socket to an interface")
        connection, client, server = accepted(listener)
        with connection:
            assert users.peer(client, server) is None


def test_peer_of_a_listener_at_the_address_of_the_client_is_not_determined(users: PeerUsers) -> None:
    """The kernel reports a listener where there is no such connection; its user is not the peer."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert users.peer(listener.getsockname(), ("127.0.0.1", 1)) is None


@pytest.mark.parametrize("reset", [False, True])
def test_peer_that_closed_at_once_is_not_the_owner(users: PeerUsers, reset: bool) -> None:
    """The kernel reports root for a socket without a process, and no socket at all after a reset."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dialled = socket.create_connection(listener.getsockname())
        if reset:
            dialled.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        dialled.sendall(b"GET / HTTP/1.1\r\n\r\n")
        dialled.close()
        connection, _ = listener.accept()
        with connection:
            found = users.peer(dialled_address(connection, reset), listener.getsockname())
            assert found in (None, Peer("other"))
            assert not is_open(connection)


def dialled_address(connection: socket.socket, reset: bool) -> tuple[str, int]:
    """A connection that was reset has no address of its peer any more."""
    return ("127.0.0.1", 1) if reset else connection.getpeername()


def test_peer_of_an_address_without_a_socket_is_not_determined(users: PeerUsers) -> None:
    """A listener in another network namespace looks the same."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert users.peer(("127.0.0.1", 1), listener.getsockname()) is None


def test_sidecar_that_cannot_determine_users_says_so_and_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel has no such netlink protocol; the note says what to do. With a token there is nothing to say."""
    monkeypatch.setattr("vitalsd.http.access.peer.NETLINK_SOCK_DIAG", 31)
    for token in (None, "a" * 43):
        with Edge(whole_app(), token=token) as edge:
            assert get(edge.url, "/metrics?window_ms=10").status == (200 if token is None else 401)
            notes = " ".join(edge._sidecar.notes)
            assert ("--auth token" in notes) == (token is None)


def test_peer_without_a_netlink_socket_is_not_determined() -> None:
    """There is no netlink socket after the end of the sidecar, for example."""
    users = PeerUsers()
    users.close()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert users.peer(("127.0.0.1", 1), listener.getsockname()) is None
        assert users.why_not(listener.getsockname()) == "this process cannot open a netlink socket"
