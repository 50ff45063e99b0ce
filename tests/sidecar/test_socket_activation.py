"""What a supervisor hands over: `vitalsd.sidecar.socket_activation`."""

import asyncio
import ctypes
import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support.as_darwin.emulation import LIBRARY
from support.darwin.abi import zig
from support.paths import SUPPORT
from support.sidecars import VITALSD, ask, environment, eventually, listing
from vitalsd.sidecar.listen_errors import ListenError
from vitalsd.sidecar.socket_activation import Notifier, launchd_sockets, systemd_sockets
from vitalsd.sidecar.tcp_listener import bind_tcp


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The simulated launchd, built by the compiler from the wheel."""
    directory = tmp_path_factory.mktemp("launchd")
    library = directory / "launchd_stub.so"
    compiled = zig(
        "build-lib", "-dynamic", "-lc", "-fPIC", "-O", "ReleaseFast", "-fno-compiler-rt", "-fno-ubsan-rt",
        "-cflags", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "--", SUPPORT / "launchd_stub.c",
        f"-femit-bin={library}", cache=directory / "zig",
    )  # fmt: skip
    assert compiled.returncode == 0, compiled.stderr
    return ctypes.CDLL(str(library))


class Launchd:
    """A launchd that has, or has not, started this process."""

    def __init__(self, stub: ctypes.CDLL) -> None:
        self.stub = stub
        self.stub.stub_reset(1)
        self.lib = SimpleNamespace(launch_activate_socket=stub.launch_activate_socket, free=stub.stub_free)

    def key(self, name: bytes, *fds: int, code: int = 0) -> None:
        self.stub.stub_key(name, code, (ctypes.c_int * len(fds))(*fds), ctypes.c_size_t(len(fds)))

    @property
    def owed(self) -> int:
        return ctypes.c_int.in_dll(self.stub, "owed").value


@pytest.fixture
def launchd(stub: ctypes.CDLL) -> Iterator[Launchd]:
    launchd = Launchd(stub)
    yield launchd
    assert launchd.owed == 0


@pytest.fixture
def xnu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse SO_ACCEPTCONN as sogetoptlock does (bsd/kern/uipc_socket.c of xnu-11417)."""
    getsockopt = socket.socket.getsockopt

    def refusing(self: socket.socket, level: int, name: int, *size: int) -> Any:
        if (level, name) == (socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise OSError(errno.ENOPROTOOPT, "Protocol not available")
        return getsockopt(self, level, name, *size)

    monkeypatch.setattr(socket.socket, "getsockopt", refusing)


def unix_listener(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


# launchd


def test_launchd_activation_from_a_shell_returns_no_socket(launchd: Launchd) -> None:
    """ESRCH: launchd did not start us, and that is no error."""
    launchd.stub.stub_reset(0)
    assert launchd_sockets(launchd.lib) == []


def test_launchd_sockets_without_acceptconn_are_accepted(xnu: None, launchd: Launchd, short_path: Path) -> None:
    """The supervisor is trusted; a connected socket is refused all the same."""
    launchd.key(b"http", bind_tcp("127.0.0.1", 0).detach())
    launchd.key(b"unix", unix_listener(short_path / "a.sock").detach())
    with ExitStack() as stack:
        assert len([stack.enter_context(each) for each in launchd_sockets(launchd.lib)]) == 2
    launchd.stub.stub_reset(1)
    one, other = socket.socketpair()
    launchd.key(b"unix", one.detach())
    with other, pytest.raises(ListenError, match="not a listening"):
        launchd_sockets(launchd.lib)


def test_launchd_activation_takes_all_descriptors_of_all_keys(launchd: Launchd, short_path: Path) -> None:
    """Both families of the one key and the Unix socket of the other: none is forgotten, each array is freed once."""
    first, second = bind_tcp("127.0.0.1", 0), bind_tcp("127.0.0.1", 0)
    ports = {first.getsockname()[1], second.getsockname()[1]}
    launchd.key(b"http", first.detach(), second.detach())
    launchd.key(b"unix", unix_listener(short_path / "a.sock").detach())
    with ExitStack() as stack:
        taken = [stack.enter_context(each) for each in launchd_sockets(launchd.lib)]
        assert {each.getsockname()[1] for each in taken[:2]} == ports
        assert [each.proto for each in taken[:2]] == [socket.IPPROTO_TCP] * 2
        assert taken[2].family == socket.AF_UNIX
        assert not any(each.get_inheritable() for each in taken)


def test_launchd_activation_without_a_key_takes_the_others(launchd: Launchd) -> None:
    """ENOENT for one key says nothing about the other."""
    launchd.key(b"http", bind_tcp("127.0.0.1", 0).detach())
    with ExitStack() as stack:
        assert len([stack.enter_context(each) for each in launchd_sockets(launchd.lib)]) == 1


def test_launchd_activation_with_another_error_raises_it(launchd: Launchd) -> None:
    """EALREADY, or any other errno, is reported and not mistaken for a start from a shell."""
    launchd.key(b"http", code=errno.EALREADY)
    with pytest.raises(ListenError, match="does not hand over the socket 'http'"):
        launchd_sockets(launchd.lib)


# systemd

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has systemd")


@linux_only
def test_listen_pid_of_another_process_is_ignored() -> None:
    """With LISTEN_PID of another process, or invalid, no socket is taken, and the variables are removed."""
    for pid in (str(os.getpid() + 1), "", "x", "²"):
        environ = {"LISTEN_PID": pid, "LISTEN_FDS": "1", "LISTEN_FDNAMES": "a", "OTHER": "stays"}
        assert systemd_sockets(environ) == []
        assert environ == {"OTHER": "stays"}
    with pytest.raises(ListenError, match="not a number"):
        systemd_sockets({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "many"})


def activated(
    directory: Path, sockets: list[socket.socket], *options: str, **variables: str
) -> "subprocess.Popen[str]":
    """
    Start ``vitalsd serve`` as the supervisor does: listeners from descriptor 3 on, and how it announces them.

    On Linux by the variables of sd_listen_fds(3), on the emulated macOS by launch_activate_socket(3). A Mac's own
    launchd starts what it has a property list for, and nothing else.
    """
    if sys.platform == "darwin" and LIBRARY not in os.environ:
        pytest.skip("launchd starts only what it has a property list for")
    launcher = (
        "import fcntl, os, sys\n"
        "kept = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 100) for fd in sys.argv[1].split(',')]\n"
        "for number, fd in enumerate(kept): os.dup2(fd, 3 + number)\n"
        "os.environ['LISTEN_PID'] = str(os.getpid())\n"
        "keys = [f'{key}={3 + number}' for number, key in enumerate(('http', 'unix')[:len(kept)])]\n"
        "os.environ['SIM_LAUNCHD'] = ' '.join([str(os.getpid()), *keys])\n"
        "os.execv(sys.argv[2], sys.argv[2:])\n"
    )
    fds = [each.fileno() for each in sockets]
    return subprocess.Popen(
        [sys.executable, "-c", launcher, ",".join(map(str, fds)), *VITALSD, "serve", *options],
        env=environment(directory) | {"LISTEN_FDS": str(len(fds))} | variables,
        pass_fds=fds,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_systemd_descriptors_are_served_and_published(short_path: Path) -> None:
    """
    A request that queued before the start is answered; both sockets are, and are in the runtime file.

    The socket's file is the supervisor's, and stays.
    """
    path = short_path / "agent.sock"
    with bind_tcp("127.0.0.1", 0) as tcp, unix_listener(path) as unix:
        port = tcp.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as early:
            early.sendall(f"GET /healthz HTTP/1.1\r\nHost: localhost:{port}\r\nConnection: close\r\n\r\n".encode())
            with activated(short_path, [tcp, unix]) as process:
                early.settimeout(10)
                assert early.recv(100).startswith(b"HTTP/1.1 200 ")
                for where in (f"http://127.0.0.1:{port}", str(path)):
                    assert ask(where, "/info")[1]["self"]["pid"] == process.pid
                assert len(listing(short_path / "run")) == 1
                process.terminate()
                assert process.wait(5) == 0
    assert listing(short_path / "run") == []
    assert path.exists()


def test_systemd_wildcard_listener_needs_both_options(short_path: Path) -> None:
    """A wildcard ListenStream needs the same two options as --host."""
    with bind_tcp("0.0.0.0", 0) as tcp, activated(short_path, [tcp]) as process:
        assert process.wait(10) == 2
        assert process.stderr is not None
        assert "--allow-remote" in process.stderr.read()


@pytest.mark.parametrize("options", [("--port", "0"), ("--uds", "other.sock"), ("--no-tcp",)])
def test_socket_activation_with_a_listen_option_is_refused(short_path: Path, options: tuple[str, ...]) -> None:
    """The supervisor has decided where: an option that would do nothing is not taken silently."""
    with bind_tcp("127.0.0.1", 0) as tcp, activated(short_path, [tcp], *options) as process:
        assert process.wait(10) == 2
        assert process.stderr is not None
        assert f"{options[0]} does nothing" in process.stderr.read()


@linux_only
def test_systemd_gets_ready_and_watchdog_notifications(short_path: Path) -> None:
    """READY=1 comes when requests are answered, WATCHDOG=1 from then on as long as the sampler works."""
    address = str(short_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel, bind_tcp("127.0.0.1", 0) as tcp:
        channel.bind(address)
        channel.settimeout(10)
        with activated(short_path, [tcp], NOTIFY_SOCKET=address, WATCHDOG_USEC="300000") as process:
            assert channel.recv(100) == b"READY=1"
            assert ask(f"http://127.0.0.1:{tcp.getsockname()[1]}", "/healthz")[0] == 200
            assert [channel.recv(100) for _ in range(3)] == [b"WATCHDOG=1"] * 3
            process.terminate()
            assert process.wait(5) == 0


def test_systemd_watchdog_with_a_hung_sampler_gets_nothing(short_path: Path) -> None:
    """The watchdog hears nothing while the kernel does not answer, although the event loop runs."""
    address = str(short_path / "notify")

    async def hangs() -> None:
        await asyncio.Event().wait()

    async def listen(channel: socket.socket) -> None:
        environ = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "30000"}
        notifier = Notifier(environ, hangs)
        assert environ == {}
        no_service: Any = None
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(notifier.run(no_service), 0.1)

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(address)
        asyncio.run(listen(channel))
        channel.setblocking(False)
        assert channel.recv(100) == b"READY=1"
        with pytest.raises(BlockingIOError):
            channel.recv(100)


def test_notify_without_systemd_sends_nothing() -> None:
    """Without a NOTIFY_SOCKET, or with one without a listener, nothing is sent and no error is raised."""

    async def alive() -> None:
        raise AssertionError

    no_service: Any = None
    for environ in ({}, {"NOTIFY_SOCKET": "/nonexistent"}, {"NOTIFY_SOCKET": "@nonexistent"}):
        asyncio.run(Notifier(environ, alive).run(no_service))


def test_notify_to_an_abstract_socket_arrives() -> None:
    """An address that begins with @ is in the abstract namespace of Linux."""
    if sys.platform != "linux":
        pytest.skip("only Linux has the abstract namespace")

    async def alive() -> None:
        raise AssertionError

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        name = f"vitalsd-test-{os.getpid()}"
        channel.bind("\0" + name)
        channel.settimeout(5)
        Notifier({"NOTIFY_SOCKET": "@" + name}, alive).send("READY=1")
        assert eventually(lambda: channel.recv(10)) == b"READY=1"
