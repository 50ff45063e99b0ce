"""Listeners and the life of ``vitalsd serve``: packages `vitalsd.sidecar` and `vitalsd.http.access`."""

import asyncio
import http.client
import json
import os
import platform
import re
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import pytest

from support.edge import dial, whole_app
from support.paths import SUPPORT
from support.sidecars import VITALSD, UnixConnection, ask, environment, eventually, listing, serving
from support.stopwatch import Stopwatch
from vitalsd.discovery import runtime_file as endpoint
from vitalsd.discovery.unix_socket import answers
from vitalsd.recording.run_directory import RunDirectory
from vitalsd.sidecar.listen_errors import ListenError, PortInUseError
from vitalsd.sidecar.listeners import adopt, listen
from vitalsd.sidecar.service import Service
from vitalsd.sidecar.socket_activation import inherited
from vitalsd.sidecar.tcp_listener import bind_tcp, is_remote
from vitalsd.sidecar.unix_listener import UnixListener


def refused(directory: Path, *options: str) -> tuple[int, str]:
    """Status and stderr of a ``serve`` that does not get to serve."""
    done = subprocess.run(
        [*VITALSD, "serve", *options], env=environment(directory), capture_output=True, text=True, timeout=20
    )
    return done.returncode, done.stderr


def last_words(process: "subprocess.Popen[str]") -> str:
    assert process.stderr is not None
    return process.stderr.read()


# Listeners


def test_unix_socket_is_private_under_every_umask(short_path: Path) -> None:
    """The socket has mode 0600 in a directory of mode 0700, whether the umask is 0 or not."""
    for umask in (0o000, 0o077, 0o777):
        path = short_path / f"run{umask}" / "a.sock"
        old = os.umask(umask)
        try:
            with UnixListener(path):
                assert stat.S_IMODE(path.stat().st_mode) == 0o600
                assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        finally:
            os.umask(old)
        assert listing(path.parent) == []


def test_listen_on_a_live_socket_is_refused(short_path: Path) -> None:
    """A second sidecar on the path is refused, and the first one still answers there."""
    path = short_path / "a.sock"
    with UnixListener(path) as first:
        with pytest.raises(ListenError, match="another sidecar"):
            UnixListener(path)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            first.socket.accept()[0].close()


def test_listen_on_a_live_socket_without_a_lock_is_refused(short_path: Path) -> None:
    """A live socket without a lock of ours is refused as well."""
    path = short_path / "a.sock"
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.bind(str(path))
        stranger.listen(1)
        with pytest.raises(ListenError, match="in use by another process"):
            UnixListener(path)
        assert listing(short_path) == ["a.sock"]


def test_listen_on_a_stale_socket_replaces_it(short_path: Path) -> None:
    """The files of a killed sidecar do not prevent the start."""
    path = short_path / "a.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    (short_path / "a.sock.lock").touch()
    with UnixListener(path):
        assert answers(path)
    assert listing(short_path) == []


def test_listen_on_a_path_with_a_file_leaves_it(short_path: Path) -> None:
    """Anything but a socket at the path, a symlink too, is never removed."""
    (short_path / "file").write_text("mine")
    (short_path / "link").symlink_to(short_path / "file")
    for name in ("file", "link"):
        with pytest.raises(ListenError, match="left alone"):
            UnixListener(short_path / name)
    assert (short_path / "file").read_text() == "mine"
    assert listing(short_path) == ["file", "link"]


def test_close_removes_only_its_own_socket(short_path: Path) -> None:
    """The close removes the socket file only if it is the one that the listener made."""
    path = short_path / "a.sock"
    listener = UnixListener(path)
    path.unlink()
    path.write_text("of another program")
    listener.close()
    listener.close()
    assert listing(short_path) == ["a.sock"]


def test_listen_in_a_directory_writable_by_others_is_refused(short_path: Path) -> None:
    """Writable by others without the sticky bit, or another user's: no socket goes there."""
    short_path.chmod(0o777)
    with pytest.raises(ListenError, match="may be written by other users"):
        UnixListener(short_path / "a.sock")
    short_path.chmod(0o1777)
    UnixListener(short_path / "a.sock").close()
    if os.geteuid() == 0:
        os.chown(short_path, 65534, 65534)
        with pytest.raises(ListenError, match="belongs to user 65534"):
            UnixListener(short_path / "a.sock")


