"""Host programs that make demands: what `start`, `spawn`, `fetch` and `BugReport` do in each of them."""

import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

import pytest

import vitalsd
from support.host_programs import bare_environment, run_host, site_packages_without
from support.paths import ROOT
from support.sidecars import environment
from vitalsd.worker_thread import NoThreadError

pytestmark = pytest.mark.live

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
root_only = pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs root on Linux")


# Signals


@linux_only
def test_threads_of_vitalsd_block_all_signals_that_a_host_may_collect(short_path: Path) -> None:
    """So do those of `start`, the server's libraries and `fetch`; signals that a thread causes stay unblocked."""
    host = """
        import json, os, signal, threading
        from pathlib import Path
        import vitalsd
        from support.sidecars import ask
        from vitalsd_client import fetch

        def mask(tid):
            [line] = [x for x in Path(f"/proc/self/task/{tid}/status").read_text().splitlines() if "SigBlk" in x]
            bits = int(line.split()[1], 16)
            return sorted(number for number in range(1, 65) if bits >> number - 1 & 1)

        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGSEGV, signal.SIGUSR2})
        before = mask(os.getpid())
        sidecar = vitalsd.start(port=0)
        ask(sidecar.url, "/runs")
        fetching = threading.Thread(target=fetch, args=(700, "wait"))
        fetching.start()
        while not any(thread.name == "vitalsd-client" for thread in threading.enumerate()):
            pass
        own = {os.getpid(), fetching.native_id}
        masks = {0: [32]}
        while any(32 in mask for mask in masks.values()):  # glibc blocks its own as well while it makes a thread
            masks = {tid: mask(tid) for tid in map(int, os.listdir("/proc/self/task")) if tid not in own}
        fetching.join()
        print(json.dumps([before == mask(os.getpid()), list(masks.values())]))
        """
    unchanged, masks = json.loads(run_host(host, environment(short_path), directory=short_path).stdout)
    fatal = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGABRT, signal.SIGSYS}
    wanted = sorted(signal.valid_signals() - fatal - {signal.SIGKILL, signal.SIGSTOP})
    assert unchanged
    assert len(masks) >= 4
    assert masks == [wanted] * len(masks)


@linux_only
def test_host_that_waits_for_signals_collects_each_while_the_sidecar_is_busy(short_path: Path) -> None:
    """The host uses sigtimedwait or signalfd; a signal to a thread of vitalsd would kill the process."""
    host = """
        import os, signal, threading, vitalsd
        from vitalsd_client import fetch
        vitalsd.start(port=0, record_interval_s=0.02)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
        over = threading.Event()
        def ask():
            while not over.is_set():
                fetch(20, "wait")
        asking = threading.Thread(target=ask)
        asking.start()
        collected = 0
        for number in [signal.SIGUSR1, signal.SIGTERM] * 50:
            os.kill(os.getpid(), number)
            collected += signal.sigtimedwait({number}, 5) is not None
        over.set()
        asking.join()
        print(collected)
        """
    assert run_host(host, environment(short_path), directory=short_path).stdout == "100\n"


# Descriptors and environment

CLOSED = [numbers for count in range(4) for numbers in combinations(range(3), count)]


@linux_only
@pytest.mark.parametrize("closed", CLOSED, ids=lambda closed: "".join(map(str, closed)) or "none")
def test_host_with_closed_standard_descriptors_gets_its_sidecar(short_path: Path, closed: Sequence[int]) -> None:
    """`spawn` and `start` are ready, and no pipe, lock or listener of theirs has the number of one of the three."""
    host = f"""
        import json, os, vitalsd
        closed = {closed!r}
        result = os.dup2(1, 100, inheritable=False)
        for number in closed:
            os.close(number)
        def streams(pid):
            paths = {{number: f"/proc/{{pid}}/fd/{{number}}" for number in range(3)}}
            return {{number: os.readlink(path) for number, path in paths.items() if os.path.lexists(path)}}
        with vitalsd.spawn(port=0, options=["--linger", "0"]) as spawned:
            of_the_sidecar, after_spawn = streams(spawned.pid), streams("self")
        with vitalsd.start(port=0) as started:
            after_start = streams("self")
        os.write(result, json.dumps([of_the_sidecar, after_spawn, after_start]).encode())
        """
    said = run_host(host, environment(short_path), directory=short_path).stdout
    of_the_sidecar, after_spawn, after_start = json.loads(said)
    assert sorted(of_the_sidecar) == ["0", "1", "2"]
    assert {of_the_sidecar["0"], of_the_sidecar["1"]} == {"/dev/null"}
    # Standard error is a file without a name until the sidecar is ready.
    assert of_the_sidecar["2"] == "/dev/null" or of_the_sidecar["2"].endswith("(deleted)")
    assert not {str(number) for number in closed} & after_spawn.keys()
    assert {after_start[str(number)] for number in closed} <= {"/dev/null"}


