"""Addresses, names and paths that another user or process holds: ports of both loopbacks, sockets, locks, programs."""

import http.client
import json
import os
import socket
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from support.edge import get
from support.sidecars import VITALSD, ask, environment, serving
from support.target import Target
from vitalsd.sidecar.listen_errors import ListenError, PortInUseError
from vitalsd.sidecar.listeners import adopt, listen
from vitalsd.sidecar.tcp_listener import bind_tcp
from vitalsd.sidecar.unix_listener import UnixListener
from vitalsd.sources import list_processes
from vitalsd_client import fetch

pytestmark = pytest.mark.live
Start = Callable[..., Target]
OTHER = 65501
"""A user id without an account."""


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no address ::1")
needs_root = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="needs root on Linux to be another user"
)


def in_network_namespace(code: str, directory: Path, prepare: str = "") -> subprocess.CompletedProcess[str]:
    """Run Python in a network of its own, where no other process has a port. Skips the test where there is none."""
    head = (
        "import fcntl, socket, struct\n"
        "with socket.socket() as s:\n"
        "    fcntl.ioctl(s, 0x8914, struct.pack('16sH14x', b'lo', 0x1 | 0x40))\n"  # SIOCSIFFLAGS, IFF_UP | IFF_RUNNING
        "def sysctl(name, value):\n"
        "    with open('/proc/sys/' + name, 'w') as file: file.write(value)\n"
        "from vitalsd.sidecar.listeners import listen\nfrom vitalsd.sidecar.tcp_listener import bind_tcp\n"
    )
    # A mount namespace with a /proc/sys that is writable and of this network namespace.
    command = ["unshare", "-n", "-m", sys.executable, "-c", head + prepare + textwrap.dedent(code)]
    done = subprocess.run(command, env=environment(directory), capture_output=True, text=True, timeout=60, check=False)
    if "unshare" in done.stderr or "Read-only file system: '/proc/sys" in done.stderr:
        pytest.skip(f"no network namespace can be made: {done.stderr.strip()}")
    return done


@needs_ipv6
def test_listen_on_loopback_holds_both_addresses() -> None:
    """127.0.0.1 and ::1 with one port: no other process can listen where `localhost` may lead."""
    with closing(listen(port=0)) as listeners:
        names = [each.getsockname()[:2] for each in listeners.tcp]
        assert [host for host, _ in names] == ["127.0.0.1", "::1"]
        assert names[0][1] == names[1][1]
        assert listeners.address == names[0]
        assert listeners.notes == []
        with pytest.raises(PortInUseError):
            bind_tcp("::1", names[0][1])
    bind_tcp("::1", names[0][1]).close()


@pytest.mark.parametrize("host", ["127.0.0.2", "::1"])
def test_listen_on_another_address_holds_one_listener(host: str) -> None:
    """Only the default address has a second one."""
    try:
        listeners = listen(host=host, port=0)
    except ListenError as error:
        pytest.skip(str(error))
    with closing(listeners):
        assert [each.getsockname()[0] for each in listeners.tcp] == [host]


@needs_ipv6
def test_sidecar_answers_on_both_addresses(short_path: Path) -> None:
    """Each takes its own address and `localhost` as Host, and no other; runtime file and ready line say 127.0.0.1."""
    with serving(short_path) as (_, ready):
        port = int(ready["url"].rpartition(":")[2])
        assert ready["url"] == f"http://127.0.0.1:{port}"
        (file,) = (short_path / "run").glob("sidecar-*.json")
        assert json.loads(file.read_text())["host"] == "127.0.0.1"
        for address, right, wrong in (("127.0.0.1", "127.0.0.1", "[::1]"), ("::1", "[::1]", "127.0.0.1")):
            url = f"http://{right}:{port}"
            for host, status in ((right, 200), ("localhost", 200), (wrong, 421)):
                assert get(url, "/healthz", host=f"{host}:{port}").status == status, (address, host)
        connection = http.client.HTTPConnection("localhost", port, timeout=10)
        connection.request("GET", "/info")
        assert json.loads(connection.getresponse().read())["target"]["pid"] == ready["pid"]
        connection.close()
        assert ask(f"http://[::1]:{port}", "/healthz")[0] == 200
        assert fetch(10, url=f"http://[::1]:{port}").platform in ("linux", "macos")


@needs_ipv6
def test_port_that_another_process_holds_on_ipv6_is_used_with_a_note(short_path: Path) -> None:
    """The address that was asked for is served; the note names the address that leads elsewhere."""
    holder = bind_tcp("::1", 0)
    port = holder.getsockname()[1]
    with closing(holder), serving(short_path, port=str(port)) as (process, ready):
        assert ready["url"] == f"http://127.0.0.1:{port}"
        assert ask(ready["url"], "/healthz")[0] == 200
        process.terminate()
        process.wait(10)
        assert process.stderr is not None
        assert f"[::1]:{port} is held by another process" in process.stderr.read()


