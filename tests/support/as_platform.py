"""
Run ``vitalsd`` over another kernel, with a defect in the snapshots.

    python tests/support/as_platform.py PLATFORM DEFECT COMMAND ...

PLATFORM is ``linux``, or the path of the simulated libSystem, over which everything runs as on macOS. DEFECT is
``none``, a key of `DEFECTS`, `UNTOLD` or `EXPLAINED`.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from vitalsd.cli import main
from vitalsd.snapshot import (
    Child,
    Identity,
    MachineFigures,
    Part,
    ProcessFigures,
    ProcessTree,
    Snapshot,
    ThreadRoster,
)
from vitalsd.sources import platform as platforms
from vitalsd.sources.base import Source, TargetGoneError, ThreadLook
from vitalsd.sources.darwin.libsystem import LibSystem
from vitalsd.sources.platform import Platform, this_platform
from vitalsd.sources.programs import ProgramOf, no_program

__all__ = ["CHILD", "DEFECTS", "EXPLAINED", "KERNELS", "UNTOLD", "leaking", "planted", "program"]

UNSCALED = 24_000_000, 1_000_000_000
"""Ticks and ns of one second on Apple silicon: the factor of an error that takes ticks for ns."""
LOST = ("burn-30", "young-1")
"""Names of the threads that the defect `thread` leaves out."""
UNTOLD = "untold"
"""Value for the defect: a kernel that does not report how a process ended."""
EXPLAINED = "explained"
"""Value for the defect: a kernel that gives every figure, see `explained`."""

KERNELS = ["native", "simulated"] if sys.platform == "linux" else ["native"]
"""Kernels for a test: the running one, and on Linux the simulated one of macOS."""


def ticks(snapshot: Snapshot) -> Snapshot:
    """Return the snapshot with times in ticks instead of ns."""

    def unscaled(ns: int | None) -> Any:
        return None if ns is None else ns * UNSCALED[0] // UNSCALED[1]

    low, high = snapshot.exited_cpu_ns
    figures = snapshot.figures and snapshot.figures._replace(
        user_ns=unscaled(snapshot.figures.user_ns), system_ns=unscaled(snapshot.figures.system_ns)
    )
    return replace(
        snapshot, cpu_ns=unscaled(snapshot.cpu_ns), exited_cpu_ns=(unscaled(low), unscaled(high)), figures=figures
    )


def terminated(snapshot: Snapshot) -> Snapshot:
    """Return the snapshot with only the CPU time of the exited threads."""
    return replace(snapshot, cpu_ns=max(0, snapshot.exited_cpu_ns[0]))


def rss(snapshot: Snapshot) -> Snapshot:
    """Return the snapshot with resident memory in KiB instead of bytes."""
    return replace(snapshot, rss_bytes=snapshot.rss_bytes // 1024)


def thread(snapshot: Snapshot) -> Snapshot:
    """Return the snapshot without the threads of `LOST`."""
    listed = snapshot.roster
    kept = [i for i, name in enumerate(listed.names) if name not in LOST]

    def some(column: Any) -> Any:
        return [column[i] for i in kept]

    figures = snapshot.thread_figures
    if figures is not None:
        figures = figures._replace(**{name: some(column) for name, column in figures._asdict().items()})
    wait_ns = snapshot.thread_wait_ns
    roster = ThreadRoster(*(tuple(some(column)) for column in (listed.tids, listed.births, listed.names)))
    return replace(
        snapshot,
        thread_figures=figures,
        roster=roster,
        thread_cpu_ns=some(snapshot.thread_cpu_ns),
        thread_wait_ns=None if wait_ns is None else some(wait_ns),
    )


def descriptor(snapshot: Snapshot) -> Snapshot:
    """Leak a descriptor, and return the snapshot."""
    os.dup(2)
    return snapshot


DEFECTS: dict[str, Callable[[Snapshot], Snapshot]] = {
    "ticks": ticks,
    "terminated": terminated,
    "rss": rss,
    "thread": thread,
    "descriptor": descriptor,
}


@dataclass
class Spoilt:
    """Read snapshots from a source, and add a defect."""

    source: Source
    defect: Callable[[Snapshot], Snapshot]

    def identity(self) -> Identity:
        return self.source.identity()

    def snapshot(self, *, parts: Part = Part.NONE, names: bool = True) -> Snapshot:
        return self.defect(self.source.snapshot(parts=parts, names=names))

    def look_at(self, tid: int, *, closely: bool = True) -> ThreadLook | None:
        return self.source.look_at(tid, closely=closely)

    def restart(self) -> None:
        self.source.restart()

    def close(self) -> None:
        self.source.close()


@dataclass
class Untold:
    """Read from a source as on Linux before 6.15, which shows the exit status of a process only to its parent."""

    source: Source

    def identity(self) -> Identity:
        return self.source.identity()

    def snapshot(self, *, parts: Part = Part.NONE, names: bool = True) -> Snapshot:
        try:
            return self.source.snapshot(parts=parts, names=names)
        except TargetGoneError as error:
            raise TargetGoneError(str(error)) from None

    def look_at(self, tid: int, *, closely: bool = True) -> ThreadLook | None:
        return self.source.look_at(tid, closely=closely)

    def restart(self) -> None:
        self.source.restart()

    def close(self) -> None:
        self.source.close()


CHILD = "<b>child\x1b[2J"
"""Name of the child of a target that is `EXPLAINED`: one that neither a page nor a terminal may interpret."""


def explained(snapshot: Snapshot) -> Snapshot:
    """
    Return the snapshot with every figure that explains another, whatever the kernel gives.

    They grow with the clock: the first thread waits 4 % of the time, reaped children use 25 % of a core, the machine
    180 %.
    """
    ns = snapshot.monotonic_ns
    return replace(
        snapshot,
        thread_wait_ns=[0 if i else ns // 25 for i in range(len(snapshot.roster))],
        wait_ns=ns // 25,
        cpu_count=0,
        figures=ProcessFigures(
            user_ns=snapshot.cpu_ns,
            system_ns=0,
            anonymous_bytes=9 << 20,
            swap_bytes=3 << 20,
            open_fds=33,
            minor_faults=1,
            major_faults=ns // 500_000_000,
            reaped_ns=ns // 4,
        ),
        machine=MachineFigures(
            busy_ns=ns * 18 // 10,
            load_milli=1500,
            memory_available_bytes=5 << 30,
            swap_used_bytes=1 << 30,
            cpu_pressure_ns=ns // 10,
            memory_pressure_ns=ns // 20,
            io_pressure_ns=ns // 50,
            quota_throttled_ns=ns // 100,
            thermal_level=5,
        ),
    )


@dataclass
class Explained(Spoilt):
    """Read snapshots with every figure, and with a child where it is requested."""

    def snapshot(self, *, parts: Part = Part.NONE, names: bool = True) -> Snapshot:
        taken = self.defect(self.source.snapshot(parts=parts & ~Part.CHILDREN, names=names))
        if Part.CHILDREN not in parts:
            return taken
        ns = taken.monotonic_ns
        child = Child(99, 5, CHILD, ns // 2, ns // 2, 7 << 20, 2)
        tree = ProcessTree(taken.cpu_ns + ns // 2, ns // 4, taken.rss_bytes + child.rss_bytes, 2, 0, (child,))
        return replace(taken, tree=tree)


def _open_spoilt(
    platform: Platform, defect: str, pid: int | None = None, *, program_of: ProgramOf = no_program
) -> Source:
    source = platform.open_source(pid, program_of=program_of)
    if defect == EXPLAINED:
        return Explained(source, explained)
    return Untold(source) if defect == UNTOLD else Spoilt(source, DEFECTS[defect])


def planted(platform: Platform, defect: str) -> Platform:
    """Return the platform with a defect of `DEFECTS`."""
    return platform._replace(open_source=partial(_open_spoilt, platform, defect))


def program(library: Path | str, defect: str = "none") -> tuple[str, ...]:
    """Return the command that runs ``vitalsd`` over the simulated libSystem or ``linux``, with a defect."""
    return (sys.executable, "-P", os.path.abspath(__file__), str(library), defect)


def leaking(lib: LibSystem) -> LibSystem:
    """Return the library with a defect: it omits one release of ten."""
    release, calls = lib.mach._release, [0]

    def forgetful(task: int, port: int) -> int:
        calls[0] += 1
        return 0 if calls[0] % 10 == 0 else int(release(task, port))

    lib.mach._release = forgetful
    return lib


def run() -> None:
    """Run the command line."""
    where, defect, *arguments = sys.argv[1:]
    platform = this_platform() if where == "linux" else platforms.macos(where)
    platform = platform._replace(command=(sys.executable, "-P", os.path.abspath(__file__), where, defect))
    main(arguments, obj=platform if defect == "none" else planted(platform, defect), prog_name="vitalsd")


if __name__ == "__main__":
    run()
