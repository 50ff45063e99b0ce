"""Read how a process of Linux ended that is not a child of ours."""

import fcntl
import os
import struct

from vitalsd.sources.base import ExitStatus
from vitalsd.sources.linux.cpu_counters import reread
from vitalsd.sources.linux.procfs import MalformedError, parse_stat

__all__ = ["read_exit_status"]

PIDFD_GET_INFO = 0xC040FF0B  # _IOWR(0xFF, 11, struct pidfd_info of 64 bytes), linux/pidfd.h
PIDFD_INFO_EXIT = 1 << 3
INFO = struct.Struct("=Q52xi")
"""Fields of ``struct pidfd_info``: mask and exit_code."""


def read_exit_status(process_fd: int, stat_fd: int, pidfd: int) -> ExitStatus | None:
    """
    Return how a process ended; ``None`` if the kernel does not show it.

    Until its parent has collected it, ``stat`` has its status for a user that may trace it (proc_pid_stat(5)). After
    that, since Linux 6.15, a pidfd has it that was opened before.

    Args:
        process_fd: descriptor of ``/proc/<pid>``, opened while the process lived.
        stat_fd: descriptor of the ``stat`` of its main thread.
        pidfd: of the same process, or -1.
    """
    status = _of_zombie(process_fd, stat_fd)
    if status is None and pidfd >= 0:
        status = _of_pidfd(pidfd)
    return None if status is None else ExitStatus.of(status)


def _of_zombie(process_fd: int, stat_fd: int) -> int | None:
    try:
        content = reread(stat_fd)
        if parse_stat(content).state not in "ZX":
            return None
        os.readlink("exe", dir_fd=process_fd)
    except FileNotFoundError:  # not EACCES: to a user that may not trace it, stat shows a status of 0
        return int(content.rsplit(None, 1)[1])
    except (OSError, MalformedError):
        pass
    return None


def _of_pidfd(pidfd: int) -> int | None:
    reply = bytearray(INFO.size)
    INFO.pack_into(reply, 0, PIDFD_INFO_EXIT, 0)
    try:
        fcntl.ioctl(pidfd, PIDFD_GET_INFO, reply)
    except OSError:  # ENOTTY, and before 6.15 ESRCH: an older kernel
        return None
    mask, status = INFO.unpack(reply)
    return int(status) if mask & PIDFD_INFO_EXIT else None
