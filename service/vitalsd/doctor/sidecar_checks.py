"""Check a real sidecar of a real process: its answers, runtime file, cost, black box and end."""

import math
import os
import re
import signal
import stat
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx

from vitalsd.contract.metrics import Measured, parse_runtime_metrics
from vitalsd.discovery.runtime_file import discover
from vitalsd.doctor.cpu_load import CpuLoadProcess
from vitalsd.doctor.finding import BUG, Finding, make_finding, not_here
from vitalsd.recording.run_directory import RunDirectory
from vitalsd.recording.run_reader import UnreadableRunError, read_run
from vitalsd.sidecar.spawn import SpawnError, spawn
from vitalsd.sidecar.spawned import Spawned
from vitalsd.snapshot import Part, Snapshot, measure
from vitalsd.sources.platform import Platform

__all__ = ["sidecar"]

WINDOW_MS = 200
"""Length of the windows that are requested, ms."""
SHARED_MS = 190
"""Least length of such a window, ms: it may begin with a snapshot from just before the request, see `REUSE_PART`."""
COST_S = 2.5
"""Time over which the cost of the sidecar is measured, s."""
CPU_PERCENT = 1.0
"""Limit of the CPU time of a sidecar that only records, percent of a core."""
RSS_MIB = 96
"""Limit of the resident memory of a sidecar, MiB."""
WAKEUPS_PER_S = 20
"""Limit of the wakeups of all threads of a sidecar together, per second."""
LATE_MS = 900
"""Limit of the time for a recorded window of a second, ms: one that is measured takes more than a second."""
END_S = 3.0
"""Limit of the time from SIGTERM to the exit, s."""
START_S = 30.0
"""Limit of the time to start a sidecar, and of the time for an answer, s."""


def sidecar(platform: Platform, places: tuple[Path, Path] | None) -> Iterator[Finding]:
    """
    Check one sidecar, with a target that burns CPU time.

    Args:
        platform: the platform; it runs the sidecar.
        places: private directories for its runtime files and its state, with those of no other sidecar; ``None``: they
            could not be made.
    """
    if places is None:
        yield not_here("service", "sidecar", "no place for its files: see the directories above")
        return
    run, state = places
    present = frozenset(os.listdir(run))
    env = {**os.environ, "VITALSD_RUNTIME_DIR": str(run), "VITALSD_STATE_DIR": str(state)}
    with CpuLoadProcess((0, 30)) as load:

        def start() -> Spawned:
            options = ("--exit-with-target", "--port", "0")
            return spawn(load.pid, options=options, command=platform.command, env=env, timeout_s=START_S)

        begun = time.monotonic()
        try:
            service = start()
        except SpawnError as error:
            yield make_finding("service.start", "sidecar starts", "it answers", str(error), False, _by_hand(load.pid))
            return
        with service:
            took = f"{(time.monotonic() - begun) * 1000:.0f} ms"
            yield make_finding("service.start", "sidecar starts", "it answers", took, True, "")
            yield from _asked(service, load)
            yield _found(platform, service, load, run)
            yield _modes(service)
            yield from _cost(platform, service)
            yield _trailing(service, load)
            os.kill(service.pid, signal.SIGKILL)
            service.stop()
        yield _black_box(state / "runs", load)
        with start() as service:
            yield _end(service, run, present)


def _by_hand(pid: int) -> str:
    return f"start it by hand and read its messages: vitalsd serve --pid {pid}"


def _get(service: Spawned, path: str, *, uds: bool = False) -> httpx.Response:
    # trust_env: a proxy of the environment cannot reach what is on this machine.
    transport = httpx.HTTPTransport(uds=service.socket if uds else None, trust_env=False)
    with httpx.Client(transport=transport, trust_env=False, timeout=START_S) as client:
        return client.get((("http://vitalsd" if uds else service.url) or "") + path)


