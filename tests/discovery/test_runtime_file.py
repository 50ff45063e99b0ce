"""The runtime file and the sockets beside it: `vitalsd.discovery.runtime_file`, `vitalsd.discovery.unix_socket`."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from support.paths import TESTS
from vitalsd.discovery import runtime_file as ep
from vitalsd.discovery.directories import (
    EndpointError,
    agent_socket,
    private_directory,
    socket_name,
)
from vitalsd.discovery.runtime_file import Endpoint, ProcessRun
from vitalsd.discovery.unix_socket import SocketLock, answers
from vitalsd.sources import open_source
from vitalsd.sources.linux.process_identity import LinuxProcessIdentityReader
from vitalsd.sources.platform import process_identities
from vitalsd.sources.process_identity import ANY_MACHINE, UNKNOWN_BOOT, IdentityUnknownError


class Kernel:
    """A kernel that knows the given processes and no others."""

    def __init__(
        self, starts: dict[int, int], host_scope: str = "here", boot_id: str = "boot", *, booted: str = "2025-01-01"
    ) -> None:
        self._booted_unix_ns = int(datetime.fromisoformat(f"{booted}T00:00:00Z").timestamp()) * 1_000_000_000
        self.starts = starts
        self._host_scope = host_scope
        self._boot_id = boot_id

    def host_scope(self) -> str:
        return self._host_scope

    def boot_id(self) -> str:
        return self._boot_id

    def booted_unix_ns(self) -> int:
        return self._booted_unix_ns

    def start_key(self, pid: int) -> int | None:
        if pid == 666:
            raise IdentityUnknownError("hidden")
        return self.starts.get(pid)


def an_endpoint(**changes: Any) -> Endpoint:
    return replace(
        Endpoint(
            version="1",
            pid=100,
            start=7,
            boot_id="boot",
            host_scope="here",
            uid=os.geteuid(),
            target=ProcessRun(200, 9),
            socket="/run/x.sock",
            host="127.0.0.1",
            port=9779,
            token=None,
            started_at="2026-01-01T00:00:00.000000Z",
        ),
        **changes,
    )


@pytest.fixture
def directory(short_path: Path) -> Path:
    return private_directory(short_path / "run")


def as_nobody(call: Callable[[], object]) -> str:
    """Return what `call` returns, or the error it raises, in a child that has become another user."""
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            try:
                answer = repr(call())
            except Exception as error:  # noqa: BLE001 - the parent asserts on it
                answer = f"{type(error).__name__}: {error}"
            os.write(write_fd, answer.encode())
        os._exit(0)
    os.close(write_fd)
    with os.fdopen(read_fd, "rb") as pipe:
        answer = pipe.read().decode()
    os.waitpid(pid, 0)
    return answer


# The file


def test_runtime_file_published_reads_back_equal(directory: Path) -> None:
    """Publish and read are inverse, with and without target, socket, port and token."""
    for each in (
        an_endpoint(),
        an_endpoint(target=None, socket=None, token="secret"),
        an_endpoint(host=None, port=None),
    ):
        assert each == ep.read(ep.publish(each, directory))


def test_runtime_file_is_private_under_every_umask(directory: Path) -> None:
    """The file has mode 0600 whether the umask is 0 or takes everything away."""
    for umask in (0o000, 0o777):
        old = os.umask(umask)
        try:
            path = ep.publish(an_endpoint(), directory)
        finally:
            os.umask(old)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_runtime_file_write_that_fails_leaves_the_old_file(directory: Path) -> None:
    """An endpoint that cannot be written changes nothing on disk."""
    path = ep.publish(an_endpoint(), directory)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        ep.publish(an_endpoint(version=object()), directory)
    (directory / "sidecar-101.json").mkdir()
    with pytest.raises(OSError, match="directory"):
        ep.publish(an_endpoint(pid=101), directory)
    assert before == path.read_bytes()
    assert sorted(os.listdir(directory)) == ["sidecar-100.json", "sidecar-101.json"]


def test_runtime_file_writer_killed_leaves_a_complete_file_or_none(directory: Path) -> None:
    """20 SIGKILLs during writes: what is there under the final name can always be read."""
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from discovery.test_runtime_file import an_endpoint; from vitalsd.discovery import runtime_file as endpoint\n"
        "print(flush=True)\n"
        "while True: endpoint.publish(an_endpoint(version='x' * 9000), Path(sys.argv[1]))\n"
    )
    # A slow machine may kill all of the first writers before they have written anything.
    ep.publish(an_endpoint(version="x" * 9000), directory)
    for _ in range(20 // 4):
        writers = [
            subprocess.Popen([sys.executable, "-c", code, str(directory), str(TESTS)], stdout=subprocess.PIPE)
            for _ in range(4)
        ]
        for number, writer in enumerate(writers):
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(0.002 * number)
            writer.kill()
        for writer in writers:
            writer.wait()
            writer.stdout.close()  # type: ignore[union-attr]
        assert ep.read(directory / "sidecar-100.json").version == "x" * 9000


def test_sweep_removes_only_old_temporary_files(directory: Path) -> None:
    """A temporary file is only an orphan once it is older than any writer takes."""
    old, young = directory / f".sidecar-1.{'0' * 16}.tmp", directory / f".sidecar-1.{'1' * 16}.tmp"
    old.touch()
    young.touch()
    os.utime(old, (time.time() - 120,) * 2)
    assert [old] == ep.sweep(directory)
    assert young.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b"[" * 9000,
        b'{"service": "other", "schema": 2}',
        b'{"service": "vitalsd", "schema": 3}',
        b'{"app": "vitalsd", "schema": 1}',
        b'{"service": "vitalsd", "schema": 2}',
        json.dumps({"service": "vitalsd", "schema": 2, "pid": "1"}).encode(),
        b"x" * (ep.MAX_FILE_BYTES + 1),
    ],
)
def test_runtime_file_of_foreign_content_is_an_endpoint_error(directory: Path, content: bytes) -> None:
    """Anything but a runtime file of the known schema is an EndpointError, and no sidecar."""
    path = directory / "sidecar-1.json"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(EndpointError, match=r"sidecar-1\.json"):
        ep.read(path)
    assert ep.discover(directories=[directory]) == []


def test_runtime_file_with_a_field_of_another_type_is_refused(directory: Path) -> None:
    """No field is taken at anything but its own type: true is not a pid."""
    path = ep.publish(an_endpoint(), directory)
    good = json.loads(path.read_text())
    for key in set(good) - {"schema", "app"}:
        path.write_text(json.dumps({**good, key: True}))
        with pytest.raises(EndpointError, match=key):
            ep.read(path)


def test_runtime_file_that_is_a_link_fifo_or_public_is_refused(directory: Path) -> None:
    """A runtime file must be a regular file that no other user can read; a FIFO does not block the reader."""
    path = ep.publish(an_endpoint(), directory)
    (directory / "sidecar-2.json").symlink_to(path)
    os.mkfifo(directory / "sidecar-3.json", 0o600)
    (directory / "sidecar-5.json").mkdir(0o700)
    held = len(os.listdir("/dev/fd"))
    for name, reason in (("2", "cannot open"), ("3", "not a regular file"), ("5", "not a regular file")):
        with pytest.raises(EndpointError, match=reason):
            ep.read(directory / f"sidecar-{name}.json")
    assert len(os.listdir("/dev/fd")) == held
    path.chmod(0o640)
    with pytest.raises(EndpointError, match="open to other users"):
        ep.read(path)
    with pytest.raises(FileNotFoundError):
        ep.read(directory / "sidecar-4.json")


def test_endpoint_repr_omits_the_token() -> None:
    """repr() of an endpoint leaves its token out."""
    assert "secret" not in repr(an_endpoint(token="secret"))


def test_withdraw_removes_only_its_own_file(directory: Path) -> None:
    """A file that a later sidecar with the same pid wrote stays."""
    path = ep.publish(an_endpoint(start=8), directory)
    ep.withdraw(path, an_endpoint(start=7))
    assert path.exists()
    ep.withdraw(path, an_endpoint(start=8))
    ep.withdraw(path, an_endpoint(start=8))
    assert not path.exists()


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:9779"),
        ("::1", "http://[::1]:9779"),
        ("0.0.0.0", "http://127.0.0.1:9779"),
        ("::", "http://[::1]:9779"),
        (None, None),
    ],
)
def test_endpoint_url_of_a_wildcard_address_is_loopback(host: str | None, url: str | None) -> None:
    """A wildcard address is reached over loopback."""
    assert url == an_endpoint(host=host).url


# Liveness


@pytest.mark.parametrize(
    ("changes", "kernel", "expected"),
    [
        ({}, Kernel({100: 7}), "alive"),
        ({}, Kernel({}), "dead"),
        ({}, Kernel({100: 8}), "dead"),
        ({}, Kernel({}, boot_id="later", booted="2026-02-01"), "dead"),
        ({}, Kernel({100: 7}, boot_id="later", booted="2026-02-01"), "unknown"),
        ({}, Kernel({100: 7}, boot_id="another view"), "alive"),
        ({}, Kernel({}, boot_id="another view"), "unknown"),
        ({}, Kernel({100: 7}, boot_id=UNKNOWN_BOOT), "alive"),
        ({}, Kernel({}, boot_id=UNKNOWN_BOOT), "unknown"),
        ({"boot_id": UNKNOWN_BOOT}, Kernel({100: 7}, boot_id=UNKNOWN_BOOT), "alive"),
        ({"boot_id": UNKNOWN_BOOT}, Kernel({}, boot_id=UNKNOWN_BOOT), "dead"),
        ({"boot_id": UNKNOWN_BOOT}, Kernel({}), "unknown"),
        (
            {"host_scope": ANY_MACHINE, "boot_id": UNKNOWN_BOOT},
            Kernel({}, host_scope=ANY_MACHINE, boot_id=UNKNOWN_BOOT),
            "unknown",
        ),
        (
            {"host_scope": ANY_MACHINE, "boot_id": UNKNOWN_BOOT},
            Kernel({100: 7}, host_scope=ANY_MACHINE, boot_id=UNKNOWN_BOOT),
            "alive",
        ),
        ({}, Kernel({}, host_scope="elsewhere"), "unknown"),
        ({}, Kernel({}, host_scope="elsewhere", boot_id="later"), "unknown"),
        ({"host_scope": ANY_MACHINE}, Kernel({}, host_scope=ANY_MACHINE), "dead"),
        ({"host_scope": ANY_MACHINE}, Kernel({}, host_scope=ANY_MACHINE, boot_id="later"), "unknown"),
        ({"pid": 666}, Kernel({}), "unknown"),
    ],
)
def test_liveness_is_decided_by_boot_pid_and_start(changes: dict[str, Any], kernel: Kernel, expected: str) -> None:
    """Boot, pid and start time decide; another machine's or container's sidecar is unknown, not dead."""
    assert expected == ep.liveness(an_endpoint(**changes), kernel)


def test_sweep_deletes_only_stale_runtime_files(directory: Path) -> None:
    """Alive and unknown runtime files survive a sweep."""
    alive = ep.publish(an_endpoint(pid=100), directory)
    dead = ep.publish(an_endpoint(pid=101), directory)
    unknown = ep.publish(an_endpoint(pid=666), directory)
    elsewhere = ep.publish(an_endpoint(pid=102, host_scope="elsewhere"), directory)
    assert [dead] == ep.sweep(directory, Kernel({100: 7}))
    assert alive.exists()
    assert unknown.exists()
    assert elsewhere.exists()


def test_discover_prefers_the_watcher_of_the_pid_then_the_newest(directory: Path) -> None:
    """The order of live sidecars: those that watch the given run of the pid, then by start."""
    for pid, target, second in (
        (100, ProcessRun(200, 9), 1),
        (101, ProcessRun(201, 9), 2),
        (102, ProcessRun(200, 8), 3),
    ):
        ep.publish(an_endpoint(pid=pid, target=target, started_at=f"2026-01-01T00:00:0{second}.000000Z"), directory)
    ep.publish(an_endpoint(pid=103), directory)
    kernel = Kernel({100: 7, 101: 7, 102: 7, 200: 9})

    def pids(pid: int | None) -> list[int]:
        return [found.pid for found in ep.discover(pid, directories=[directory], kernel=kernel)]

    assert pids(None) == [102, 101, 100]
    assert pids(200) == [100, 102, 101]
    assert pids(666) == [102, 101, 100]


# The real kernel


def test_start_key_equals_that_of_the_source() -> None:
    """A runtime file and a Source name one run of a process by the same number."""
    assert open_source().identity().start_key == process_identities().start_key(os.getpid())
    assert open_source().identity().boot_id == process_identities().boot_id()


def test_start_key_of_a_process_exists_until_it_exits() -> None:
    """A process is there until it has exited, reaped or not."""
    kernel = process_identities()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    start = kernel.start_key(child.pid)
    os.kill(child.pid, signal.SIGSTOP)
    assert start is not None
    assert start == kernel.start_key(child.pid)
    child.kill()
    deadline = time.monotonic() + 5
    while kernel.start_key(child.pid) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert kernel.start_key(child.pid) is None
    child.wait()
    assert kernel.start_key(child.pid) is None


def test_liveness_without_procfs_is_undecided(tmp_path: Path) -> None:
    """A process that exists and is not listed is undecided; the boot is not known."""
    kernel = LinuxProcessIdentityReader(str(tmp_path), str(tmp_path / "machine-id"))
    with pytest.raises(IdentityUnknownError):
        kernel.start_key(os.getpid())
    assert kernel.boot_id() == UNKNOWN_BOOT
    assert ep.liveness(an_endpoint(), kernel) == "unknown"
    assert kernel.host_scope().startswith(ANY_MACHINE)


def test_liveness_with_a_damaged_procfs_is_undecided(tmp_path: Path) -> None:
    """A stat line that no kernel writes decides nothing."""
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "stat").write_text("garbage")
    with pytest.raises(IdentityUnknownError, match="garbage"):
        LinuxProcessIdentityReader(str(tmp_path)).start_key(1)


# Users


def test_runtime_files_of_another_user_are_neither_read_nor_trusted(tmp_path: Path) -> None:
    """Another user can neither list nor read a runtime file, and one of theirs planted here is not believed."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        if parent.stat().st_uid == os.geteuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    directory = private_directory(tmp_path / "run")
    path = ep.publish(an_endpoint(), directory)
    assert as_nobody(lambda: ep.discover(directories=[directory])) == "[]"
    assert "Error" in as_nobody(lambda: ep.read(path))
    assert as_nobody(lambda: ep.sweep(directory)) == "[]"
    os.chown(path, 65534, 65534)
    with pytest.raises(EndpointError, match="belongs to user 65534"):
        ep.read(path)
    assert ep.discover(directories=[directory], kernel=Kernel({100: 7})) == []


