"""The sidecar inside its client: `vitalsd.start`."""

import gc
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest

import vitalsd
from support.paths import ROOT, TESTS
from support.sidecars import ask, environment, eventually, listing
from support.stopwatch import Stopwatch
from vitalsd.discovery import runtime_file as endpoint
from vitalsd.recording.run_directory import RunDirectory
from vitalsd.recording.run_reader import read_run
from vitalsd.recording.series import Record
from vitalsd.sidecar.listen_errors import ListenError, PortInUseError
from vitalsd.sidecar.tcp_listener import bind_tcp
from vitalsd.snapshot import Snapshot
from vitalsd.sources.names import PythonNames
from vitalsd.sources.platform import process_identities


def interpreters() -> list[str]:
    """This Python, and every other at hand that has what the service needs."""
    found = [sys.executable]
    here = ROOT
    for python in [*here.glob(".venv*/bin/python"), *Path.home().glob(".pyenv/versions/*/bin/python")]:
        probe = [str(python), "-c", "import sys, fastapi, uvicorn, vitalsd; print(sys.version_info >= (3, 11))"]
        done = subprocess.run(probe, capture_output=True, text=True)
        if done.stdout == "True\n" and not os.path.samefile(python.parent, Path(sys.executable).parent):
            found.append(str(python))
    return found


PYTHONS = interpreters()