def _asked(service: Spawned, load: CpuLoadProcess) -> Iterator[Finding]:
    for check, what, uds in (("http.tcp", "GET /metrics over TCP", False), ("http.unix", "the same by socket", True)):
        if uds and service.socket is None:
            yield make_finding(check, what, "a Unix socket", "there is none", False, "see the directories above")
            continue
        begun = time.monotonic()
        try:
            answer = _get(service, f"/metrics?window_ms={WINDOW_MS}", uds=uds)
            answered = parse_runtime_metrics(answer.content)
        except (httpx.HTTPError, ValueError) as error:
            failure = f"{type(error).__name__}: {error}"
            yield make_finding(
                check, what, "an answer", failure, False, "check whether a firewall or a sandbox blocks the connection"
            )
            continue
        took_ms = (time.monotonic() - begun) * 1000
        if isinstance(answered, Measured):
            tids = {thread.tid for thread in answered.threads}
            good = set(load.tids.values()) <= tids and answered.sample_window_ms >= SHARED_MS
            measured = f"{len(answered.threads)} threads over {answered.sample_window_ms} ms, after {took_ms:.0f} ms"
        else:
            good, measured = False, answered.reason
        expected = f"its {len(load.tids) + 1} threads, over {SHARED_MS} ms or more"
        yield make_finding(check, what, expected, measured, good, BUG)


def _found(platform: Platform, service: Spawned, load: CpuLoadProcess, run: Path) -> Finding:
    found = discover(load.pid, directories=[run], kernel=platform.process_identities())
    first = found[0] if found else None
    good = first is not None and first.pid == service.pid and first.url == service.url
    return make_finding(
        "discovery",
        "found by its runtime file",
        f"sidecar {service.pid} at {service.url}",
        f"sidecar {first.pid} at {first.url}" if first else "no sidecar",
        good and first is not None and first.target is not None and first.target.pid == load.pid,
        f"`vitalsd endpoints` lists what is found; {BUG}",
    )


def _modes(service: Spawned) -> Finding:
    paths = [Path(path) for path in (service.socket, service.runtime_file) if path is not None]
    modes = [f"{stat.S_IMODE(os.lstat(path).st_mode):04o}" for path in (*paths, *(path.parent for path in paths[:1]))]
    return make_finding(
        "socket.modes",
        "modes of socket, runtime file, directory",
        "0600, 0600, 0700",
        ", ".join(modes),
        modes == ["0600", "0600", "0700"],
        "the file system does not keep modes: name another place in VITALSD_RUNTIME_DIR",
    )


def _cost(platform: Platform, service: Spawned) -> Iterator[Finding]:
    """Judge the cost of the sidecar at its default of one snapshot a second, without requests."""
    time.sleep(0.5)  # until the sidecar has done the rest of the work for the last answer
    with closing(platform.open_source(service.pid)) as source:
        first, woken = (
            source.snapshot(parts=Part.DETAIL),
            _wakeups(platform, source.snapshot(parts=Part.DETAIL), service.pid),
        )
        time.sleep(COST_S)
        last = source.snapshot(parts=Part.DETAIL)
    measured = measure(first, last)
    percent = 100 / measured.elapsed_ns
    error = measured.cpu_error_ns * percent
    cost = measured.cpu_ns * percent
    yield make_finding(
        "cost.cpu",
        "a recording sidecar's CPU",
        f"at most {CPU_PERCENT} % of a core",
        f"{cost:.2f} % ± {error:.2f}",
        cost <= CPU_PERCENT + error,
        "the machine may be very busy: try again; vitalsd serve --record-interval 5 costs less",
    )
    yield make_finding(
        "cost.rss",
        "its resident memory",
        f"at most {RSS_MIB} MiB",
        f"{last.rss_bytes / (1 << 20):.0f} MiB",
        last.rss_bytes <= RSS_MIB << 20,
        BUG,
    )
    now = _wakeups(platform, last, service.pid)
    if woken is None or now is None:
        yield not_here("cost.wakeups", "its wakeups", "the kernel does not count them")
        return
    rate = (now - woken) * 1e9 / measured.elapsed_ns
    yield make_finding(
        "cost.wakeups",
        "its wakeups",
        f"at most {WAKEUPS_PER_S} a second",
        f"{rate:.1f} a second",
        rate <= WAKEUPS_PER_S,
        f"a part of the sidecar polls; {BUG}",
    )