def test_listen_on_a_path_too_long_or_missing_is_a_listen_error(short_path: Path) -> None:
    """The error states what the kernel would refuse, and nothing stays open."""
    (short_path / "file").touch()
    for path, reason in (
        (short_path / ("x" * 120), "bytes long"),
        (short_path / "file" / "a.sock", "Not a directory"),
    ):
        with pytest.raises(ListenError, match=reason):
            UnixListener(path)
        with pytest.raises(ListenError, match=reason):
            listen(port=0, uds=path)


@pytest.mark.parametrize("left", [0, 1, 2])
def test_listen_without_descriptors_is_a_listen_error_and_leaves_nothing(short_path: Path, left: int) -> None:
    """Whichever of TCP, lock and Unix socket gets none: a ListenError, and neither a socket nor a file is left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        with suppress(OSError):
            while True:
                taken.append(os.dup(0))
        for _ in range(left):
            os.close(taken.pop())
        with pytest.raises(ListenError, match="Too many open files"):
            listen(port=0, uds=short_path / "a.sock")
        taken += [os.dup(0) for _ in range(left)]  # there are as many as before
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in taken:
            os.close(fd)
    assert listing(short_path) == []


@pytest.mark.parametrize(
    ("host", "remote"),
    [("127.0.0.1", False), ("localhost", False), ("127.8.8.8", False), ("::1", False), ("0.0.0.0", True), ("::", True)],
)
def test_address_other_than_loopback_is_remote(host: str, remote: bool) -> None:
    """A wildcard address is as remote as any other."""
    assert is_remote(host) is remote


def test_listen_without_tcp_and_path_is_an_error() -> None:
    """No TCP and no path for a Unix socket is an error, not a sidecar without an address."""
    with pytest.raises(ListenError, match="nothing to listen on"):
        listen(tcp=False)


def test_inherited_descriptor_becomes_a_socket_of_its_family(short_path: Path) -> None:
    """A descriptor becomes a socket of the right family and protocol that no child inherits."""
    tcp = bind_tcp("127.0.0.1", 0)
    taken = inherited(tcp.detach())
    assert (taken.family, taken.proto) == (socket.AF_INET, socket.IPPROTO_TCP)
    assert not taken.get_inheritable()
    taken.close()
    with socket.socket(socket.AF_UNIX) as silent, open(short_path / "file", "w") as file:
        for number, reason in ((silent.detach(), "not a listening"), (file.fileno(), "not a socket")):
            with pytest.raises(ListenError, match=reason):
                inherited(number)


def test_inherited_remote_listener_needs_both_options() -> None:
    """A unit that listens on every interface needs the same two options as --host."""
    remote = bind_tcp("0.0.0.0", 0)
    with pytest.raises(ListenError, match="--allow-remote"):
        adopt([remote], guarded=True, allow_remote=False)
    assert remote.fileno() == -1


# Options


def test_server_answers_on_unix_socket_and_tcp(short_path: Path) -> None:
    """The Unix socket and TCP lead to the same service."""
    with serving(short_path) as (process, ready):
        over_tcp, over_unix = ask(ready["url"], "/info"), ask(ready["socket"], "/info")
        assert over_tcp[0] == over_unix[0] == 200
        assert over_tcp[1]["self"]["pid"] == over_unix[1]["self"]["pid"] == process.pid == ready["pid"]


def test_serve_no_tcp_and_uds_listens_on_the_given_path_only(short_path: Path) -> None:
    """--no-tcp listens on the Unix socket alone, and --uds puts it where it is wanted."""
    path = str(short_path / "my.sock")
    with serving(short_path, "--no-tcp", "--uds", path) as (_, ready):
        assert (ready["url"], ready["socket"]) == (None, path)
        assert ask(path, "/healthz")[0] == 200


def test_keep_alive_request_is_answered_within_10_ms(short_path: Path) -> None:
    """A kept connection is answered in less than 10 ms, over TCP and over the Unix socket; Nagle costs 40."""
    with serving(short_path) as (_, ready):
        for connection in (
            http.client.HTTPConnection(ready["url"].removeprefix("http://")),
            UnixConnection(ready["socket"]),
        ):
            spent = []
            for _ in range(50):
                begun = time.perf_counter()
                connection.request("GET", "/healthz")
                connection.getresponse().read()
                spent.append(time.perf_counter() - begun)
            connection.close()
            assert sorted(spent)[25] < 0.01


def test_date_header_is_the_time_of_the_answer(short_path: Path) -> None:
    """It is right in every answer, also 1 s later, although the sidecar did not wake in between."""
    with serving(short_path, "--record-interval", "0") as (_, ready):
        connection = http.client.HTTPConnection(ready["url"].removeprefix("http://"))
        for _ in range(2):
            begun = int(time.time())
            connection.request("GET", "/healthz")
            response = connection.getresponse()
            response.read()
            assert begun <= parsedate_to_datetime(response.headers["Date"]).timestamp() <= time.time()
            time.sleep(1.1)
        connection.close()


def test_sidecar_without_a_recorder_wakes_no_thread(short_path: Path) -> None:
    """Without a recorder none of its threads wakes before a request."""

    def naps(pid: int) -> int:
        files = Path(f"/proc/{pid}/task").glob("*/status")
        return sum(
            int(line.split()[1]) for file in files for line in file.read_text().splitlines() if "ctxt_sw" in line
        )

    with serving(short_path, "--record-interval", "0") as (process, ready):
        assert ask(ready["url"], "/healthz")[0] == 200
        time.sleep(0.5)
        before = naps(process.pid)
        time.sleep(3)
        assert naps(process.pid) == before


def test_serve_with_the_default_port_busy_takes_another_with_a_note(short_path: Path) -> None:
    """If 9779 is taken, a free port is used, printed, and in the runtime file."""
    with ExitStack() as stack:
        with suppress(PortInUseError):  # the port of another program serves as well
            stack.enter_context(bind_tcp("127.0.0.1", 9779))
        process = stack.enter_context(
            subprocess.Popen([*VITALSD, "serve"], env=environment(short_path), stderr=subprocess.PIPE, text=True)
        )
        eventually(lambda: any(name.endswith(".json") for name in listing(short_path / "run")), 10)
        found = endpoint.discover(directories=[short_path / "run"])[0]
        assert found.port not in (None, 9779)
        assert ask(str(found.url), "/healthz")[0] == 200
        process.terminate()
        said = last_words(process)
        assert "port 9779 on 127.0.0.1 is in use; taking a free one" in said
        assert f"{found.url}/metrics" in said


def test_serve_with_an_explicit_port_busy_exits_with_2_and_one_line(short_path: Path) -> None:
    """A port that was asked for by number is not replaced."""
    with bind_tcp("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        status, said = refused(short_path, "--port", str(port))
    assert (status, said.count("\n")) == (2, 1)
    assert f"port {port} on 127.0.0.1 is in use" in said
    assert listing(short_path / "run") == []


@pytest.mark.parametrize("options", [(), ("--auth", "token"), ("--allow-remote",)])
@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_serve_on_a_remote_address_needs_two_options(short_path: Path, host: str, options: tuple[str, ...]) -> None:
    """Anything but loopback without both --auth token and --allow-remote is refused with status 2."""
    status, said = refused(short_path, "--host", host, "--port", "0", *options)
    assert status == 2
    assert "needs both --auth token and --allow-remote" in said


def test_serve_on_a_remote_address_warns_and_demands_the_token(short_path: Path) -> None:
    """With both options it serves, and warns at each start that nothing is encrypted."""
    with serving(short_path, "--host", "0.0.0.0", "--auth", "token", "--allow-remote") as (process, ready):
        assert ask(ready["url"], "/metrics?window_ms=10")[0] == 401
        process.terminate()
        assert "nothing is encrypted" in last_words(process)


def test_serve_with_a_host_name_exits_with_2(short_path: Path) -> None:
    """A name is not resolved, because it may have several addresses."""
    assert refused(short_path, "--host", "example.com")[0] == 2


def test_token_is_required_over_tcp_only(short_path: Path) -> None:
    """No token, a wrong one, two of them: 401 and a problem; the right one, the Unix socket, /healthz: 200."""
    with serving(short_path, "--auth", "token") as (process, ready):
        found = endpoint.read(Path(ready["runtime_file"]))
        assert found.token is not None
        assert "token" not in ready
        for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": found.token}):
            status, body = ask(ready["url"], "/info", headers)
            assert (status, body["reason"]) == (401, "token")
            assert found.token not in json.dumps(body)
        assert ask(ready["url"], "/info", {"Authorization": f"Bearer {found.token}"})[0] == 200
        assert ask(ready["url"], "/healthz")[0] == 200
        assert ask(ready["socket"], "/info")[0] == 200
        with open(f"/proc/{process.pid}/cmdline", "rb") as file:
            assert found.token.encode() not in file.read()
        process.terminate()
        assert found.token not in last_words(process)


def test_serve_without_a_runtime_directory_serves_over_tcp_with_a_note(short_path: Path) -> None:
    """No usable runtime directory costs the Unix socket and the discovery, not the service."""
    (short_path / "file").touch()
    env = environment(short_path) | {"VITALSD_RUNTIME_DIR": str(short_path / "file")}
    with serving(short_path, env=env) as (process, ready):
        assert (ready["socket"], ready["runtime_file"]) == (None, None)
        assert ask(ready["url"], "/healthz")[0] == 200
        process.terminate()
        assert "no Unix socket and no runtime file" in last_words(process)


def test_serve_that_fails_writes_the_reason_to_the_ready_fd(short_path: Path) -> None:
    """The reader of the ready-fd gets the reason, whatever it is."""
    with bind_tcp("127.0.0.1", 0) as taken, serving(short_path, port=str(taken.getsockname()[1])) as (process, ready):
        assert "is in use" in ready["error"]
        assert process.wait(5) == 2
    with serving(short_path, "--pid", str(2**22 + 1)) as (process, ready):
        assert ready == {"error": f"no process has pid {2**22 + 1}"}
        assert process.wait(5) == 1
    assert refused(short_path, "--ready-fd", "99")[0] == 2
    with open(os.devnull, "rb") as unfit:
        command = [*VITALSD, "serve", "--port", "0", "--ready-fd", "0"]
        done = subprocess.run(
            command, stdin=unfit, env=environment(short_path), capture_output=True, text=True, timeout=20
        )
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, "Error: --ready-fd 0: it cannot be written to")


def test_serve_with_a_closed_ready_fd_reader_serves(short_path: Path) -> None:
    """A client that dies before its sidecar is ready leaves a closed pipe, and the sidecar serves."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [*VITALSD, "serve", "--port", "0", "--ready-fd", str(writer)]
    with subprocess.Popen(
        command, env=environment(short_path), stderr=subprocess.DEVNULL, pass_fds=(writer,)
    ) as process:
        os.close(writer)
        eventually(lambda: any(name.endswith(".json") for name in listing(short_path / "run")), 10)
        process.terminate()
        assert process.wait(5) == 0