@pytest.fixture(autouse=True)
def own_directories(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sidecar of these tests lives in a directory of its own."""
    for name in ("VITALSD_RUNTIME_DIR", "VITALSD_STATE_DIR"):
        monkeypatch.setenv(name, environment(short_path)[name])


@pytest.fixture
def sidecar() -> Iterator[vitalsd.Sidecar]:
    with vitalsd.start(port=0) as sidecar:
        yield sidecar


def run(code: str, *, python: str = sys.executable) -> "subprocess.CompletedProcess[str]":
    """A host program; ``HOST`` of it is the code that starts the sidecar."""
    command = [python, "-X", "dev", "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(code)]
    env = os.environ | {"PYTHONPATH": str(TESTS)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    # In its dev mode asyncio tells of every step that took a tenth of a second, as all do on a busy machine.
    done.stderr = re.sub(r"^Executing <.* took [0-9.]+ seconds\n", "", done.stderr, flags=re.MULTILINE)
    return done


# Start and stop


def test_start_returns_when_both_listeners_answer(sidecar: vitalsd.Sidecar, short_path: Path) -> None:
    """Both listeners answer for this very process, and the runtime file says where they are."""
    for where in (sidecar.url, sidecar.socket):
        assert where is not None
        status, body = ask(where, "/info")
        assert (status, body["target"]["pid"]) == (200, os.getpid())
    assert endpoint.discover(os.getpid(), directories=[short_path / "run"]) == [sidecar.endpoint]
    assert sidecar.endpoint.target == endpoint.ProcessRun(os.getpid(), process_identities().start_key(os.getpid()) or 0)
    assert sidecar.running


def test_stop_leaves_no_file_socket_or_thread(short_path: Path) -> None:
    """After stop no file, socket or thread is there; a second stop does nothing."""
    before = set(threading.enumerate())
    sidecar = vitalsd.start(port=0)
    assert len(listing(short_path / "run")) == 3
    sidecar.stop()
    sidecar.stop()
    assert listing(short_path / "run") == []
    assert set(threading.enumerate()) == before
    assert not sidecar.running


def test_start_twice_returns_the_running_sidecar() -> None:
    """A second call, on any thread, returns the sidecar that runs; after `stop` there is a new one."""
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: vitalsd.start(port=0), range(16)))
    assert all(each is found[0] for each in found)
    found[0].stop()
    with vitalsd.start(port=0) as later:
        assert later is not found[0]
        assert later.running


def test_start_with_a_bad_argument_or_busy_port_raises(short_path: Path) -> None:
    """A busy port, a remote host, a nonsense option: an exception in the caller, and nothing left behind."""
    before = set(threading.enumerate())
    with bind_tcp("127.0.0.1", 0) as taken, pytest.raises(PortInUseError):
        vitalsd.start(port=taken.getsockname()[1])
    with pytest.raises(ListenError, match="--allow-remote"):
        vitalsd.start(host="0.0.0.0", port=0)
    with pytest.raises(ValueError, match="auth"):
        vitalsd.start(auth="maybe")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="record_interval_s"):
        vitalsd.start(record_interval_s=0.001)
    for number in (nan, inf, 1e300, -5):
        for name in ("record_interval_s", "retention_s", "timeout_s", "port"):
            with pytest.raises(ValueError, match=f"{name} is "):
                vitalsd.start(**{"port": 0, name: number})  # type: ignore[arg-type]
    assert listing(short_path / "run") == []
    assert set(threading.enumerate()) == before


def test_start_that_times_out_leaves_nothing(short_path: Path) -> None:
    """Wherever it had got to: no thread, no file, no run that passes for crashed; and the next start is a new one."""
    threads, refused = set(threading.enumerate()), []
    for timeout_ms in (0, 0, 0, 1, 2, 3, 4, 5, 6, 8):
        try:
            vitalsd.start(port=0, timeout_s=timeout_ms / 1000).stop()
        except TimeoutError as error:
            refused.append(str(error))
        eventually(lambda: set(threading.enumerate()) <= threads)
        with vitalsd.start(port=0) as sidecar:
            assert ask(sidecar.url or "", "/healthz")[0] == 200
        assert not sidecar.running
        assert set(threading.enumerate()) <= threads
    assert listing(short_path / "run") == []
    assert {run.state for run in RunDirectory(short_path / "state" / "runs").runs()} == {"clean"}
    assert refused[:3] == ["the sidecar was not ready within 0 s"] * 3


def test_start_with_auth_token_demands_the_token() -> None:
    """auth="token" demands the token that the endpoint has."""
    with vitalsd.start(port=0, auth="token") as sidecar:
        assert sidecar.url is not None
        assert ask(sidecar.url, "/info")[0] == 401
        assert ask(sidecar.url, "/info", {"Authorization": f"Bearer {sidecar.endpoint.token}"})[0] == 200


def test_start_without_usable_directories_serves_over_tcp_with_notes(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a runtime or state directory the host is served over TCP all the same, and can read why."""
    (short_path / "file").touch()
    monkeypatch.setenv("VITALSD_RUNTIME_DIR", str(short_path / "file"))
    monkeypatch.setenv("VITALSD_STATE_DIR", str(short_path / "file"))
    with vitalsd.start(port=0) as sidecar:
        assert sidecar.socket is None
        assert ask(str(sidecar.url), "/metrics?window_ms=10")[0] == 200
        assert [note.partition(":")[0] for note in sidecar.notes] == [
            "no Unix socket and no runtime file",
            "no black box, and no earlier runs",
        ]


def test_host_that_executes_itself_again_is_no_crash(short_path: Path) -> None:
    """A program that updates itself ends its run, and the next report contains no crash."""
    run("""
        import os, sys, time, vitalsd
        sidecar = vitalsd.start(port=0, record_interval_s=0.02)
        time.sleep(0.3)
        if "again" not in sys.argv:
            code = open("/proc/self/cmdline").read().split("\\0")[-2]
            os.execv(sys.executable, [sys.executable, "-c", code, "again"])
        sidecar.stop()
    """)
    runs = RunDirectory(short_path / "state" / "runs").runs()
    assert [(run.state, run.ended) for run in runs] == [
        ("clean", "the sidecar was stopped"),
        ("clean", "the process went on without it"),
    ]


def test_mark_records_a_cleaned_label_and_never_raises(sidecar: vitalsd.Sidecar) -> None:
    """mark() puts a label into the record; what cannot be a label is replaced or left out, and never raises."""
    assert sidecar.mark("F12 pressed")
    assert sidecar.mark("two\nlines\x1b[0m")
    assert sidecar.mark("x" * 300)
    assert not sidecar.mark("")
    assert not sidecar.mark(5)  # type: ignore[arg-type]
    labels = [mark["label"] for mark in ask(str(sidecar.url), "/marks")[1]]
    assert labels == ["F12 pressed", "two lines?[0m", f"{'x' * 199}…"]


def test_mark_before_a_crash_is_on_disk(short_path: Path) -> None:
    """The program marks what it is about to do, and is killed by it at once."""
    for _ in range(5):
        run("""
            import os, signal, vitalsd
            sidecar = vitalsd.start(port=0)
            sidecar.mark("export started")
            os.kill(os.getpid(), signal.SIGKILL)
        """)
    crashed = RunDirectory(short_path / "state" / "runs").runs()
    assert len(crashed) == 5
    for each in crashed:
        assert [mark.label for mark in read_run(each.path)[1].marks] == ["export started"]


@pytest.mark.parametrize(
    "cycles", [pytest.param(25, id="quick"), pytest.param(100, id="torture", marks=pytest.mark.torture)]
)
def test_start_and_stop_many_times_leaks_nothing(short_path: Path, cycles: int) -> None:
    """After many of them, with requests: no descriptor, thread, file, socket or record more than before."""

    def cycle(asked: bool = True) -> None:
        with vitalsd.start(port=0) as sidecar:
            if asked:
                ask(str(sidecar.socket), "/metrics?window_ms=10")
                ask(str(sidecar.url), "/healthz")

    def held() -> tuple[int, list[str], list[str], int]:
        threads = [thread.name for thread in threading.enumerate()]
        gc.collect()
        records = sum(isinstance(each, Record) for each in gc.get_objects())
        return len(os.listdir("/dev/fd")), threads, listing(short_path / "run"), records

    cycle()
    before = held()
    for number in range(cycles):
        cycle(number % 5 == 0)
    assert held() == before


# The host


def test_start_changes_no_global_state_of_the_host() -> None:
    """Signal handlers, logging, loop policy, environment, hooks, umask and directory are as they were."""
    done = run(
        """
        import asyncio, logging, os, signal, sys, threading
        logging.basicConfig(level=logging.INFO)
        access = logging.getLogger("uvicorn.access")
        access.addHandler(logging.NullHandler())
        def state():
            umask = os.umask(0o022); os.umask(umask)
            names = None, "uvicorn", "uvicorn.error", "uvicorn.access", "asyncio"
            loggers = [logging.getLogger(name) for name in names]
            return (
                {number: signal.getsignal(number) for number in signal.valid_signals()},
                signal.set_wakeup_fd(-1),
                [(each.level, each.propagate, list(each.handlers), each.disabled) for each in loggers],
                logging.getLevelName(5), logging.raiseExceptions,
                asyncio.get_event_loop_policy(), dict(os.environ), umask, os.getcwd(),
                sys.excepthook, threading.excepthook, sys.unraisablehook, sys.getswitchinterval(), sys.gettrace(),
            )
        import vitalsd
        from support.sidecars import ask
        before = state()
        with vitalsd.start(port=0) as sidecar:
            assert ask(sidecar.url, "/metrics?window_ms=10")[0] == 200
            assert state() == before
        assert state() == before
        print("untouched")
        """
    )
    assert (done.stdout, done.returncode) == ("untouched\n", 0), done.stderr


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_start_in_a_running_event_loop_leaves_the_loop_unchanged(loop: str) -> None:
    """A host on asyncio or uvloop starts it from a coroutine and keeps its loop; the sidecar's is asyncio's."""
    done = run(
        f"""
        import asyncio, sys, {loop}, vitalsd
        from support.sidecars import ask
        async def main():
            theirs = asyncio.get_running_loop()
            sidecar = vitalsd.start(port=0)
            assert asyncio.get_running_loop() is theirs
            status, _ = await asyncio.to_thread(ask, sidecar.url, "/metrics?window_ms=50")
            ours = isinstance(sidecar._loop, asyncio.SelectorEventLoop)
            sidecar.stop()
            print({loop!r} in type(theirs).__module__, status, ours)
        if {loop!r} == "uvloop":
            asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
        asyncio.run(main())
        """
    )
    assert (done.stdout, done.returncode) == ("True 200 True\n", 0), done.stderr


def test_threads_without_a_kernel_name_have_their_python_name(sidecar: vitalsd.Sidecar) -> None:
    """A thread that the kernel has no name for goes by its Python name, and by its new one once renamed."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait, name="render")
    thread.start()
    try:

        def name() -> str:
            threads = ask(str(sidecar.socket), "/metrics?window_ms=10")[1]["threads"]
            return next(str(each["name"]) for each in threads if each["tid"] == thread.native_id)

        assert name() == "render"
        if sys.version_info < (3, 14):  # from then on the kernel's name is what was given at the start
            thread.name = "renamed"
            assert eventually(lambda: name() == "renamed")
    finally:
        done.set()
        thread.join()


def test_threads_with_a_kernel_name_keep_it(sidecar: vitalsd.Sidecar) -> None:
    """A name that the program gave to the kernel has precedence over Python's."""
    if sys.platform != "linux":
        pytest.skip("sets the name through /proc")
    done, named = threading.Event(), threading.Event()

    def work() -> None:
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text("by-hand")
        named.set()
        done.wait()

    thread = threading.Thread(target=work, name="by-python")
    thread.start()
    named.wait()
    try:
        threads = ask(str(sidecar.socket), "/metrics?window_ms=10")[1]["threads"]
        assert [each["name"] for each in threads if each["tid"] == thread.native_id] == ["by-hand"]
    finally:
        done.set()
        thread.join()


# Fork


def test_forked_child_closes_its_copy_and_the_parent_continues(short_path: Path) -> None:
    """
    While a forked child lives on.

    The parent answers, its connections close, its port can be bound again at once, and at its end the child removes
    nothing. The child may start its own.
    """
    done = run(
        """
        import http.client, os, socket, sys, vitalsd
        from support.sidecars import ask, listing
        from pathlib import Path
        directory = Path(os.environ["VITALSD_RUNTIME_DIR"])
        sidecar = vitalsd.start(port=0)
        host, port = sidecar.url.removeprefix("http://").split(":")
        kept = http.client.HTTPConnection(host, int(port), timeout=5)
        kept.request("GET", "/healthz"); kept.getresponse().read()
        before = listing(directory)
        go, wait = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            kept.close()
            assert not sidecar.running
            sidecar.stop(); sidecar.mark("ignored")
            assert listing(directory) == before
            with vitalsd.start(port=0) as own:
                assert own is not sidecar
                assert ask(own.socket, "/info")[1]["target"]["pid"] == os.getpid()
            os.write(go[1], b"x")
            os.read(wait[0], 1)
            sys.exit(7)
        os.read(go[0], 1)
        assert listing(directory) == before
        assert ask(sidecar.url, "/metrics?window_ms=10")[0] == 200
        kept.request("GET", "/healthz"); assert kept.getresponse().read()
        sidecar.stop()
        assert kept.sock.recv(1) == b"", "the child holds our connection"
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind((host, int(port))); again.listen()
        assert listing(directory) == []
        os.write(wait[1], b"x")
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        kept.close()
        """
    )
    assert (done.stdout, done.returncode, done.stderr) == ("7\n", 0, "")


def test_fork_waits_for_a_write_in_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that SQLite holds at the fork would stay locked in the child."""
    writing = threading.Event()

    def slow(*_: object) -> None:
        writing.set()
        time.sleep(0.02)
        writing.clear()

    monkeypatch.setattr("vitalsd.recording.run_writer.RunFile.insert_mark", slow)
    with vitalsd.start(port=0) as sidecar, ThreadPoolExecutor(1) as pool:
        for _ in range(20):
            marked = pool.submit(sidecar.mark, "x")
            assert writing.wait(5)
            pid = os.fork()
            if pid == 0:
                os._exit(writing.is_set())
            assert os.waitpid(pid, 0)[1] == 0
            marked.result(5)


def test_fork_during_a_fork_keeps_the_black_box_working(short_path: Path) -> None:
    """A signal handler forks, as to replace a worker that ended: the black box continues afterwards."""
    run("""
        import os, signal, vitalsd
        armed = []
        def fork(*_):
            if (pid := os.fork()) == 0:
                os._exit(0)
            os.waitpid(pid, 0)
        def signalled():
            if armed:
                armed.clear()
                signal.raise_signal(signal.SIGUSR1)
        signal.signal(signal.SIGUSR1, fork)
        os.register_at_fork(after_in_parent=signalled)  # before ours, so it comes before ours
        with vitalsd.start(port=0) as sidecar:
            armed.append(True)
            fork()
            sidecar.mark("after it")
    """)
    [file] = short_path.rglob("*.sqlite")
    found, record = read_run(file)
    assert (found.state, [mark.label for mark in record.marks]) == ("clean", ["after it"])


def test_stop_during_a_long_read_leaves_it_to_its_thread(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is left to its thread, which ends the run when it is through; nothing is taken from under it."""
    before = set(threading.enumerate())
    sidecar = vitalsd.start(port=0)
    snapshot, reading = PythonNames.snapshot, threading.Event()

    def slow(self: PythonNames, **more: Any) -> Snapshot:
        reading.set()
        time.sleep(2)
        return snapshot(self, **more)

    monkeypatch.setattr(PythonNames, "snapshot", slow)
    assert reading.wait(5)
    sidecar.stop()
    [file] = short_path.rglob("*.sqlite")
    assert eventually(lambda: read_run(file)[0].state != "running" and read_run(file)[0].state) == "clean"
    sidecar.mark("after the end")  # nothing, and no error
    eventually(lambda: set(threading.enumerate()) <= before)


@pytest.mark.parametrize(
    ("call", "callers", "children"),
    [
        ("client.get('/runs')", 4, 40),
        pytest.param("client.get('/runs')", 4, 2000, marks=pytest.mark.torture),
        pytest.param("sidecar.mark('x')", 1, 4000, marks=pytest.mark.torture),
    ],
)
def test_forked_children_can_use_sqlite(call: str, callers: int, children: int, short_path: Path) -> None:
    """Forked while marks are written, or earlier runs read, as fast as can be: none hangs in a database of its own."""
    done = run(f"""
        import os, signal, sqlite3, threading, httpx, vitalsd
        with (
            vitalsd.start(port=0, record_interval_s=0.01) as sidecar,
            httpx.Client(trust_env=False, base_url=sidecar.url) as client,
        ):
            over = threading.Event()
            def call():
                while not over.is_set():
                    {call}
            threads = [threading.Thread(target=call) for _ in range({callers})]
            for thread in threads:
                thread.start()
            hung = 0
            for _ in range({children}):
                pid = os.fork()
                if pid == 0:
                    signal.alarm(4)
                    sqlite3.connect(":memory:").execute("create table a (b)")
                    os._exit(0)
                hung += os.waitpid(pid, 0)[1] != 0
            over.set()
            for thread in threads:
                thread.join()
        print(hung)
    """)
    assert done.stdout == "0\n"


def test_multiprocessing_pool_by_fork_ends_with_status_0(short_path: Path) -> None:
    """Multiprocessing by fork works in a host with a sidecar, and its workers end with status 0."""
    done = run(
        """
        import multiprocessing, os, vitalsd
        from support.sidecars import ask
        sidecar = vitalsd.start(port=0)
        with multiprocessing.get_context("fork").Pool(4) as pool:
            assert pool.map(abs, range(-100, 0)) == list(range(100, 0, -1))
            assert ask(sidecar.socket, "/healthz")[0] == 200
            pool.close(); pool.join()
        print(ask(sidecar.url, "/healthz")[0])
        """
    )
    assert (done.stdout, done.returncode, done.stderr) == ("200\n", 0, "")
    assert listing(short_path / "run") == []


def test_run_of_a_killed_host_with_a_living_child_is_a_crash(short_path: Path) -> None:
    """The host is killed and a forked worker lives on: the run of the host has crashed all the same."""
    done = run(
        """
        import os, signal, sys, time, vitalsd
        from support.sidecars import ask
        sidecar = vitalsd.start(port=0, record_interval_s=0.05)
        ask(sidecar.socket, "/metrics?window_ms=200")
        host = os.getpid()
        pid = os.fork()
        if pid == 0:
            os.closerange(0, 3)
            time.sleep(60)
            os._exit(0)
        print(pid, flush=True)
        os.kill(host, signal.SIGKILL)
        """
    )
    worker = int(done.stdout)
    try:
        assert process_identities().start_key(worker) is not None
        assert [run.state for run in RunDirectory(short_path / "state" / "runs").runs()] == ["crashed"]
    finally:
        os.kill(worker, signal.SIGKILL)


# The exit of the interpreter

ENDINGS = {
    "returns": ("", 0),
    "exits": ("sys.exit(3)", 3),
    "raises": ("raise KeyError", 1),
    "interrupted": ("raise KeyboardInterrupt", -2),
    "open window": (
        "host, port = sidecar.url.removeprefix('http://').split(':')\n"
        "c = socket.create_connection((host, int(port)))\n"
        "c.sendall(f'GET /metrics?window_ms=60000 HTTP/1.1\\r\\nHost: {host}:{port}\\r\\n\\r\\n'.encode())\n"
        "s = socket.create_connection((host, int(port))); s.sendall(b'GET /')\n"
        "time.sleep(.2); sys.exit(4)",
        4,
    ),
    "busy thread": ("threading.Thread(target=lambda: [None for _ in iter(int, 1)], daemon=True).start()", 0),
    "non-daemon thread": ("threading.Thread(target=time.sleep, args=(.2,)).start(); sys.exit(5)", 5),
    "pool": (
        "from concurrent.futures import ThreadPoolExecutor as E; e = E(); e.submit(time.sleep, .1); sys.exit(6)",
        6,
    ),
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("python", PYTHONS)
def test_interpreter_exit_keeps_its_status_and_is_delayed_by_2_5_s_at_most(
    python: str, ending: str, short_path: Path
) -> None:
    """However the host ends, its exit status is its own, and vitalsd holds it up for less than 2.5 s."""
    code, status = ENDINGS[ending]
    watch, begun = Stopwatch(), time.monotonic()
    preamble = "import sys, time, socket, threading, vitalsd\nsidecar = vitalsd.start(port=0)\n"
    mark = "print(time.monotonic(), flush=True)\n"
    done = run(preamble + mark + code, python=python)
    held_s = time.monotonic() - max(begun, float(done.stdout))
    assert done.returncode == status, done.stderr
    assert held_s < watch.allowed_s(2.5)
    assert listing(short_path / "run") == []
    assert "Exception ignored" not in done.stderr


def test_import_of_vitalsd_loads_no_other_module() -> None:
    """The package alone loads nothing; what it exports is loaded when it is asked for."""
    done = run("import sys, vitalsd; print(sorted(m for m in sys.modules if m.startswith(('vitalsd', 'asyncio'))))")
    assert done.stdout == "['vitalsd']\n"
    assert set(vitalsd.__all__) <= {name for name in vitalsd.__all__ if getattr(vitalsd, name)}
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        vitalsd.nonsense  # noqa: B018