def _wakeups(platform: Platform, snapshot: Snapshot, pid: int) -> int | None:
    """Return how often its threads were woken so far; on Linux, how often one of them began to wait."""
    figures = snapshot.figures
    if figures is not None and figures.interrupt_wakeups is not None:
        return figures.interrupt_wakeups + (figures.idle_wakeups or 0)
    if platform.name != "linux":
        return None
    number = 0
    for tid in snapshot.roster.tids:
        with suppress(OSError):
            status = Path(f"/proc/{pid}/task/{tid}/status").read_text(encoding="utf-8", errors="replace")
            if found := re.search(r"^voluntary_ctxt_switches:\s*([0-9]+)$", status, re.MULTILINE):
                number += int(found[1])
    return number


def _trailing(service: Spawned, load: CpuLoadProcess) -> Finding:
    """
    Check that the record answers for the second that just ended. The quickest of three answers counts.

    The sidecar must have recorded for longer than the window.
    """
    took_ms = math.inf
    for _ in range(3):
        begun = time.monotonic()
        answer: dict[str, Any] = _get(service, "/metrics?mode=trailing&window_ms=1000&detail=full").json()
        took_ms = min(took_ms, (time.monotonic() - begun) * 1000)
    window = answer.get("window", {"mode": answer.get("reason"), "measured_ms": 0})
    tid = load.tids["burn-30"]
    busy = next((each["cpu_percent"] for each in answer.get("threads", []) if each["tid"] == tid), 0.0)
    return make_finding(
        "trailing",
        "the second that just ended",
        f"within {LATE_MS} ms, with the thread that used CPU",
        f"{window['mode']}, {window['measured_ms']:.0f} ms, after {took_ms:.0f} ms, {busy:.1f} %",
        window["mode"] == "trailing" and window["measured_ms"] >= 500 and took_ms <= LATE_MS and busy > 0,
        "see `recorder` in GET /info: the sidecar may not be recording",
    )


def _black_box(path: Path, load: CpuLoadProcess) -> Finding:
    """Judge the black box of a sidecar that SIGKILL has ended, which could not close it."""
    try:
        run = next((run for run in RunDirectory(path).runs() if run.identity.pid == load.pid), None)
        kept = len(read_run(run.path)[1]) if run else 0
        measured = f"{run.state}, {kept} snapshots" if run else "no run on disk"
    except (UnreadableRunError, OSError) as error:
        run, kept, measured = None, 0, str(error)
    return make_finding(
        "blackbox",
        "black box after kill -9",
        "crashed, 2 snapshots or more",
        measured,
        run is not None and run.state == "crashed" and kept >= 2,
        "the disk may be full, or a network file system: name another place in VITALSD_STATE_DIR",
    )


def _end(service: Spawned, run: Path, present: frozenset[str]) -> Finding:
    """
    Check that a sidecar ends by SIGTERM and leaves no file, not even of the killed one that it replaced.

    Args:
        service: the sidecar.
        run: its directory of runtime files.
        present: names in `run` before the first sidecar.
    """
    begun = time.monotonic()
    status = service.stop(2 * END_S)
    took_s = time.monotonic() - begun
    left = sorted(set(os.listdir(run)) - present)
    return make_finding(
        "end",
        "end by SIGTERM, and files that are left",
        f"status 0 within {END_S:.0f} s, nothing",
        f"status {status} after {took_s:.1f} s, {', '.join(left) or 'nothing'}",
        status == 0 and took_s <= END_S and not left,
        BUG,
    )