@needs_root
def test_default_port_that_another_process_holds_on_ipv6_stays_the_port(tmp_path: Path) -> None:
    """127.0.0.1:9779 is the address of the documents: a process on [::1]:9779 moves no sidecar away from it."""
    done = in_network_namespace(
        """
        held = bind_tcp("::1", 9779)
        found = listen()
        print(found.address, found.notes)
        """,
        tmp_path,
    )
    assert done.stdout.startswith("('127.0.0.1', 9779) ['[::1]:9779 is held by another process"), done


@needs_root
def test_free_port_is_free_on_both_addresses_within_bounded_tries(tmp_path: Path) -> None:
    """Ports that are taken on ::1 are passed over; where all are, one of 127.0.0.1 is used and noted."""
    done = in_network_namespace(
        """
        sysctl("net/ipv4/ip_local_port_range", "40000 40003")
        held = [bind_tcp("::1", port) for port in (40000, 40001, 40002)]
        found = listen(port=0)
        print(found.address, len(found.tcp), found.notes)
        found.close()
        held.append(bind_tcp("::1", 40003))
        found = listen(port=0)
        print(len(found.tcp), found.notes)
        """,
        tmp_path,
    )
    first, second = done.stdout.splitlines()
    assert first == "('127.0.0.1', 40003) 2 []", done
    assert second.startswith("1 ['[::1]:4000"), done


@needs_root
def test_machine_without_ipv6_is_served_on_one_address_without_a_note(tmp_path: Path) -> None:
    """IPv6 that is off is no error, and nothing that a user has to know."""
    done = in_network_namespace(
        """
        sysctl("net/ipv6/conf/all/disable_ipv6", "1")
        found = listen(port=0)
        print(len(found.tcp), found.notes)
        """,
        tmp_path,
    )
    assert done.stdout == "1 []\n", done


