"""Open the source that reads a process on this platform, and list processes. `vitalsd.sources.base` has the types."""

import sys
from collections.abc import Iterator

from vitalsd.sources.base import ProcessEntry, Source, UnsupportedError
from vitalsd.sources.programs import ProgramOf, no_program

__all__ = ["hides_processes", "list_processes", "open_source", "platform_name"]


def platform_name() -> str:
    """Return ``"linux"``, ``"macos"``, or Python's name of another platform."""
    return "macos" if sys.platform == "darwin" else sys.platform


def open_source(pid: int | None = None, *, proc_root: str = "/proc", program_of: ProgramOf = no_program) -> Source:
    """
    Open the source for `pid` (default: this process) on this platform.

    Args:
        pid: target process id.
        proc_root: Linux only: mount point of procfs, e.g. ``/host/proc`` in a container.
        program_of: makes `Identity.program` from the command of the process; by default it is empty.

    Raises:
        SourceError: `NoSuchProcessError`, `AccessDeniedError`, or `UnsupportedError` on another platform.
    """
    if sys.platform == "linux":
        from vitalsd.sources.linux.source import LinuxSource

        return LinuxSource(pid, root=proc_root, program_of=program_of)
    if sys.platform == "darwin":
        from vitalsd.sources.darwin.processes import open_process

        return open_process(pid, program_of=program_of)
    raise UnsupportedError(f"vitalsd reads macOS and Linux; this is {sys.platform}")


def hides_processes(*, proc_root: str = "/proc") -> bool:
    """
    Return whether the kernel hides processes from other users.

    Platform limit: only Linux can hide them. On macOS the answer is False, because ps(1) shows all processes.
    """
    if sys.platform != "linux":
        return False
    from vitalsd.sources.linux.processes import hides_processes

    return hides_processes(proc_root)


def list_processes(*, proc_root: str = "/proc") -> Iterator[ProcessEntry]:
    """
    Yield the processes that this user may sample, by ascending pid; skip those that exit meanwhile.

    Raises:
        UnsupportedError: on another platform.
    """
    if sys.platform == "linux":
        from vitalsd.sources.linux.processes import list_processes as processes

        return processes(proc_root)
    if sys.platform == "darwin":
        from vitalsd.sources.darwin.processes import list_processes as darwin_processes

        return darwin_processes()
    raise UnsupportedError(f"vitalsd reads macOS and Linux; this is {sys.platform}")
