"""Read the figures of a Linux process and of its threads that a snapshot has on request."""

import os
from collections.abc import Sequence

from vitalsd.snapshot import ProcessFigures, ThreadFigures
from vitalsd.sources.linux.cpu_counters import USER_TICK_NS
from vitalsd.sources.linux.process_files import ProcessFiles
from vitalsd.sources.linux.procfs import STATES, Stat

__all__ = ["read_figures", "read_thread_figures"]


def read_thread_figures(threads: Sequence[Stat | None]) -> ThreadFigures:
    """Return the figures of each thread from its ``stat``, which is ``None`` if it has exited."""
    return ThreadFigures(
        user_ns=[stat.utime_ticks * USER_TICK_NS if stat else 0 for stat in threads],
        system_ns=[stat.stime_ticks * USER_TICK_NS if stat else 0 for stat in threads],
        states=[STATES.get(stat.state) if stat else "dead" for stat in threads],
        priorities=[stat.priority if stat else None for stat in threads],
    )


def read_figures(files: ProcessFiles, warnings: list[str]) -> ProcessFigures:
    """
    Read the figures of a process. A field that cannot be read is ``None``.

    Args:
        files: of the process.
        warnings: gets the reason why a field cannot be read.

    Raises:
        OSError, MalformedError: a file of the process cannot be read.
    """
    total, sizes = files.process_stat(), files.status()
    return ProcessFigures(
        user_ns=total.utime_ticks * USER_TICK_NS,
        system_ns=total.stime_ticks * USER_TICK_NS,
        peak_rss_bytes=sizes.get("VmHWM"),
        swap_bytes=sizes.get("VmSwap"),
        open_fds=_open_fds(files, warnings),
        minor_faults=total.minor_faults,
        major_faults=total.major_faults,
    )


def _open_fds(files: ProcessFiles, warnings: list[str]) -> int | None:
    # Since Linux 6.2 the size of fd/ is the count, for any user; procfs gives other directories the size 0.
    has_sizes = os.fstat(files.task).st_size == 0

    def count(path: str, directory: int) -> int:
        if has_sizes and (size := os.stat(f"{path}fd", dir_fd=directory).st_size):
            return size
        listed = os.open(f"{path}fd", os.O_RDONLY | os.O_DIRECTORY, dir_fd=directory)
        try:
            return len(os.listdir(listed))
        finally:
            os.close(listed)

    try:
        return files.of_member(count)
    except PermissionError:
        warnings.append("open_fds: only its own user may count the descriptors of this process")
    except FileNotFoundError:
        files.leader_stat()  # raises if the process is gone, and not only the list
        warnings.append(f"open_fds: {files.root} does not list the descriptors of this process")
    return None