@needs_ipv6
def test_forked_child_and_stopped_sidecar_leave_both_ports_free(short_path: Path) -> None:
    """A child lets go of both listeners, so that the port is free once the parent has stopped."""
    program = textwrap.dedent(
        """
        import os, vitalsd
        from vitalsd.sidecar.tcp_listener import bind_tcp
        sidecar = vitalsd.start(port=0)
        port = sidecar.endpoint.port
        reader, writer = os.pipe()
        forked, in_child = os.pipe()
        if os.fork() == 0:
            os.close(writer)
            os.write(in_child, b"x")
            os.read(reader, 1)
            os._exit(0)
        os.read(forked, 1)
        sidecar.stop()
        bind_tcp("127.0.0.1", port).close(); bind_tcp("::1", port).close()
        os.close(writer)
        os.wait()
        print("free")
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(short_path), capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("free\n", "")


@needs_ipv6
def test_adopted_listeners_are_published_by_their_ipv4_address() -> None:
    """A supervisor may hand over the listener of ::1 first."""
    given = [bind_tcp("::1", 0), bind_tcp("127.0.0.1", 0)]
    with closing(adopt(given, guarded=False, allow_remote=False)) as listeners:
        assert listeners.address == given[1].getsockname()


@needs_root
@needs_ipv6
def test_other_user_is_determined_on_both_addresses(short_path: Path) -> None:
    """Over [::1] another user gets what he gets over 127.0.0.1, and no more."""
    code = (
        "for host in ('127.0.0.1', '::1'):\n"
        "    for path in ('/healthz', '/info', '/runs', '/marks'):\n"
        "        connection = http.client.HTTPConnection(host, PORT, timeout=10)\n"
        "        connection.request('GET', path)\n"
        "        print(connection.getresponse().status)\n"
    )
    with serving(short_path) as (_, ready):
        output = as_other_user(code.replace("PORT", ready["url"].rpartition(":")[2])).split()
    assert output == ["200", "403", "403", "403"] * 2


# Names of programs


@contextmanager
def set_user_id_program(name: str) -> Iterator[int]:
    """A program of that name as another user would have it run: set-user-ID root, started by that user."""
    with subprocess.Popen(
        [name, "-c", "import os, time; os.setresuid(65501, 0, 0); print(flush=True); time.sleep(60)"],
        executable=sys.executable,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process.pid
        finally:
            process.kill()


@needs_root
@pytest.mark.parametrize("command", ["sample", "top", "serve"])
def test_name_passes_over_set_user_id_program_of_another_user(short_path: Path, command: str) -> None:
    """A process with the real user id of another user is not the caller's, whatever its effective one is."""
    name = f"vitals{os.getpid()}{command}"
    with set_user_id_program(name) as pid:
        assert any(name in each.names and OTHER in each.uids for each in list_processes() if each.pid == pid)
        if command == "serve":
            with serving(short_path, "--name", name) as (_, ready):
                status, body = ask(ready["url"], "/metrics?window_ms=10")
                assert (status, "no process of yours" in body.get("reason", "")) == (503, True) or status == 404, body
            return
        options = ["--window-ms", "10"] if command == "sample" else ["--count", "1"]
        done = subprocess.run(
            [*VITALSD, command, "--name", name, *options],
            env=environment(short_path),
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
    assert done.returncode == 1
    assert f"no process of yours is named {name}" in done.stdout + done.stderr


def test_process_list_has_all_user_ids_of_this_process() -> None:
    """All four ids of this process are its own."""
    (own,) = (each for each in list_processes() if each.pid == os.getpid())
    assert own.uids == {os.geteuid()}
    assert own.is_of(os.geteuid())


# Sockets and locks


def as_other_user(code: str) -> str:
    """Run Python as another user, and return what it prints."""
    head = "import os, socket; os.setgroups([]); os.setresgid(65501, 65501, 65501); os.setresuid(65501, 65501, 65501)\n"
    # The other user may not be able to read the modules, so they are imported before the change.
    command = [sys.executable, "-c", f"import encodings.idna, http.client\n{head}{code}"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


SQUATTED: dict[str, tuple[str, str]] = {
    "file of another user": ("a.sock", "open(path, 'w').close()"),
    "dead socket of another user": ("a.sock", "socket.socket(socket.AF_UNIX).bind(path)"),
    "lock of another user": ("a.sock.lock", "open(path, 'w').close(); os.chmod(path, 0o666)"),
    "closed lock of another user": ("a.sock.lock", "open(path, 'w').close(); os.chmod(path, 0)"),
    "directory of another user": ("a.sock.lock", "os.mkdir(path)"),
}


@needs_root
@pytest.mark.parametrize("case", SQUATTED)
def test_path_that_another_user_holds_is_named_with_owner_and_remedy(short_path: Path, case: str) -> None:
    """In a directory like /tmp another user may be first: the error names the path, the user and what to do."""
    short_path.chmod(0o1777)
    name, code = SQUATTED[case]
    as_other_user(f"path = {str(short_path / name)!r}\n{code}")
    with pytest.raises(ListenError) as raised:
        UnixListener(short_path / "a.sock")
    for part in (str(short_path / name), f"belongs to user {OTHER}", "remove it, or name another socket with --uds"):
        assert part in str(raised.value)
    assert (short_path / name).lstat().st_uid == OTHER


@needs_root
def test_live_socket_and_lock_of_another_user_are_named(short_path: Path) -> None:
    """The error names them while the other process runs and holds its lock."""
    short_path.chmod(0o1777)
    program = (
        "import fcntl, os, socket, sys, time; os.setresuid(65501, 65501, 65501)\n"
        "if sys.argv[1] == 'lock': fcntl.flock(os.open(sys.argv[2] + '.lock', os.O_RDWR | os.O_CREAT, 0o666), 2)\n"
        "else: s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[2]); s.listen()\n"
        "print(flush=True); time.sleep(60)"
    )
    for kind in ("lock", "socket"):
        path = short_path / f"{kind}.sock"
        with subprocess.Popen([sys.executable, "-c", program, kind, str(path)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            with pytest.raises(ListenError, match=f"belongs to user {OTHER}.* name another socket"):
                UnixListener(path)
            process.kill()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/etc/passwd", path)])
def test_lock_that_is_no_file_is_named(short_path: Path, make: Callable[[str], None]) -> None:
    """A FIFO, a directory or a link at the path of the lock is left alone, and named."""
    lock = str(short_path / "a.sock.lock")
    make(lock)
    before = os.lstat(lock)
    with pytest.raises(ListenError, match=r"a\.sock\.lock is not a regular file.* remove it"):
        UnixListener(short_path / "a.sock")
    assert stat.S_IFMT(os.lstat(lock).st_mode) == stat.S_IFMT(before.st_mode)


def test_path_held_by_this_user_is_named_with_a_remedy(short_path: Path) -> None:
    """A sidecar of this user, another program of this user, and a file: each error says what to do."""
    path = short_path / "a.sock"
    with UnixListener(path), pytest.raises(ListenError, match=r"another sidecar .*stop it, or name another socket"):
        UnixListener(path)
    with socket.socket(socket.AF_UNIX) as program:
        program.bind(str(path))
        program.listen(1)
        with pytest.raises(ListenError, match="in use by another process of yours; end it, or name another socket"):
            UnixListener(path)
    path.unlink()
    path.touch()
    with pytest.raises(ListenError, match="is left alone: move it away, or name another socket"):
        UnixListener(path)


def test_default_socket_path_held_by_another_process_is_a_note(short_path: Path) -> None:
    """The default path of a pid that another process took is a note with its reason; TCP is served."""
    program = textwrap.dedent(
        """
        import os, pathlib, vitalsd
        directory = pathlib.Path(os.environ["VITALSD_RUNTIME_DIR"])
        directory.mkdir(mode=0o700)
        (directory / f"metrics-{os.getpid()}.sock").mkdir()
        with vitalsd.start(port=0) as sidecar:
            print(sidecar.socket, sidecar.notes)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(short_path), capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("None ("), done
    assert "is not a socket; it is left alone" in done.stdout