# Discovery

OTHER_UID = 65534


def home(directory: Path) -> dict[str, str]:
    """Return an environment with this home directory."""
    return {"PATH": "/usr/bin:/bin", "HOME": str(directory)}


def test_endpoints_lists_live_sidecars_and_removes_stale_files(short_path: Path) -> None:
    """After kill -9 nothing of the sidecar is listed or left; a live one is, without its token."""
    env = environment(short_path)

    def endpoints(*options: str) -> str:
        command = [*VITALSD, "endpoints", *options]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout

    with serving(short_path) as (killed, _):
        killed.kill()
        killed.wait()
        assert len(listing(short_path / "run")) == 3
    assert endpoints() == "no sidecar of yours is running\n"
    assert listing(short_path / "run") == []
    with serving(short_path, "--auth", "token") as (process, ready):
        token = endpoint.read(Path(ready["runtime_file"])).token
        assert token is not None
        shown = json.loads(endpoints("--json"))
        assert [(each["pid"], each["state"], each["token"]) for each in shown] == [(process.pid, "alive", True)]
        assert ready["url"] in endpoints()
        assert token not in endpoints("--json") + endpoints()


def test_endpoints_check_exits_with_0_only_if_all_answer(short_path: Path) -> None:
    """Exit status 0 while all sidecars are well; 1, with the reason, if one does not answer or there is none."""

    def check(*options: str) -> tuple[int, str, str]:
        command = [*VITALSD, "endpoints", "--check", *options]
        done = subprocess.run(command, env=environment(short_path), capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    assert check() == (1, "no sidecar of yours is running\n", "")
    with serving(short_path), serving(short_path, "--no-tcp") as (stalled, _):
        assert check()[0] == 0
        assert check()[2] == ""
        stalled.send_signal(signal.SIGSTOP)
        status, listed, complaint = check()
        assert (status, len(listed.splitlines())) == (1, 3)
        assert f"sidecar-{stalled.pid}.json: " in complaint
        assert "sent no answer within 3" in complaint
        status, listed, _ = check("--json")
        healthy = {each["pid"]: each["healthy"] for each in json.loads(listed)}
        assert (status, healthy.pop(stalled.pid), list(healthy.values())) == (1, False, [True])


@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="needs root on Linux to start a sidecar as another user"
)
def test_endpoints_of_two_users_list_their_own_sidecars(short_path: Path) -> None:
    """Each of two users finds only the own sidecar, and owns its files."""
    short_path.chmod(0o755)
    stranger = (sys.executable, str(SUPPORT / "stranger.py"), "0")
    commands = {0: VITALSD, OTHER_UID: stranger}
    started: dict[int, subprocess.Popen[str]] = {}
    homes = {uid: short_path / str(uid) for uid in commands}
    try:
        for uid, command in commands.items():
            homes[uid].mkdir(mode=0o700)
            os.chown(homes[uid], uid, uid)
            started[uid] = subprocess.Popen(
                [*command, "serve", "--port", "0"], env=home(homes[uid]), stderr=subprocess.PIPE, text=True
            )
            said = started[uid].stderr
            assert said is not None
            assert "serving itself" in said.readline()
        sockets = {}
        for uid, command in commands.items():
            out = subprocess.run(
                [*command, "endpoints", "--json"], env=home(homes[uid]), capture_output=True, text=True, check=True
            )
            (found,) = json.loads(out.stdout)
            assert found["pid"] == started[uid].pid
            sockets[uid] = found["socket"]
            assert Path(found["file"]).stat().st_uid == uid
        # Neither trusts the directory of the other, even if it is named; root could read it.
        for uid, other in ((0, OTHER_UID), (OTHER_UID, 0)):
            where = str(Path(sockets[other]).parent)
            out = subprocess.run(
                [*commands[uid], "endpoints", "--json"],
                env=home(homes[uid]) | {"VITALSD_RUNTIME_DIR": where},
                capture_output=True,
                text=True,
            )
            assert json.loads(out.stdout or "[]") == []
            assert started[other].poll() is None
            assert Path(sockets[other]).exists()
    finally:
        for process in started.values():
            process.terminate()
            process.wait(10)
            assert process.stderr is not None
            process.stderr.close()


