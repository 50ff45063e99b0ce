"""
A disk that does not answer: a call that needs it waits in the kernel, and everything else continues.

The tests use leases of fcntl(2), which block each open of a file, for at most 45 s, and, as root on a machine with
loop devices, a frozen file system, which blocks each write to it.
"""

import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.edge import Reply, dial, get, read_reply
from support.serving import Serving
from support.sidecars import eventually, serving
from support.stopwatch import Stopwatch
from vitalsd.recording.run_reader import read_run

pytestmark = [pytest.mark.live, pytest.mark.skipif(sys.platform != "linux", reason="leases and FIFREEZE are of Linux")]

READ = "the directory of runs: a read has not returned for %d s"


@contextmanager
def leased(path: Path) -> Iterator[None]:
    """Make each other open of the file wait until the end of the context."""
    with path.open("r+b") as file:
        if sys.platform == "linux":
            fcntl.fcntl(
                file, fcntl.F_SETSIG, signal.SIGURG
            )  # the kernel signals each waiting open; this signal does nothing
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)


@pytest.fixture(params=[1, pytest.param(5, marks=pytest.mark.torture)])
def hang_timeout_s(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def python(hang_timeout_s: int) -> tuple[str, ...]:
    """Return the Python of a service with a shorter time limit of calls in the short form."""
    code = (
        f"import vitalsd.worker_thread as w; w.HANG_TIMEOUT_NS = {hang_timeout_s} * 10**9;"
        " import vitalsd.cli as c; c.main()"
    )
    return sys.executable, "-P", "-c", code


def reason(reply: Reply) -> tuple[int, str, str]:
    body = json.loads(reply.body)
    return reply.status, body["reason"], body["detail"]


# Reading


@pytest.fixture
def crashed(tmp_path: Path) -> Path:
    """A run that did not end well, in the directory of runs."""
    with Serving(tmp_path, "--record-interval", "0.05") as first:
        eventually(lambda: first.get("/info")["recorder"]["snapshots"] > 5)
        first.process.kill()
        first.process.wait()
    (run,) = (tmp_path / "runs").glob("*.sqlite")
    return run


def test_hung_run_directory_affects_only_the_runs(tmp_path: Path, crashed: Path, hang_timeout_s: int) -> None:
    """
    A request for a run gets the reason after some seconds, then at once.

    /healthz is 503 and names the disk; all else continues, the report without the previous run. When the read
    returns all is well again.
    """
    options = ("--record-interval", "0.1")
    with Serving(tmp_path, *options, python=python(hang_timeout_s)) as served, ExitStack() as stack:
        where, hung = served.url, (503, "hung", READ % hang_timeout_s)
        assert [run["id"] for run in served.get("/runs") if run["state"] == "crashed"] == [crashed.stem]
        assert get(where, f"/runs/{crashed.stem}/history").status == 200
        disk = stack.enter_context(ExitStack())
        disk.enter_context(leased(crashed))
        begun = time.monotonic()
        paths = ["GET /runs", f"GET /runs/{crashed.stem}/history", f"POST /runs/{crashed.stem}/reported"] * 4
        waiting = [stack.enter_context(dial(where)) for _ in paths]
        for connection, path in zip(waiting, paths, strict=True):
            connection.sendall(f"{path} HTTP/1.1\r\nHost: {where[7:]}\r\n\r\n".encode())
        for _ in range(3):
            assert get(where, "/metrics?window_ms=10").status == 200
            assert get(where, "/history").status == 200
        assert time.monotonic() - begun < hang_timeout_s
        assert {reason(read_reply(connection)) for connection in waiting} == {hung}
        assert hang_timeout_s * 0.9 < time.monotonic() - begun < hang_timeout_s + 10
        watch = Stopwatch()
        assert reason(get(where, "/healthz")) == hung
        for path in ("/runs", f"/runs/{crashed.stem}/history", "/runs/none/history"):
            assert reason(get(where, path)) == hung
        assert reason(get(where, f"/runs/{crashed.stem}/reported", method="POST")) == hung
        with zipfile.ZipFile(io.BytesIO(get(where, "/report.zip?window_ms=10").body)) as report:
            assert {"runtime-metrics.json", "runtime-history.json"} < set(report.namelist())
            assert "previous-run.json" not in report.namelist()
            manifest = json.loads(report.read("manifest.json"))
            assert manifest["failures"] == [{"member": "previous-run.json", "reason": READ % hang_timeout_s}]
        assert get(where, "/history").status == 200
        assert watch.elapsed_s < watch.allowed_s(5)
        disk.close()
        eventually(lambda: get(where, "/healthz").status == 200)
        assert [run["id"] for run in served.get("/runs") if run["state"] == "crashed"] == [crashed.stem]
        assert get(where, f"/runs/{crashed.stem}/history").status == 200
        assert get(where, f"/runs/{crashed.stem}/reported", method="POST").status == 200
        assert served.stop() == 0
        assert served.process.stderr is not None
        assert served.process.stderr.read() == ""


def test_hung_run_directory_uses_one_thread_for_all_requests(tmp_path: Path, crashed: Path) -> None:
    """While it hangs there is one thread for it, however many ask; and the end comes in time."""
    with Serving(tmp_path, "--record-interval", "0.1", python=python(1)) as served, leased(crashed):
        before = threads(served.process.pid)
        for _ in range(3):
            with ThreadPoolExecutor(12) as callers:
                replies = list(callers.map(lambda _: get(served.url, "/runs").status, range(24)))
            assert set(replies) == {503}
        assert threads(served.process.pid) == before
        watch = Stopwatch()
        assert served.stop() == 0
        assert watch.elapsed_s < watch.allowed_s(3)
        assert served.process.stderr is not None
        assert served.process.stderr.read() == ""


def threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


# Writing


@pytest.mark.parametrize("freed", [False, True], ids=["to the end", "until it returns"])
def test_hung_black_box_delays_neither_start_nor_exit(tmp_path: Path, hang_timeout_s: int, freed: bool) -> None:
    """
    The first file that has to make room for it cannot be looked at.

    The sidecar starts, records, says what is off, and ends in time. Once it can, the run goes to disk.
    """
    runs = tmp_path / "runs"
    runs.mkdir(mode=0o700)
    for number in range(101):  # one more than are kept
        (runs / f"1-2-boot-{number}.sqlite").touch()
        (runs / f"1-2-boot-{number}.lock").touch()
        os.utime(runs / f"1-2-boot-{number}.sqlite", (number, number))
    with ExitStack() as stack:
        disk = stack.enter_context(ExitStack())
        disk.enter_context(leased(runs / "1-2-boot-0.lock"))
        begun = time.monotonic()
        served = stack.enter_context(Serving(tmp_path, "--record-interval", "0.1", python=python(hang_timeout_s)))
        assert time.monotonic() - begun < 10

        def recorder() -> Any:
            return served.get("/info")["recorder"]

        assert recorder()["black_box"]["run"] is None
        assert get(served.url, "/metrics?window_ms=10").status == 200
        error = eventually(lambda: recorder()["black_box"]["error"], hang_timeout_s + 10)
        assert error == "the black box is off: the disk does not answer"
        status, kind, detail = reason(get(served.url, "/healthz"))
        assert (status, kind) == (503, "hung")
        assert detail.startswith("the directory of runs: ")
        taken = recorder()["snapshots"]
        eventually(lambda: recorder()["snapshots"] >= taken + 20, 30)
        for number in range(300):
            assert served.client.post("/marks", json={"label": str(number)}).status_code == 201
        assert recorder()["black_box"]["dropped"] > 200
        if freed:
            disk.close()
            eventually(lambda: recorder()["black_box"]["run"])
            eventually(lambda: recorder()["black_box"]["error"] is None)
            eventually(lambda: get(served.url, "/healthz").status == 200)
            assert not (runs / "1-2-boot-0.sqlite").exists()
        watch = Stopwatch()
        assert served.stop() == 0
        print(f"ended in {watch.elapsed_s:.2f} s")
        assert watch.elapsed_s < watch.allowed_s(3)
        assert served.process.stderr is not None
        said = served.said + served.process.stderr.read()  # on a busy machine it is logged before the ready line
        assert said.count("the disk does not answer") == 1


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 of its own, mounted."""
    if os.geteuid() != 0 or not shutil.which("mkfs.ext4") or not shutil.which("fsfreeze"):
        pytest.skip("mounts and freezes a file system")
    image, mounted = tmp_path / "image", tmp_path / "disk"
    mounted.mkdir()
    with image.open("wb") as file:
        file.truncate(32 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    if subprocess.run(["mount", "-o", "loop", image, mounted], capture_output=True).returncode:
        pytest.skip("has no loop devices")
    try:
        yield mounted
    finally:
        subprocess.run(["umount", "-l", mounted], check=True)


@contextmanager
def frozen(mounted: Path) -> Iterator[None]:
    """Make each write there wait until the end of the context, which a timer guarantees."""
    subprocess.run(["fsfreeze", "-f", mounted], check=True)
    thaw = ["fsfreeze", "-u", str(mounted)]
    guard = threading.Timer(60, subprocess.run, (thaw,))
    guard.start()
    try:
        yield
    finally:
        guard.cancel()
        subprocess.run(thaw, check=True)


def test_frozen_disk_affects_only_the_black_box(short_path: Path, disk: Path, hang_timeout_s: int) -> None:
    """
    Recording, metrics and history continue at their interval, and the error states what is off.

    Afterwards the black box continues, and its content is unchanged.
    """
    state = disk / "state"
    environ = os.environ | {"VITALSD_RUNTIME_DIR": str(short_path / "run"), "VITALSD_STATE_DIR": str(state)}
    program = python(hang_timeout_s)
    with serving(short_path, "--record-interval", "0.1", env=environ, program=program) as (process, ready):
        where = ready["socket"]

        def recorder() -> Any:
            return json.loads(get(where, "/info").body)["recorder"]

        eventually(lambda: recorder()["snapshots"] > 5)
        with frozen(disk):
            error = eventually(lambda: recorder()["black_box"]["error"], hang_timeout_s + 10)
            assert error == "the black box is off: the disk does not answer"
            assert reason(get(where, "/healthz"))[1] == "hung"
            assert json.loads(get(where, "/metrics?window_ms=10&detail=full").body)["warnings"] == [error]
            assert get(where, "/history").status == 200
            eventually(lambda: recorder()["black_box"]["dropped"] > 10, 30)  # more than may wait
        eventually(lambda: recorder()["black_box"]["error"] is None)
        eventually(lambda: get(where, "/healthz").status == 200)
        written = recorder()["snapshots"]
        eventually(lambda: recorder()["snapshots"] > written + 5)
        process.terminate()
        assert process.wait(10) == 0
        (path,) = (state / "runs").glob("*.sqlite")
        run, record = read_run(path)
        assert run.state == "clean"
        for snapshot in record.snapshots():  # none is short of what a thread burnt in one that was dropped
            _, exited_ns = snapshot.exited_cpu_ns
            assert sum(snapshot.thread_cpu_ns) == pytest.approx(snapshot.cpu_ns, abs=20_000_000 + exited_ns)
