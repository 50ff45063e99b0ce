"""
What goes wrong around the service: reads that hang, no descriptors, no disk, stopped processes, storms of threads.

Each by its real cause, on a real service. What takes minutes is marked ``torture``.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from support.edge import Edge, dial, get, read_reply
from support.paths import DATA, ROOT, TESTS
from support.serving import Serving
from support.sidecars import environment, eventually, serving
from support.stopwatch import Stopwatch
from support.target import Target, set_name
from vitalsd.http.app import create_app
from vitalsd.sampling.sampler import Sampler
from vitalsd.sampling.target_pool import Targets
from vitalsd.sources import list_processes, open_source

pytestmark = [pytest.mark.live, pytest.mark.skipif(sys.platform != "linux", reason="/proc, prlimit(2) and signals")]

CAPTURE = DATA / "proc"


def asked(where: str, path: str) -> tuple[int, Any]:
    answer = get(where, path)
    return answer.status, json.loads(answer.body)


# A read that hangs


class Blocked:
    """A file replaced by a pipe without a writer: each open of it waits in the kernel, until it is `freed`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._content = path.read_bytes()
        pipe = path.with_suffix(".pipe")
        os.mkfifo(pipe)
        pipe.replace(path)

    def freed(self) -> None:
        whole = self._path.with_suffix(".whole")
        whole.write_bytes(self._content)
        with self._path.open("wb") as pipe:  # opens as soon as it has a reader
            whole.replace(self._path)
            pipe.write(self._content)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A procfs of two processes."""
    root = tmp_path / "proc"
    shutil.copytree(CAPTURE, root)
    shutil.copytree(root / "4242", root / "4343")
    (root / "4343" / "task" / "4242").rename(root / "4343" / "task" / "4343")
    return root


@pytest.fixture(params=[1, pytest.param(5, marks=pytest.mark.torture)])
def hang_timeout_s(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def served(tree: Path, tmp_path: Path, hang_timeout_s: int) -> Iterator[Serving]:
    """Serve the first of them, with a shorter time limit of calls in the short form."""
    code = (
        f"import vitalsd.worker_thread as w; w.HANG_TIMEOUT_NS = {hang_timeout_s} * 10**9;"
        " import vitalsd.cli as c; c.main()"
    )
    options = ("--pid", "4242", "--proc-root", str(tree), "--record-interval", "0.2")
    with Serving(tmp_path, *options, python=(sys.executable, "-c", code)) as serving:
        yield serving


def test_hung_kernel_read_fails_only_that_process(served: Serving, tree: Path, hang_timeout_s: int) -> None:
    """
    A request for the process gets the reason after some seconds, then at once.

    /healthz is 503; all else continues, and so does the process when the read returns.
    """
    assert asked(served.url, "/healthz") == (200, {"status": "ok"})
    assert get(served.url, "/metrics?pid=4343&window_ms=10").status == 200
    begun = time.monotonic()
    blocked = Blocked(tree / "4242" / "status")
    with ExitStack() as stack:
        waiting = [stack.enter_context(dial(served.url)) for _ in range(20)]
        for connection in waiting:
            connection.sendall(
                f"GET /metrics?detail=full&window_ms=10 HTTP/1.1\r\nHost: {served.url[7:]}\r\n\r\n".encode()
            )
        for _ in range(3):
            assert get(served.url, "/metrics?pid=4343&window_ms=10").status == 200
        replies = [read_reply(connection) for connection in waiting]
    assert hang_timeout_s * 0.9 < time.monotonic() - begun < hang_timeout_s + 10
    assert {reply.status for reply in replies} == {503}
    assert {reply.body for reply in replies} == {
        b'{"platform":"linux","available":false,"reason":"process 4242: a read has not returned for %d s"}'
        % hang_timeout_s
    }
    unwell = get(served.url, "/healthz")
    assert unwell.status == 503
    assert unwell.header("content-type") == "application/problem+json"
    assert json.loads(unwell.body)["reason"] == "hung"
    watch = Stopwatch()
    assert asked(served.url, "/metrics?window_ms=60000")[0] == 503
    assert watch.elapsed_s < watch.allowed_s(3)
    assert get(served.url, "/metrics?pid=4343&window_ms=10").status == 200
    assert get(served.url, "/history").status == 200
    assert get(served.url, "/report.zip?window_ms=10").status == 200
    assert b'"available":false' in get(served.url, "/stream?interval_ms=10").body
    blocked.freed()
    assert eventually(lambda: get(served.url, "/metrics?detail=full&window_ms=10").status == 200)
    assert asked(served.url, "/healthz") == (200, {"status": "ok"})
    assert served.stop() == 0
    assert served.process.stderr is not None
    assert served.process.stderr.read() == ""


def test_hung_kernel_read_uses_one_thread_per_target(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process than the target, and the list of all: each has one thread, also after a while."""
    monkeypatch.setattr("vitalsd.worker_thread.HANG_TIMEOUT_NS", 300_000_000)
    root = str(tree)
    there = set(threading.enumerate())
    targets = Targets(Sampler(open_source), lambda pid: open_source(pid, proc_root=root), idle_s=0.1)
    with Edge(create_app(targets, lambda: list_processes(proc_root=root))) as edge:
        blocked = Blocked(tree / "4343" / "stat")
        paths = ["/metrics?pid=4343&window_ms=10", "/processes"]
        for _ in range(3):
            with ThreadPoolExecutor(12) as callers:
                statuses = list(callers.map(lambda path: get(edge.url, path).status, paths * 6))
            assert set(statuses) == {503}
            eventually(lambda: not targets._pooled[4343].users)
            time.sleep(0.3)  # longer than an idle process is kept
        names = [thread.name for thread in set(threading.enumerate()) - there]
        assert (names.count("vitalsd-4343"), names.count("vitalsd-lister")) == (1, 1)
        assert get(edge.url, "/healthz").status == 503
        assert get(edge.url, "/metrics?window_ms=10").status == 200
        blocked.freed()
        eventually(lambda: get(edge.url, "/metrics?pid=4343&window_ms=10").status == 200)
        eventually(lambda: get(edge.url, "/healthz").status == 200)
    assert not any(thread.name == "vitalsd-4343" for thread in threading.enumerate())