# Sockets


@pytest.fixture
def listening(directory: Path) -> Iterator[tuple[Path, socket.socket]]:
    path = directory / socket_name(5)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        yield path, listener


def test_sweep_removes_stale_sockets_only(listening: tuple[Path, socket.socket], directory: Path) -> None:
    """A socket file is removed, with its lock file, only if no process accepts connections on it."""
    path, listener = listening
    assert ep.sweep(directory) == []
    listener.close()
    assert [path] == ep.sweep(directory)
    assert os.listdir(directory) == []


def test_sweep_leaves_a_socket_bound_but_not_listening(directory: Path) -> None:
    """Between bind and listen a connect is refused, and only the lock shows that the owner lives."""
    path = directory / socket_name(6)
    held = SocketLock(path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        assert not answers(path)
        assert ep.sweep(directory) == []
    held.release()
    held.release()
    assert [path] == ep.sweep(directory)


def test_sweep_never_connects_to_the_agents_socket(directory: Path) -> None:
    """A sweep never probes the socket of the agent, because a connection would start it."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(agent_socket(directory)))
    assert ep.sweep(directory) == []
    assert agent_socket(directory).exists()


def test_socket_lock_held_refuses_a_second_holder(directory: Path) -> None:
    """The second holder is refused in a sentence; after the release, or after a forked child closed it, it is free."""
    path = directory / "a.sock"
    first = SocketLock(path)
    with pytest.raises(EndpointError, match="another sidecar is serving"):
        SocketLock(path)
    first.release()
    SocketLock(path).release()
    assert os.listdir(directory) == []


def test_socket_lock_removed_while_waiting_is_created_again(directory: Path) -> None:
    """A lock on a file that is no longer there protects nothing, so the file is made again."""
    path = directory / "a.sock"
    first = SocketLock(path)
    os.unlink(f"{path}.lock")
    second = SocketLock(path)
    assert os.path.exists(f"{path}.lock")
    first.close()
    second.release()


def test_import_of_the_runtime_file_loads_no_service() -> None:
    """Importing the endpoint loads no web framework, no server and no pydantic."""
    code = (
        "import sys, vitalsd.discovery.runtime_file; print([m for m in sys.modules if m.split('.')[0] in sys.argv[1:]])"
    )
    command = [sys.executable, "-c", code, "fastapi", "starlette", "uvicorn", "pydantic", "asyncio", "anyio"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"