@linux_only
def test_sidecar_of_a_systemd_service_sends_no_notification(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host of Type=notify: `spawn` and `start` send nothing to NOTIFY_SOCKET, and do not pass the variables on."""
    of_the_manager = {
        "NOTIFY_SOCKET": str(short_path / "notify"),
        "WATCHDOG_USEC": "200000",
        "WATCHDOG_PID": str(os.getpid()),
        "LISTEN_FDS": "1",
        "LISTEN_PID": str(os.getpid()),
        "LISTEN_FDNAMES": "http",
        "LISTEN_PIDFDID": "7",
    }
    for name, value in (environment(short_path) | of_the_manager | {"OF_THE_HOST": "1"}).items():
        monkeypatch.setenv(name, value)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(of_the_manager["NOTIFY_SOCKET"])
        manager.setblocking(False)
        with vitalsd.spawn(port=0) as sidecar:
            variables = Path(f"/proc/{sidecar.pid}/environ").read_text().split("\0")
        with vitalsd.start(port=0):
            pass
        with pytest.raises(BlockingIOError):  # both have ended, which would have been a message as well
            manager.recv(100)
    names = {each.partition("=")[0] for each in variables}
    assert "OF_THE_HOST" in names
    assert not names & of_the_manager.keys()


@linux_only
def test_sidecar_does_not_hold_the_working_directory_of_its_host(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A volume can be unmounted; paths and a command that are relative mean what they mean to the host."""
    for name, value in environment(Path("own")).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(short_path)
    program = short_path / "run-vitalsd"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -P -m vitalsd "$@"\n')
    program.chmod(0o755)
    with vitalsd.spawn(port=0, uds="my.sock", command=["./run-vitalsd"]) as sidecar:
        assert os.readlink(f"/proc/{sidecar.pid}/cwd") == "/"
        assert sidecar.socket == str(short_path / "my.sock")
        assert sidecar.runtime_file is not None
        assert sidecar.runtime_file.parent == short_path / "own" / "run"
        held = [os.readlink(each) for each in Path(f"/proc/{sidecar.pid}/fd").iterdir()]
        assert [each for each in held if each == str(short_path)] == []


# A start that fails


def test_start_that_fails_at_any_thread_leaves_nothing_and_the_next_one_works(short_path: Path) -> None:
    """The exception is the documented one, whichever of the threads the system does not give."""
    host = """
        import os, threading, vitalsd
        from pathlib import Path
        from support.sidecars import ask, eventually, listing
        directory = Path(os.environ["VITALSD_RUNTIME_DIR"])

        def held():
            threads = sorted(thread.name for thread in threading.enumerate())
            return threads, len(os.listdir("/dev/fd")), listing(directory)

        vitalsd.start(port=0).stop()
        before, begin, failed, said = held(), threading.Thread.start, 0, set()
        while True:
            left = [failed]
            def start(self):
                if not left[0]:
                    raise RuntimeError("can't start new thread")
                left[0] -= 1
                begin(self)
            threading.Thread.start = start
            try:
                sidecar = vitalsd.start(port=0)
                break
            except vitalsd.StartError as error:
                said.add(str(error))
            finally:
                threading.Thread.start = begin
            eventually(lambda: held() == before)
            failed += 1
            with vitalsd.start(port=0) as sidecar:
                assert ask(sidecar.url, "/metrics?window_ms=10")[0] == 200
            eventually(lambda: held() == before)
        sidecar.stop()
        eventually(lambda: held() == before)
        print(failed, *sorted(said), sep="\\n")
        """
    failed, *said = run_host(host, environment(short_path), directory=short_path).stdout.splitlines()
    assert int(failed) >= 3
    # A thread that the server's application begins is missed there, and the traceback is in the log.
    assert said == [
        "the sidecar could not be started: the application did not start; the log says why",
        f"the sidecar could not be started: {NoThreadError()}",
    ]


@linux_only
def test_start_short_of_descriptors_is_a_start_error_and_leaves_nothing(short_path: Path) -> None:
    """However many there are before it fails: no thread, no descriptor, no file and nothing on standard error."""
    host = """
        import gc, os, resource, threading, vitalsd
        from pathlib import Path
        from support.sidecars import ask, eventually, listing
        directory = Path(os.environ["VITALSD_RUNTIME_DIR"])

        def held():
            threads = sorted(thread.name for thread in threading.enumerate())
            return threads, len(os.listdir("/proc/self/fd")), listing(directory)

        vitalsd.start(port=0).stop()
        before, (_, most), said = held(), resource.getrlimit(resource.RLIMIT_NOFILE), []
        while True:
            resource.setrlimit(resource.RLIMIT_NOFILE, (before[1] - 1 + len(said), most))
            try:
                sidecar = vitalsd.start(port=0)
                break
            except (vitalsd.StartError, vitalsd.ListenError) as error:
                said.append(f"{type(error).__name__}: {error}")
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
            gc.collect()
            eventually(lambda: held() == before)
        sidecar.stop()
        with vitalsd.start(port=0) as sidecar:
            assert ask(sidecar.url, "/metrics?window_ms=10")[0] == 200
        eventually(lambda: held() == before)
        print(*said, sep="\\n")
        """
    done = run_host(host, environment(short_path), directory=short_path)
    said = done.stdout.splitlines()
    assert "StartError: the sidecar could not be started: Too many open files" in said
    assert all("Too many open files" in line for line in said)
    assert "Traceback" not in done.stderr


@root_only
def test_start_without_proc_is_a_start_error_and_the_next_one_works(short_path: Path) -> None:
    """/proc is covered in a mount namespace; the reason is in the exception, and no listener or lock stays."""
    host = """
        import os, subprocess, threading, vitalsd
        from pathlib import Path
        from support.sidecars import ask, listing
        directory = Path(os.environ["VITALSD_RUNTIME_DIR"])

        def held():
            opened = []
            for number in range(200):
                try:
                    opened.append(os.fstat(number).st_ino)
                except OSError:
                    pass
            return threading.active_count(), opened, listing(directory)

        vitalsd.start(port=0).stop()
        before = held()
        subprocess.run(["mount", "-t", "tmpfs", "none", "/proc"], check=True)
        try:
            vitalsd.start(port=0)
        except vitalsd.StartError as error:
            print(error)
        assert held() == before, (held(), before)
        subprocess.run(["umount", "/proc"], check=True)
        with vitalsd.start(port=0) as sidecar:
            assert ask(sidecar.url, "/metrics?window_ms=10")[0] == 200
        """
    said = run_host(
        host, environment(short_path), directory=short_path, python=["unshare", "--mount", sys.executable]
    ).stdout
    assert said.startswith("the sidecar could not be started: ")


# Interpreters


@pytest.mark.parametrize(
    ("executable", "reason"),
    [
        ("None", "sys.executable is empty, so there is no Python to run the sidecar with: pass command="),
        ("''", "sys.executable is empty, so there is no Python to run the sidecar with: pass command="),
        ("'/nonexistent/python'", "cannot run /nonexistent/python: No such file or directory"),
        ("'/bin/false'", "the sidecar ended with status 1 before it was ready"),
    ],
)
def test_host_with_an_unknown_executable_starts_or_gets_the_reason(
    short_path: Path, executable: str, reason: str
) -> None:
    """`start` needs none; `spawn` raises SpawnError, and works with the command that the error asks for."""
    host = f"""
        import sys, vitalsd
        from support.host_programs import answered
        python, sys.executable = sys.executable, {executable}
        try:
            vitalsd.spawn(port=0)
        except vitalsd.SpawnError as error:
            print(error)
        with vitalsd.start(port=0) as sidecar:
            assert answered(sidecar) == []
        with vitalsd.spawn(port=0, command=[python, "-P", "-m", "vitalsd"]) as sidecar:
            assert answered(sidecar) == []
        """
    assert run_host(host, environment(short_path), directory=short_path).stdout.startswith(reason)


def _base_python() -> str:
    base = str(getattr(sys, "_base_executable", sys.executable))
    if sys.prefix == sys.base_prefix or not os.path.exists(base):
        pytest.skip("needs a virtual environment with a base interpreter that has no vitalsd")
    return base


def test_host_with_a_path_of_its_own_gives_it_to_its_sidecar(short_path: Path) -> None:
    """In a PEX or shiv archive the interpreter alone does not find vitalsd; the program adds the path."""
    packages = site_packages_without(short_path / "packages", "vitalsd")
    host = f"""
        import sys
        sys.path[1:1] = [{str(ROOT / "service")!r}, {str(ROOT / "clients")!r}, {str(packages)!r}]
        import vitalsd
        from support.host_programs import answered
        with vitalsd.spawn(port=0) as sidecar:
            assert answered(sidecar) == []
        """
    run_host(host, _plain(short_path), directory=short_path, python=[_base_python()])


def test_sidecar_that_cannot_import_vitalsd_ends_with_the_reason(short_path: Path) -> None:
    """The last line of its standard error is in the exception."""
    host = f"""
        import vitalsd
        try:
            vitalsd.spawn(port=0, command=[{_base_python()!r}, "-I", "-m", "vitalsd"])
        except vitalsd.SpawnError as error:
            print(error)
        """
    said = run_host(host, environment(short_path), directory=short_path).stdout
    assert said.startswith("the sidecar ended with status 1 before it was ready: ")
    assert said.endswith(": No module named vitalsd\n")


def test_host_without_metadata_of_the_distribution_is_served(short_path: Path) -> None:
    """Vendored, or from PYTHONPATH: start, spawn, fetch and a saved report know the version all the same."""
    packages = site_packages_without(short_path / "packages", "vitalsd")
    host = """
        import importlib.metadata, json, vitalsd, zipfile
        from support.host_programs import answered
        from vitalsd_client import BugReport
        try:
            importlib.metadata.version("vitalsd")
        except importlib.metadata.PackageNotFoundError:
            print("no metadata")
        for begin in vitalsd.start, vitalsd.spawn:
            with begin(port=0) as sidecar:
                assert answered(sidecar) == []
                with zipfile.ZipFile(BugReport("host", window_ms=20).save()) as report:
                    assert json.loads(report.read("metadata.json"))["vitalsd"]["version"] == vitalsd.__version__
        """
    found = os.pathsep.join([str(ROOT / "service"), str(ROOT / "clients"), str(packages)])
    env = _plain(short_path) | {"PYTHONPATH": found}
    said = run_host(host, env, directory=short_path, python=[_base_python()]).stdout
    assert said == "no metadata\n"


def _plain(directory: Path) -> dict[str, str]:
    """Return the environment without a PYTHONPATH, which would lead to vitalsd."""
    return {name: value for name, value in environment(directory).items() if name != "PYTHONPATH"}


def _with_sitecustomize(directory: Path, code: str) -> dict[str, str]:
    """Return the environment of a program that runs `code` before all else; its sidecar does so, too."""
    (directory / "site").mkdir()
    (directory / "site" / "sitecustomize.py").write_text(code)
    return environment(directory) | {"PYTHONPATH": str(directory / "site")}


def test_python_without_sqlite_is_served_without_a_black_box(short_path: Path) -> None:
    """`start`, with or without `black_box`, and `spawn`: what is not on disk works, and /info says what is missing."""
    env = _with_sitecustomize(short_path, "import sys; sys.modules['_sqlite3'] = None")
    host = """
        import vitalsd
        from support.host_programs import answered
        from support.sidecars import ask
        for black_box in True, False:
            with vitalsd.start(port=0, black_box=black_box) as sidecar:
                assert answered(sidecar) == []
                print(ask(sidecar.url, "/info")[1]["recorder"]["black_box"])
        with vitalsd.spawn(port=0) as sidecar:
            assert answered(sidecar) == []
        """
    on, off = run_host(host, env, directory=short_path).stdout.splitlines()
    assert "the black box is off: this Python was built without SQLite" in on
    assert off == "None"


OPTIONS = ["-OO", "-I", "-E -s", "-X dev", "-W error", "-X importtime"]


@pytest.mark.parametrize("options", OPTIONS)
def test_host_with_options_of_the_interpreter_gets_all_answers(short_path: Path, options: str) -> None:
    """Without docstrings and assertions, without PYTHONPATH, and with each warning an error."""
    host = f"""
        import sys
        sys.path.append({str(ROOT / "tests")!r})
        import vitalsd
        from support.host_programs import answered
        for begin in vitalsd.start, vitalsd.spawn:
            with begin(port=0) as sidecar:
                if wrong := answered(sidecar):
                    sys.exit(str(wrong))
        """
    run_host(host, environment(short_path), directory=short_path, python=[sys.executable, *options.split()])


DEMANDS = {
    "streams that are None": "sys.stdin = sys.stdout = sys.stderr = None",
    "SIGCHLD ignored": "signal.signal(signal.SIGCHLD, signal.SIG_IGN)",
    "SIGCHLD handled": "signal.signal(signal.SIGCHLD, lambda *_: os.waitpid(-1, os.WNOHANG))",
    "a default timeout of sockets": "socket.setdefaulttimeout(0.5)",
    "variables of Python": (
        "os.environ.update(PYTHONINSPECT='1', PYTHONWARNINGS='error', PYTHONOPTIMIZE='2', PYTHONASYNCIODEBUG='1',"
        " PYTHONPROFILEIMPORTTIME='1', PYTHONIOENCODING='ascii', LC_ALL='C')"
    ),
}


@pytest.mark.parametrize("demand", DEMANDS)
def test_host_with_unusual_settings_gets_all_answers(short_path: Path, demand: str) -> None:
    """`start` and `spawn`; the spawned sidecar ends, by itself and with status 0 as far as the kernel tells."""
    host = f"""
        import os, signal, socket, sys, vitalsd
        from support.host_programs import answered
        {DEMANDS[demand]}
        with vitalsd.start(port=0) as sidecar:
            assert answered(sidecar) == []
        sidecar = vitalsd.spawn(port=0)
        assert answered(sidecar) == []
        assert sidecar.stop() == 0
        try:
            vitalsd.spawn(command=["/bin/false"])
        except vitalsd.SpawnError:
            os.write(1, b"refused")
        """
    assert run_host(host, environment(short_path), directory=short_path).stdout == "refused"


# Sockets and files

REPLACED = {
    "a class": """
import socket
class Proxied(socket.socket):
    def connect(self, address):
        raise OSError("the proxy is dead")
    connect_ex = connect
socket.socket = Proxied
""",
    "a function": """
import socket, ssl
made = socket.socket
def proxied(*arguments, **options):
    if "fileno" in options or len(arguments) > 3:
        return made(*arguments, **options)
    raise OSError("the proxy is dead")
socket.socket = proxied
""",
}


@pytest.mark.parametrize("replaced", REPLACED)
@pytest.mark.parametrize("place", ["both", "tcp", "unix"])
def test_host_that_replaces_socket_reaches_its_sidecar(short_path: Path, replaced: str, place: str) -> None:
    """A replacement that connects through a proxy only: none is on the way to this machine."""
    options = "tcp=False" if place == "unix" else "port=0"
    host = f"""
        import os, replaced, vitalsd
        from support.host_programs import answered
        for begin in vitalsd.start, vitalsd.spawn:
            with begin({options}) as sidecar:
                wrong = answered(sidecar)
                assert wrong == [], (begin, wrong)
        """
    (short_path / "site").mkdir()
    (short_path / "site" / "replaced.py").write_text(REPLACED[replaced])
    env = environment(short_path) | {"PYTHONPATH": str(short_path / "site")}
    if place == "tcp":
        env["VITALSD_RUNTIME_DIR"] = "/proc/nowhere"
    run_host(host, env, directory=short_path)


@pytest.mark.parametrize("reason", ["ENOLCK", "ENOSYS", "EOPNOTSUPP"])
def test_host_on_a_file_system_without_locks_is_served_and_sends_reports(short_path: Path, reason: str) -> None:
    """`flock` is simulated, in the sidecar as well: it starts, and what the spool has is sent or dropped."""
    refusing = f"""
import errno, fcntl
def flock(fd, operation):
    raise OSError(errno.{reason}, "No locks available")
fcntl.flock = flock
"""
    host = """
        import vitalsd
        from support.host_programs import answered
        from vitalsd_client import BugReport, Spool
        for begin in vitalsd.start, vitalsd.spawn:
            with begin(port=0) as sidecar:
                assert sidecar.socket is not None
                assert answered(sidecar) == []
        spool = Spool("spool", "http://127.0.0.1:9/")
        sent, dropped = (BugReport("host", window_ms=20, direct=True).submit(spool) for _ in range(2))
        assert spool.drop(dropped)
        assert [(each.report_id, each.attempts) for each in spool.entries()] == [(sent, 0)]
        spool.send()
        assert [(each.report_id, each.attempts) for each in spool.entries()] == [(sent, 1)]
        """
    run_host(host, _with_sitecustomize(short_path, refusing), directory=short_path)


# Homes

FINDS_ITS_SIDECAR = """
import json, vitalsd
from support.host_programs import answered
from vitalsd_client import fetch
for begin in vitalsd.start, vitalsd.spawn:
    with begin(port=0) as sidecar:
        assert sidecar.url is not None
        wrong = answered(sidecar)
        assert wrong == [], (begin, wrong)
        print(json.dumps([sidecar.socket, str(getattr(sidecar, "runtime_file", ""))]))
    assert type(fetch(window_ms=20)).__name__ == "Unavailable"
"""


def _as_user(directory: Path, uid: int) -> list[str]:
    """
    Return the command of an interpreter for another user, and let that user enter `directory`.

    The user may read every file, because the interpreter may be below /root.
    """
    directory.chmod(0o711)
    if shutil.which("setpriv") is None:
        pytest.skip("needs setpriv of util-linux")
    caps = ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
    return ["setpriv", "--reuid", str(uid), "--regid", str(uid), "--clear-groups", *caps, sys.executable]


def test_host_without_a_runtime_directory_finds_the_sidecars_that_it_started(short_path: Path) -> None:
    """No runtime file can be written: `fetch`, `mark` and `BugReport` know both sidecars from memory."""
    env = environment(short_path) | {"VITALSD_RUNTIME_DIR": "/proc/nowhere"}
    said = run_host(FINDS_ITS_SIDECAR, env, directory=short_path).stdout
    assert said.splitlines() == ['[null, ""]', '[null, "None"]']


def test_host_with_a_long_home_has_a_runtime_file_without_a_socket(short_path: Path) -> None:
    """A path of more than 107 bytes (macOS: 103) is too long for a socket; TCP and the file are there."""
    home = short_path / ("h" * 93)
    home.mkdir(0o700)
    env = bare_environment(home) | {"VITALSD_RUNTIME_DIR": str(home / "run"), "VITALSD_STATE_DIR": str(home)}
    said = run_host(FINDS_ITS_SIDECAR, env, directory=short_path).stdout
    of_start, of_spawn = map(json.loads, said.splitlines())
    assert of_start[0] is None
    assert of_spawn[0] is None
    assert of_spawn[1].startswith(str(home))


HOMES: dict[str, Callable[[Path], Path]] = {
    "none": lambda home: Path("/nonexistent"),
    "read-only": lambda home: home,
    "a file": lambda home: home / "file",
    "of another user": lambda home: Path("/root"),
    "long": lambda home: home / ("h" * 93),
}


@root_only
@pytest.mark.parametrize("kind", HOMES)
def test_service_account_with_an_unusual_home_finds_its_sidecars(short_path: Path, kind: str) -> None:
    """A user without an entry in passwd: TCP is served, and a runtime file is written wherever that can be."""
    uid = 54321
    home = short_path / "home"
    home.mkdir(0o700)
    (home / "file").touch()
    (home / ("h" * 93)).mkdir()
    for each in (home, *home.iterdir()):
        os.chown(each, uid, uid)
    python = _as_user(short_path, uid)
    if kind == "read-only":
        home.chmod(0o500)
    else:
        home.chmod(0o711)
    env = bare_environment(HOMES[kind](home))
    said = run_host(FINDS_ITS_SIDECAR, env, directory=short_path, python=python).stdout
    of_start, of_spawn = map(json.loads, said.splitlines())
    assert of_start[0] is of_spawn[0] is None
    assert (of_spawn[1] != "None") == (kind == "long")


@root_only
def test_home_below_a_read_only_mount_is_served_over_tcp(short_path: Path) -> None:
    """The sidecar of root too, which no mode of a file restricts."""
    home = short_path / "home"
    home.mkdir(0o700)
    mount = f'mount -t tmpfs -o ro none {home} && exec {sys.executable} "$@"'
    env = bare_environment(home)
    said = run_host(
        FINDS_ITS_SIDECAR, env, directory=short_path, python=["unshare", "--mount", "sh", "-c", mount, "sh"]
    ).stdout
    if not Path(f"/run/user/{os.geteuid()}").exists():
        assert said.splitlines() == ['[null, ""]', '[null, "None"]']