# No descriptors


def test_service_with_64_descriptors_survives_200_clients(tmp_path: Path) -> None:
    """All get an answer or a closed door, the log stays short, and afterwards it serves as before."""
    limited = "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (64, 64)); import vitalsd.cli as c; c.main()"
    with Serving(tmp_path, "--record-interval", "0.1", python=(sys.executable, "-c", limited)) as serving:
        statuses: Counter[int] = Counter()
        with ExitStack() as stack:
            clients = [stack.enter_context(dial(serving.url, 20)) for _ in range(200)]
            for client in clients:
                with suppress(ConnectionResetError, BrokenPipeError):
                    client.sendall(f"GET /metrics?window_ms=300 HTTP/1.1\r\nHost: {serving.url[7:]}\r\n\r\n".encode())
            statuses.update(read_reply(client).status for client in clients)
        print(dict(statuses))
        assert set(statuses) <= {0, 200, 503}
        assert statuses[200] > 0
        begun = time.monotonic()
        eventually(lambda: get(serving.url, "/metrics?window_ms=10").status == 200)
        print(f"again after {time.monotonic() - begun:.2f} s")
        assert serving.get("/info")["recorder"]["missed"] < 50
        assert serving.stop() == 0
        assert serving.process.stderr is not None
        assert len(serving.process.stderr.read().splitlines()) < 20


# Stopped processes


@pytest.mark.parametrize(
    "stopped_s", [0.5, pytest.param(7, marks=pytest.mark.torture, id="torture: longer than a read that hangs")]
)
def test_service_stopped_in_mid_window_answers_after_sigcont(short_path: Path, stopped_s: float) -> None:
    """SIGSTOP in the middle of windows: after SIGCONT all are answered 200, and nothing is taken for hung."""
    with serving(short_path, "--record-interval", "0.05") as (process, ready), ExitStack() as stack:
        where = ready["socket"]
        assert get(where, "/metrics?window_ms=10").status == 200
        for round_s in (0.0, 0.02):
            waiting = [stack.enter_context(dial(where)) for _ in range(10)]
            for number, connection in enumerate(waiting):
                path = f"/metrics?window_ms={10 + 20 * number}&detail=full"
                connection.sendall(f"GET {path} HTTP/1.1\r\nHost: vitalsd\r\n\r\n".encode())
            time.sleep(round_s)  # not to wait for anything, but to hit it at work
            process.send_signal(signal.SIGSTOP)
            time.sleep(stopped_s)
            process.send_signal(signal.SIGCONT)
            assert get(where, "/healthz").status == 200
            assert {read_reply(connection).status for connection in waiting} == {200}


def test_target_stopped_has_zero_cpu_and_events(short_path: Path, start: Callable[..., Target]) -> None:
    """SIGSTOP of the target: 200, no CPU, `stopped`; SIGCONT: it burns again. The record has both as events."""
    target = start("--burn", "50")
    with serving(short_path, "--pid", str(target.pid), "--record-interval", "0.05") as (_, ready):
        where = ready["socket"]

        def full() -> Any:
            return asked(where, "/metrics?window_ms=100&detail=full")[1]

        os.kill(target.pid, signal.SIGSTOP)
        eventually(lambda: {thread["state"] for thread in full()["threads"]} == {"stopped"})
        assert full()["process"]["cpu_percent"] == 0
        os.kill(target.pid, signal.SIGCONT)
        eventually(lambda: full()["process"]["cpu_percent"] > 5)
        kinds = eventually(
            lambda: (
                (
                    found := [event["kind"] for event in asked(where, "/history")[1]["events"]],
                    "continued" in found,
                )[1]
                and found
            )
        )
        assert kinds.index("stopped") < kinds.index("continued")


