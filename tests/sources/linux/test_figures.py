"""The figures of a process, beside what the process reads of itself."""

import errno
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from support.paths import DATA
from support.target import Target
from vitalsd.snapshot import Part, ProcessFigures, Snapshot
from vitalsd.sources.linux.cpu_counters import USER_TICK_NS
from vitalsd.sources.linux.source import LinuxSource

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]
Start = Callable[..., Target]
MIB = 1 << 20
CAPTURE = DATA / "proc"


def figures_of(snapshot: Snapshot) -> ProcessFigures:
    assert snapshot.figures is not None
    return snapshot.figures


def anonymous_of(snapshot: Snapshot) -> int:
    anonymous_bytes = figures_of(snapshot).anonymous_bytes
    assert anonymous_bytes is not None
    return anonymous_bytes


def test_leak_of_a_mebibyte_a_second_is_the_slope_of_anonymous_memory(start: Start) -> None:
    """Within 5 %; the target takes what is due at each step, so a late step does not change the slope."""
    target = start()
    taken, grown = [], 0
    with closing(LinuxSource(target.pid)) as source:
        begun = time.monotonic()
        while time.monotonic() - begun < 5:
            due = int((time.monotonic() - begun) * MIB)
            target.ask(f"grow {due - grown}")
            grown = due
            taken.append(source.snapshot(parts=Part.FIGURES))
            time.sleep(0.1)
    seconds = [snapshot.monotonic_ns / 1e9 for snapshot in taken]
    slope, _ = statistics.linear_regression(seconds, list(map(anonymous_of, taken)))
    assert slope == pytest.approx(MIB, rel=0.05)


def test_mapped_file_is_resident_and_not_anonymous(start: Start, tmp_path: Path) -> None:
    """A file of 32 MiB that is mapped and read."""
    file = tmp_path / "file"
    file.write_bytes(os.urandom(MIB) * 32)
    target = start()
    with closing(LinuxSource(target.pid)) as source:
        before = source.snapshot(parts=Part.FIGURES)
        target.ask(f"map {file}")
        after = source.snapshot(parts=Part.FIGURES)
    assert after.rss_bytes - before.rss_bytes > 30 * MIB
    assert anonymous_of(after) - anonymous_of(before) < MIB


def test_kernel_without_rss_anon_gives_resident_less_shared_memory(tmp_path: Path) -> None:
    """Of statm, as on a kernel before 4.5; a statm that counts no shared memory gives null with a reason."""
    capture = shutil.copytree(CAPTURE, tmp_path / "proc")
    with closing(LinuxSource(4242, root=str(capture))) as source:
        assert anonymous_of(source.snapshot(parts=Part.FIGURES)) == (3461 - 1686) * 4096
    (capture / "4242" / "statm").write_text("59498 3461 0 0 0 0 0\n")
    with closing(LinuxSource(4242, root=str(capture))) as source:
        snapshot = source.snapshot(parts=Part.FIGURES)
    assert figures_of(snapshot).anonymous_bytes is None
    assert [warning for warning in snapshot.warnings if "anonymous" in warning] == [
        "anonymous_kb: the kernel does not show which memory of this process belongs to no file"
    ]


def test_storm_of_short_children_is_in_the_reaped_time(start: Start) -> None:
    """Within 10 % of what the spawner's own getrusage shows, and its step is a tick for user and system time each."""
    target = start()
    with closing(LinuxSource(target.pid)) as source:
        before = figures_of(source.snapshot(parts=Part.FIGURES)).reaped_ns
        used_ns = target.ask("children 600")
        last = source.snapshot(parts=Part.FIGURES)
        after = figures_of(last).reaped_ns
    assert before is not None
    assert after is not None
    assert used_ns >= 600e6 > 10 * 4 * USER_TICK_NS
    assert after - before == pytest.approx(used_ns, rel=0.1)


def test_reaped_children_of_the_own_process_are_those_of_getrusage() -> None:
    """To the microsecond, which getrusage(2) has."""

    def usage_ns() -> int:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return round((usage.ru_utime + usage.ru_stime) * 1e9)

    with closing(LinuxSource()) as source:
        before = usage_ns()
        assert figures_of(source.snapshot(parts=Part.FIGURES)).reaped_ns == pytest.approx(before, abs=1000)
        subprocess.run([sys.executable, "-c", "for i in range(10**6): pass"], check=True)
        after = usage_ns()
        assert after - before > 10_000_000
        assert figures_of(source.snapshot(parts=Part.FIGURES)).reaped_ns == pytest.approx(after, abs=1000)


def test_ignored_children_are_not_in_the_reaped_time() -> None:
    """The kernel books no child of a process that ignores SIGCHLD, so the figure is a lower bound."""
    code = """
import os, signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print(flush=True)
sys.stdin.readline()
if not (child := os.fork()):
    for i in range(10**7): pass
    os._exit(0)
try:
    os.waitpid(child, 0)
except ChildProcessError:
    print(flush=True)
sys.stdin.readline()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as target:
        assert target.stdin is not None
        assert target.stdout is not None
        target.stdout.readline()
        with closing(LinuxSource(target.pid)) as source:
            target.stdin.write(b"\n")
            target.stdin.flush()
            assert target.stdout.readline() == b"\n"
            assert figures_of(source.snapshot(parts=Part.FIGURES)).reaped_ns == 0


def test_figures_need_no_file_of_a_thread(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recorder reads them once a second, whatever the number of threads."""
    target = start("--idle", "20")
    real, opened = os.open, []

    def only_of_the_process(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        opened.append(path)
        if path.partition("/")[0].isdecimal():
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(path, flags, mode, dir_fd=dir_fd)

    with closing(LinuxSource(target.pid)) as source:
        source.snapshot()
        monkeypatch.setattr(os, "open", only_of_the_process)
        snapshot = source.snapshot(parts=Part.FIGURES)
        monkeypatch.undo()
    assert snapshot.parts == Part.FIGURES
    assert figures_of(snapshot).open_fds is not None
    assert {"stat", "status"} <= set(opened)


def test_unreadable_files_make_figures_null_with_one_reason(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a security module does; the counters of threads come from files that are open already, and go on."""
    target = start("--idle", "2")
    real = os.open

    def denied(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if path == "status":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, flags, mode, dir_fd=dir_fd)

    with closing(LinuxSource(target.pid)) as source:
        monkeypatch.setattr(os, "open", denied)
        snapshot = source.snapshot(parts=Part.FIGURES)
        monkeypatch.undo()
        assert figures_of(snapshot) == ProcessFigures()
        assert snapshot.warnings == (
            f"memory, faults, open_fds and children: process {target.pid}: Permission denied: status",
        )
        assert len(snapshot.roster) == 3
        assert figures_of(source.snapshot(parts=Part.FIGURES)).anonymous_bytes
