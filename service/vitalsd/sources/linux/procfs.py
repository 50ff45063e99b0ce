"""
Parse text of Linux ``/proc``; this module opens no file.

Each parser takes the whole content of one file as bytes, and raises only `MalformedError` for content that no kernel
writes. Sources of the formats: proc(5); fs/proc/array.c, fs/proc/task_mmu.c, kernel/sched/stats.h.
"""

import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from vitalsd.sources.names import decode_name

__all__ = [
    "STATES",
    "MalformedError",
    "Stat",
    "group_paths",
    "parse_schedstat",
    "parse_schedstats",
    "parse_stat",
    "parse_statm",
    "parse_status",
    "parse_tgid",
    "parse_uids",
]

STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "uninterruptible",
    "T": "stopped",
    "t": "traced",
    "Z": "zombie",
    "X": "dead",
    "x": "dead",
    "K": "wakekill",
    "W": "waking",
    "P": "parked",
    "I": "idle",
}
"""Names of states, by the letter in ``stat`` (fs/proc/array.c, task_state_array)."""


SIZE = re.compile(rb"^((?:Vm|Rss)[A-Za-z]+):[ \t]+([0-9]+) kB$", re.MULTILINE)
"""A size in ``status``; the file has 60 lines, and an expression finds them without a step of Python for each."""


class MalformedError(ValueError):
    """A file has content that the kernel does not write; the text quotes its start."""

    def __init__(self, file: str, content: bytes) -> None:
        super().__init__(f"unreadable content in {file}: {content[:64]!r}")


class Stat(NamedTuple):
    """The fields of ``/proc/<pid>/stat`` and ``/proc/<pid>/task/<tid>/stat`` that vitalsd uses."""

    name: str
    state: str
    parent: int
    flags: int
    minor_faults: int
    major_faults: int
    utime_ticks: int
    """Time in user mode in 1/``sysconf(SC_CLK_TCK)`` s; the kernel scales it so that utime + stime is the run time."""
    stime_ticks: int
    reaped_ticks: int
    """User and system time of all children that the process has waited for, and of theirs."""
    priority: int
    thread_count: int
    start_ticks: int
    """Start time after boot, on the clock that counts the time asleep."""
    vm_bytes: int
    image: tuple[int, ...]
    """Addresses that are fixed at exec; empty without ptrace permission, because the kernel then writes 0 or 1."""


def parse_stat(content: bytes) -> Stat:
    """
    Parse a ``stat`` file.

    The name is in parentheses and may contain any byte but NUL, such as ``)``, spaces and newlines. It ends at the
    *last* parenthesis, because only numbers follow it.
    """
    opened, closed = content.find(b"("), content.rfind(b")")
    fields = content[closed + 2 :].split()
    if not 0 < opened < closed or len(fields) < 22:
        raise MalformedError("stat", content)
    try:
        start_code = int(fields[23]) if len(fields) > 25 else 0
        return Stat(
            name=decode_name(content[opened + 1 : closed]),
            state=fields[0].decode("ascii"),
            parent=int(fields[1]),
            flags=int(fields[6]),
            minor_faults=int(fields[7]),
            major_faults=int(fields[9]),
            utime_ticks=int(fields[11]),
            stime_ticks=int(fields[12]),
            reaped_ticks=int(fields[13]) + int(fields[14]),
            priority=int(fields[15]),
            thread_count=int(fields[17]),
            start_ticks=int(fields[19]),
            vm_bytes=int(fields[20]),
            image=tuple(map(int, fields[23:26])) if start_code > 1 else (),
        )
    except ValueError:
        raise MalformedError("stat", content) from None


def parse_statm(content: bytes) -> tuple[int, int, int, int]:
    """
    Return the pages of address space, resident memory, program text and resident memory of files in ``statm``.

    All are 0 without memory.
    """
    fields = content.split()
    try:
        return int(fields[0]), int(fields[1]), int(fields[3]), int(fields[2])
    except (ValueError, IndexError):
        raise MalformedError("statm", content) from None


def parse_schedstats(contents: Sequence[bytes]) -> tuple[list[int], list[int]]:
    """
    Return how long each thread ran and how long it waited for a CPU, ns, from its ``schedstat`` ("run wait slices").

    One join and one split parse all files, so that no bytecode runs per thread.
    """
    fields = b"".join(contents).split()
    if len(fields) != 3 * len(contents):
        raise MalformedError("schedstat", next((c for c in contents if len(c.split()) != 3), b""))
    try:
        run_ns, wait_ns = list(map(int, fields[::3])), list(map(int, fields[1::3]))
    except ValueError:
        raise MalformedError("schedstat", b" ".join(fields)) from None
    if fields and min(min(run_ns), min(wait_ns)) < 0:
        raise MalformedError("schedstat", b" ".join(fields))
    return run_ns, wait_ns


def parse_schedstat(content: bytes) -> tuple[int, int, int]:
    """Return CPU time and time of waiting for a CPU, ns, and the number of time slices, of one ``schedstat``."""
    fields = content.split()
    try:
        cpu_ns, wait_ns, slices = map(int, fields)
    except ValueError:
        raise MalformedError("schedstat", content) from None
    return cpu_ns, wait_ns, slices


def parse_uids(content: bytes) -> frozenset[int]:
    """Return the real, effective, saved and file system user id in ``status``; empty if it does not have them."""
    found = re.search(rb"^Uid:((?:\t[0-9]{1,10}){4})$", content, re.MULTILINE)
    return frozenset() if found is None else frozenset(map(int, found[1].split()))


def parse_status(content: bytes) -> dict[str, int]:
    """Return the ``Vm*`` and ``Rss*`` sizes in ``status`` (``VmHWM``, ``VmSwap``, ``RssAnon``, ...), bytes."""
    return {key.decode("ascii"): int(size) * 1024 for key, size in SIZE.findall(content)}


def parse_tgid(content: bytes) -> int | None:
    """Return ``Tgid`` in ``status``: the process of a thread, in the pid namespace of this procfs."""
    _, found, rest = content.partition(b"\nTgid:\t")
    try:
        return int(rest.partition(b"\n")[0]) if found else None
    except ValueError:
        raise MalformedError("status", content) from None


def group_paths(content: bytes, controller: bytes) -> list[tuple[int, str]]:
    """
    Return version and path of the control groups in ``cgroup`` that `controller` may act on, see cgroups(7).

    The path of a group outside of the reader's cgroup namespace begins with ``/..``.
    """
    found = []
    for line in content.splitlines():
        _, _, rest = line.partition(b":")
        controllers, _, path = rest.partition(b":")
        if not controllers or controller in controllers.split(b","):
            found.append((1 if controllers else 2, os.fsdecode(path)))
    return found