# Storms of threads


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program with threads of 32 KiB of stack each."""
    program = tmp_path_factory.mktemp("native") / "target"
    compiler = ["cc"] if shutil.which("cc") else [sys.executable, "-m", "ziglang", "cc"]
    source = ROOT / "benchmarks" / "native" / "target.c"
    subprocess.run([*compiler, "-O2", "-pthread", "-o", program, source], check=True)
    return program


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.torture)])
def test_target_of_10000_threads_is_answered_completely(native: Path, short_path: Path, count: int) -> None:
    """Every one of them is in the answer, busy ones with their share, and other requests are answered meanwhile."""
    with subprocess.Popen([native, str(count), "4", "2000", "20000"], stdout=subprocess.PIPE) as target:
        try:
            assert target.stdout is not None
            target.stdout.readline()
            with serving(short_path, "--pid", str(target.pid), "--record-interval", "1") as (process, ready):
                where = ready["socket"]
                assert get(where, "/metrics?window_ms=10").status == 200
                for query in ("window_ms=1000", "window_ms=1000&detail=full", "mode=trailing"):
                    begun = time.monotonic()
                    reply = get(where, f"/metrics?{query}")
                    took_s, body = time.monotonic() - begun, json.loads(reply.body)
                    assert reply.status == 200
                    assert len(body["threads"]) == count
                    busy = [each["cpu_percent"] for each in body["threads"] if each["name"].startswith("busy")]
                    assert len(busy) == 4
                    print(f"{count} threads, {query}: {took_s:.2f} s, {len(reply.body)} bytes, busy {busy}")
                    if "window_ms" in query:
                        assert min(busy) > 1
                rss = psutil.Process(process.pid).memory_info().rss
                print(f"the sidecar has {rss >> 20} MiB")
                assert rss < 300 << 20
        finally:
            target.kill()


@pytest.mark.parametrize("seconds", [1, pytest.param(60, marks=pytest.mark.torture)])
def test_target_with_1000_births_a_second_balances_and_leaks_nothing(
    short_path: Path, start: Callable[..., Target], seconds: int
) -> None:
    """Threads that start and end cost no answer and no descriptor, and the CPU accounting balances."""
    target = start()
    with serving(short_path, "--pid", str(target.pid), "--record-interval", "0.1") as (process, ready):
        where = ready["socket"]
        get(where, "/metrics?window_ms=10")
        before = len(os.listdir(f"/proc/{process.pid}/fd"))
        target.tell(f"churn_for {seconds} 1000")
        statuses: Counter[int] = Counter()
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            status, body = asked(where, "/metrics?window_ms=100&detail=full")
            statuses[status] += 1
            books = body["accounting"]
            parts = books["living_percent"] + books["exited_percent"] + (books["unattributed_percent"] or 0)
            assert parts == pytest.approx(books["process_percent"], abs=0.1)
        born = target.read()
        print(f"{born} births, {dict(statuses)}")
        assert set(statuses) == {200}
        assert born > 100 * seconds
        eventually(lambda: len(os.listdir(f"/proc/{process.pid}/fd")) <= before + 2)


# A pid that is given away again


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0 or not shutil.which("unshare"), reason="needs a pid namespace"
)
@pytest.mark.parametrize("rounds", [8, pytest.param(1000, marks=[pytest.mark.torture, pytest.mark.timeout(600)])])
def test_pid_reused_in_mid_window_never_mixes_two_processes(short_path: Path, rounds: int) -> None:
    """The pid goes to another process in mid-window: the answer is of the first one or none, never of both."""
    out = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable, __file__, str(rounds)],
        capture_output=True,
        text=True,
        env=environment(short_path) | {"PYTHONPATH": str(TESTS)},
    )
    assert out.returncode == 0, out.stderr
    counts = Counter(json.loads(out.stdout))
    print(counts)
    assert counts["reused"] >= rounds
    assert counts["mixed"] == 0
    assert counts["gone"] > 0
    assert counts["new"] == counts["reused"] == counts["gone"] + counts["whole"] + counts["late"]


def reuse_pids(rounds: int) -> Counter[str]:
    """Reuse a pid so often in a pid namespace of its own, where no other process takes it; count the outcomes."""
    counts: Counter[str] = Counter()

    def born(name: bytes) -> int:
        pid = os.fork()
        if pid == 0:
            set_name(name)
            signal.pause()
        while Path(f"/proc/{pid}/comm").read_bytes() != name + b"\n":
            time.sleep(0)
        return pid

    directory = Path(os.environ["VITALSD_RUNTIME_DIR"]).parent
    dice = random.Random(rounds)
    with serving(directory) as (_, ready):
        while counts["reused"] < rounds:
            first = born(b"first")
            with dial(ready["socket"]) as connection:
                query = f"pid={first}&window_ms=40&detail=full"
                connection.sendall(f"GET /metrics?{query} HTTP/1.1\r\nHost: vitalsd\r\n\r\n".encode())
                time.sleep(dice.uniform(0, 0.05))
                os.kill(first, signal.SIGKILL)
                os.waitpid(first, 0)
                Path("/proc/sys/kernel/ns_last_pid").write_text(str(first - 1), encoding="ascii")
                second = born(b"second")
                reply = read_reply(connection)
            body = json.loads(reply.body)
            if second == first:
                counts["reused"] += 1
                names = {thread["name"] for thread in body.get("threads", [])} | {body.get("target", {}).get("name")}
                answered = "whole" if "first" in names else "late"
                counts[{200: answered, 404: "gone", 410: "gone"}.get(reply.status, str(reply.status))] += 1
                counts["mixed"] += len(names - {None, "python3", "python"}) > 1
                status, body = asked(ready["socket"], f"/metrics?pid={first}&window_ms=10")
                counts["new"] += status == 200 and {each["name"] for each in body["threads"]} == {"second"}
            os.kill(second, signal.SIGKILL)
            os.waitpid(second, 0)
    return counts


# Clocks


STEPPED = """
import os, sys, time
real, base = time.time_ns, time.time
def step(): return int(open(os.environ["STEP"]).read() or 0)
time.time_ns = lambda: real() + step() * 10**9
time.time = lambda: base() + step()
import vitalsd.cli
vitalsd.cli.main()
"""


def test_wall_clock_step_in_mid_window_changes_no_rate(short_path: Path, start: Callable[..., Target]) -> None:
    """A day forth and back in mid-window: windows and rates are over monotonic time, and no sleep is made of it."""
    step = short_path / "step"
    step.write_text("0", encoding="ascii")
    target = start("--burn", "30")
    env = environment(short_path) | {"STEP": str(step)}
    options = ("--pid", str(target.pid), "--record-interval", "0.05")
    program = (sys.executable, "-c", STEPPED)
    with serving(short_path, *options, env=env, program=program) as (_, ready), dial(ready["socket"]) as connection:
        for day in ("86400", "-86400", "0"):
            connection.sendall(b"GET /metrics?window_ms=400&detail=full HTTP/1.1\r\nHost: vitalsd\r\n\r\n")
            time.sleep(0.1)
            step.write_text(day, encoding="ascii")
            body = json.loads(read_reply(connection).body)
            assert 380 <= body["sample_window_ms"] < 5000
            assert 0 < body["process"]["cpu_percent"] < 150
            assert body["window"]["suspended"] is False
        status, table = asked(ready["socket"], "/history?seconds=60")
        assert status == 200
        assert all(0 < elapsed < 5000 for elapsed in table["elapsed_ms"])
        assert max(table["cpu_percent"]) < 250
        assert "clock_set" in {event["kind"] for event in table["events"]} <= {"missed", "clock_set"}


# No disk


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounts a small disk")
def test_full_disk_affects_only_the_black_box(short_path: Path) -> None:
    """Metrics, history and marks go on, the answer says what is off, and it heals by itself."""
    state = short_path / "state"
    state.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k,mode=700", "none", str(state)], check=True)
    try:
        with serving(short_path, "--record-interval", "0.02") as (process, ready):
            where = ready["socket"]
            ballast = state / "ballast"
            with suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            error = eventually(lambda: asked(where, "/info")[1]["recorder"]["black_box"]["error"], 20)
            assert "full" in error
            assert asked(where, "/metrics?window_ms=10&detail=full")[1]["warnings"] == [error]
            assert get(where, "/history").status == 200
            assert get(where, "/report.zip?window_ms=10").status == 200
            assert get(where, "/healthz").status == 200
            ballast.unlink()
            begun = time.monotonic()
            eventually(lambda: asked(where, "/info")[1]["recorder"]["black_box"]["error"] is None, 10)
            print(f"healed in {time.monotonic() - begun:.2f} s")
            process.terminate()
            assert process.wait(10) == 0
            assert process.stderr is not None
            assert len(process.stderr.read().splitlines()) == 2
    finally:
        subprocess.run(["umount", "-l", str(state)], check=True)


if __name__ == "__main__":
    print(json.dumps(reuse_pids(int(sys.argv[1]))))