def test_runtime_file_names_the_target(short_path: Path) -> None:
    """A client that looks for the sidecar of a pid finds the one that watches it first."""
    target = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with serving(short_path, "--pid", str(target.pid)) as (watching, _), serving(short_path):
            found = endpoint.discover(target.pid, directories=[short_path / "run"])
            first, second = found
            assert first.pid == watching.pid != second.pid
    finally:
        target.kill()
        target.wait()


# The end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_serve_sigterm_sigint_or_sighup_exits_with_0_and_leaves_nothing(
    short_path: Path, number: signal.Signals
) -> None:
    """SIGTERM, SIGINT and SIGHUP: status 0, no file, no socket, no black box left open."""
    with serving(short_path) as (process, _):
        process.send_signal(number)
        assert process.wait(5) == 0
        assert listing(short_path / "run") == []


def test_serve_without_a_state_directory_serves_with_a_note(short_path: Path) -> None:
    """A note states once what is missing, and no earlier run is available."""
    env = environment(short_path) | {"VITALSD_STATE_DIR": str(short_path / "file")}
    (short_path / "file").touch()
    with serving(short_path, env=env) as (_, ready):
        assert ask(ready["url"], "/metrics?window_ms=10")[0] == 200
        assert ask(ready["url"], "/runs") == (200, [])
        assert ask(ready["url"], "/info")[1]["recorder"]["black_box"] is None


