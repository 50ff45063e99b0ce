"""Read the figures of a Linux process and of its threads that a snapshot has on request."""

import os
import resource
from collections.abc import Sequence

from vitalsd.snapshot import ProcessFigures, ThreadFigures
from vitalsd.sources.base import AccessDeniedError
from vitalsd.sources.linux.cpu_counters import USER_TICK_NS, read_file
from vitalsd.sources.linux.process_files import ProcessFiles
from vitalsd.sources.linux.processes import PAGE_BYTES
from vitalsd.sources.linux.procfs import STATES, Stat, parse_statm

__all__ = ["read_figures", "read_thread_figures"]


def read_thread_figures(threads: Sequence[Stat | None]) -> ThreadFigures:
    """Return the figures of each thread from its ``stat``, which is ``None`` if it has exited."""
    return ThreadFigures(
        user_ns=[stat.utime_ticks * USER_TICK_NS if stat else 0 for stat in threads],
        system_ns=[stat.stime_ticks * USER_TICK_NS if stat else 0 for stat in threads],
        states=[STATES.get(stat.state) if stat else "dead" for stat in threads],
        priorities=[stat.priority if stat else None for stat in threads],
    )


def read_figures(files: ProcessFiles, warnings: list[str], *, is_own: bool) -> ProcessFigures:
    """
    Read the figures of a process, and no file of a thread. A field that cannot be read is ``None``.

    Args:
        files: of the process.
        warnings: gets the reason why a field cannot be read.
        is_own: whether it is this process.

    Raises:
        OSError, MalformedError: a file of the process cannot be read, but not because the user may not read it.
    """
    try:
        total, sizes = files.process_stat(), files.status()
    except OSError as error:
        denied = files.translated(error)
        if not isinstance(denied, AccessDeniedError):
            raise
        warnings.append(f"memory, faults, open_fds and children: {denied}")
        return ProcessFigures()
    return ProcessFigures(
        user_ns=total.utime_ticks * USER_TICK_NS,
        system_ns=total.stime_ticks * USER_TICK_NS,
        anonymous_bytes=_anonymous_bytes(files, sizes, warnings),
        peak_rss_bytes=sizes.get("VmHWM"),
        swap_bytes=sizes.get("VmSwap"),
        open_fds=_open_fds(files, warnings),
        minor_faults=total.minor_faults,
        major_faults=total.major_faults,
        reaped_ns=_own_reaped_ns() if is_own else total.reaped_ticks * USER_TICK_NS,
    )


def _own_reaped_ns() -> int:
    """Return the CPU time of the children of this process that it has waited for, in steps of 1 µs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round((usage.ru_utime + usage.ru_stime) * 1e6) * 1000


def _anonymous_bytes(files: ProcessFiles, sizes: dict[str, int], warnings: list[str]) -> int | None:
    """Return ``RssAnon``, which kernels before 4.5 do not write; there, resident memory less that of files."""
    if "RssAnon" in sizes:
        return sizes["RssAnon"]
    _, resident, _, shared = files.of_member(lambda path, directory: parse_statm(read_file(f"{path}statm", directory)))
    if shared:
        return max(0, resident - shared) * PAGE_BYTES
    # A program maps at least its own file, so 0 is no count: a kernel thread, or an emulated /proc.
    warnings.append("anonymous_kb: the kernel does not show which memory of this process belongs to no file")
    return None


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