def test_serve_with_sighup_ignored_keeps_ignoring_it(short_path: Path) -> None:
    """A SIGHUP that was ignored at the start stays ignored."""
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with serving(short_path) as (process, ready):
            process.send_signal(signal.SIGHUP)
            time.sleep(0.2)
            assert ask(ready["url"], "/healthz")[0] == 200
    finally:
        signal.signal(signal.SIGHUP, old)


def stalled(url: str, content: bytes) -> socket.socket:
    """A client that has sent so much, with the Host in it that is right."""
    host, port = url.removeprefix("http://").split(":")
    client = socket.create_connection((host, int(port)), timeout=10)
    client.sendall(content.replace(b"Host: HERE", f"Host: {host}:{port}".encode()))
    return client


def test_serve_sigterm_with_open_requests_exits_with_0_within_3_s(short_path: Path) -> None:
    """Exit 0 in under 3 s; open windows are answered 503, streams end whole, files and sockets are gone."""
    with ExitStack() as stack:
        process, ready = stack.enter_context(serving(short_path))
        for content in (b"", b"GET /metr", b"GET /metrics HTTP/1.1\r\nHost: HERE\r\n"):
            for _ in range(16):
                stack.enter_context(stalled(ready["url"], content))
        never_reads = [
            stack.enter_context(
                stalled(ready["url"], b"GET /metrics?window_ms=10 HTTP/1.1\r\nHost: HERE\r\n\r\n" * 3000)
            )
            for _ in range(2)
        ]
        window = stack.enter_context(
            stalled(ready["url"], b"GET /metrics?window_ms=60000 HTTP/1.1\r\nHost: HERE\r\n\r\n")
        )
        stream = stack.enter_context(
            stalled(ready["url"], b"GET /stream?interval_ms=100 HTTP/1.1\r\nHost: HERE\r\n\r\n")
        )
        stream.recv(10)
        time.sleep(0.3)
        watch = Stopwatch()
        process.terminate()
        assert process.wait(10) == 0
        assert watch.elapsed_s < watch.allowed_s(3)
        assert listing(short_path / "run") == []
        answer = b"".join(iter(lambda: window.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b'"reason": "stopping"' in answer
        assert b"".join(iter(lambda: stream.recv(65536), b"")).endswith(b"0\r\n\r\n")
        assert never_reads
        assert "Traceback" not in last_words(process)


def test_serve_sigterm_answers_a_window_that_ends_within_a_second(short_path: Path) -> None:
    """A window that ends within the second of grace gets its numbers."""
    with serving(short_path) as (process, ready):
        with stalled(ready["url"], b"GET /metrics?window_ms=400 HTTP/1.1\r\nHost: HERE\r\n\r\n") as window:
            time.sleep(0.1)
            process.terminate()
            assert b"".join(iter(lambda: window.recv(65536), b"")).startswith(b"HTTP/1.1 200 ")
        assert process.wait(5) == 0


def test_serve_sigterm_to_process_and_group_ends_cleanly(short_path: Path) -> None:
    """Two signals, to the process and then to its group, end it as cleanly as one."""
    for pause_s in (0, 0.001, 0.01, 0.02, 0.03, 0.05):
        with serving(short_path) as (process, _):
            process.terminate()
            time.sleep(pause_s)
            process.terminate()
            assert process.wait(5) == 0
    assert {run.state for run in RunDirectory(short_path / "state" / "runs").runs()} == {"clean"}


def test_serve_second_sigterm_exits_at_once_and_leaves_no_file(short_path: Path) -> None:
    """The second SIGTERM does not wait for open windows, and still leaves no file."""
    with serving(short_path) as (process, ready):
        with stalled(ready["url"], b"GET /metrics?window_ms=60000 HTTP/1.1\r\nHost: HERE\r\n\r\n"):
            time.sleep(0.2)
            process.terminate()
            time.sleep(0.5)
            watch = Stopwatch()
            process.terminate()
            assert process.wait(5) == -signal.SIGTERM
            assert watch.elapsed_s < watch.allowed_s(0.5)
        assert listing(short_path / "run") == []


@pytest.mark.skipif(
    sys.platform != "linux" or tuple(map(int, re.findall(r"\d+", platform.release())[:2])) < (6, 15),
    reason="this kernel tells only the parent how a process ended",
)
@pytest.mark.parametrize(
    ("code", "state", "how"),
    [
        ("exit 0", "clean", "exit status 0"),
        ("exit 1", "crashed", "exit status 1"),
        ("kill -ABRT $$", "crashed", "killed by SIGABRT"),
    ],
)
def test_run_of_a_target_that_exits_with_0_is_clean(short_path: Path, code: str, state: str, how: str) -> None:
    """Its run says how it ended, and no report takes one that just ended for a crash."""
    target = subprocess.Popen(["sh", "-c", f"read _; ulimit -c 0; {code}"], stdin=subprocess.PIPE)
    options = ("--pid", str(target.pid), "--exit-with-target", "--record-interval", "0.05")
    with serving(short_path, *options) as (process, _):
        target.communicate(b"\n")
        assert process.wait(5) == 0
    (run,) = RunDirectory(short_path / "state" / "runs").runs()
    assert run.state == state
    zombie = "; its parent has not yet collected it (zombie)"  # where the sidecar was faster than we are
    assert (run.ended or "").replace(zombie, "") == f"target {target.pid} has exited: {how}"


def test_runtime_file_removed_is_written_again(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written again with its directory, as after a cleanup of temporary files, without the removed socket."""
    monkeypatch.setattr("vitalsd.sidecar.service.FILE_CHECK_S", 0.05)
    directory = short_path / "run"
    directory.mkdir(0o700)
    service = Service(whole_app(), listen(port=0, directory=directory), directory=directory)

    async def cleaned(sidecar: Service) -> None:
        before = endpoint.read(directory / f"sidecar-{os.getpid()}.json")
        assert before.socket is not None
        shutil.rmtree(directory)
        while not (path := directory / f"sidecar-{os.getpid()}.json").exists():
            await asyncio.sleep(0.01)
        assert endpoint.read(path) == replace(before, socket=None)
        sidecar.stop()

    asyncio.run(asyncio.wait_for(service.run(lambda: None, [cleaned]), 10))
    assert listing(directory) == []


def test_serve_with_a_background_task_that_raises_fails() -> None:
    """The error ends the sidecar, so that its supervisor can start it again; nothing of it is left."""

    async def broken(_: Service) -> None:
        raise LookupError("a bug in a background task")

    service = Service(whole_app(), listen(port=0))
    with pytest.raises(LookupError, match="a bug in a background task"):
        asyncio.run(service.run(lambda: None, [broken]))
    with pytest.raises(OSError, match="efused"):
        dial(service.endpoint.url or "")


# --name


def test_serve_name_waits_and_follows_restarts(short_path: Path) -> None:
    """It waits for the process, measures it, says Unavailable when it is gone, and takes up the next run."""
    program = short_path / "ryll-test"
    program.symlink_to("/bin/sleep")
    with serving(short_path, "--name", "ryll-test", "--record-interval", "0.1") as (_, ready):
        status, body = ask(ready["url"], "/metrics?window_ms=10")
        assert (status, body["available"]) == (404, False)
        assert body["reason"].startswith("no process of yours is named ryll-test; ")
        assert body["reason"].endswith("; waiting for one")
        _, info = ask(ready["url"], "/info")
        assert info["target"] == body, "what cannot be measured has one shape everywhere"
        assert endpoint.read(Path(ready["runtime_file"])).target is None
        for _ in range(2):
            target = subprocess.Popen([str(program), "60"])

            def watched(pid: int = target.pid) -> bool:
                found = endpoint.read(Path(ready["runtime_file"])).target
                return found is not None and found.pid == pid

            eventually(watched)
            assert ask(ready["url"], "/info")[1]["target"]["pid"] == target.pid
            assert ask(ready["url"], "/metrics?window_ms=10")[0] == 200
            with ThreadPoolExecutor() as pool:
                waiting = pool.submit(ask, ready["url"], "/metrics?window_ms=5000")
                time.sleep(0.3)
                target.kill()
                target.wait()
                status, body = waiting.result()
            assert (status, body["available"]) == (410, False)
            assert "has exited" in body["reason"]
            eventually(lambda: endpoint.read(Path(ready["runtime_file"])).target is None)
            assert ask(ready["url"], "/metrics?window_ms=10")[0] == 404
    runs = json.loads(
        subprocess.run(
            [*VITALSD, "runs", "--json"], env=environment(short_path), capture_output=True, check=True
        ).stdout
    )
    assert [run["state"] for run in runs] == ["crashed", "crashed"]


def target_of(ready: dict[str, Any]) -> int | None:
    """Return the pid of the target in the runtime file."""
    target = endpoint.read(Path(ready["runtime_file"])).target
    return None if target is None else target.pid


def test_serve_name_follows_an_exec_until_the_next_start(short_path: Path) -> None:
    """A launcher that executes the program stays the target, by its new name, until it is started again."""
    program = short_path / "ryll-test"
    program.symlink_to(sys.executable)
    code = "import os, sys; sys.stdin.readline(); os.execv('/bin/sleep', ['sleep', '60'])"

    def launcher() -> "subprocess.Popen[bytes]":
        return subprocess.Popen([str(program), "-c", code], stdin=subprocess.PIPE)

    with serving(short_path, "--name", "ryll-test", "--record-interval", "0.1") as (_, ready), ExitStack() as stack:

        def watched() -> tuple[int, str] | None:
            target = ask(ready["url"], "/info")[1]["target"]
            return (target["pid"], target["name"]) if "pid" in target else None

        first = stack.enter_context(launcher())
        stack.callback(first.kill)
        eventually(lambda: watched() == (first.pid, "ryll-test"))
        assert first.stdin is not None
        first.stdin.write(b"\n")
        first.stdin.flush()
        eventually(lambda: watched() == (first.pid, "sleep"))
        second = stack.enter_context(launcher())
        stack.callback(second.kill)
        eventually(lambda: watched() == (second.pid, "ryll-test"), 15)
        eventually(lambda: target_of(ready) == second.pid)


# The environment


def test_serve_ignores_a_hostile_environment(short_path: Path) -> None:
    """Variables for proxies, certificates, workers and telemetry have no effect: it serves and connects nowhere."""
    with socket.create_server(("127.0.0.1", 0)) as spy:
        spy.settimeout(0.2)
        url = f"http://127.0.0.1:{spy.getsockname()[1]}"
        hostile = {
            **{name: url for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy")},
            **{name: "/nowhere" for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "SSLKEYLOGFILE")},
            "WEB_CONCURRENCY": "many",
            "FORWARDED_ALLOW_IPS": "*",
            "UVICORN_HOST": "0.0.0.0",
            "FASTAPI_ENV": "development",
            "FASTAPI_OTEL_AUTO_CONFIGURE": "true",
            "OTEL_EXPORTER_OTLP_ENDPOINT": url,
            "OTEL_BSP_SCHEDULE_DELAY": "10",
            "OTEL_METRIC_EXPORT_INTERVAL": "10",
            "PYTHONWARNINGS": "error",
            "PYTHONASYNCIODEBUG": "1",
            "PYTHONIOENCODING": "ascii",
            "LC_ALL": "C",
            "TZ": "Asia/Kathmandu",
        }
        with serving(short_path, "--auth", "token", env=environment(short_path) | hostile) as (process, ready):
            token = endpoint.read(Path(ready["runtime_file"])).token
            for headers in ({}, {"X-Forwarded-For": "unix"}, {"Forwarded": "for=unix"}):
                assert ask(ready["url"], "/info", headers)[0] == 401
            assert ask(ready["url"], "/metrics?window_ms=10", {"Authorization": f"Bearer {token}"})[0] == 200
            assert ask(ready["socket"], "/metrics?window_ms=10")[0] == 200
            process.terminate()
            assert process.wait(5) == 0
            assert last_words(process).count("\n") == 1
        with pytest.raises(TimeoutError):
            spy.accept()
