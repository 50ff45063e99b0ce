"""Read the resources that a process of macOS has used, through ``proc_pid_rusage``."""

import errno

from vitalsd.sources.darwin.apple_headers import RUSAGE_INFO_V4, RUSAGE_INFO_V6, rusage_info_v6
from vitalsd.sources.darwin.libsystem import LibSystem

__all__ = ["UsageReader"]


class UsageReader:
    """
    Read one process with the newest flavor that the kernel knows: V6 since macOS 13, else V4.

    The kernel answers for a zombie, and for another process that got the pid; both are `ProcessLookupError` here.

    Args:
        lib: libSystem.
        pid: of the process.
    """

    def __init__(self, lib: LibSystem, pid: int) -> None:
        self._lib = lib
        self._pid = pid
        self._usage = rusage_info_v6()
        self._flavor = RUSAGE_INFO_V6
        self._start_abstime: int | None = None

    @property
    def has_v6(self) -> bool:
        """Whether the last reading has the fields of V6."""
        return self._flavor == RUSAGE_INFO_V6

    def read(self) -> rusage_info_v6:
        """
        Return the resources used so far, in an object that the next call fills again.

        Raises:
            ProcessLookupError: the process has exited.
            OSError: the call failed, with its errno: EPERM for another user's process or in a sandbox.
        """
        usage = self._usage
        try:
            self._lib.proc.rusage(self._pid, usage, self._flavor)
        except OSError as error:
            if error.errno != errno.EINVAL or self._flavor == RUSAGE_INFO_V4:
                raise
            self._flavor = RUSAGE_INFO_V4
            self._lib.proc.rusage(self._pid, usage, self._flavor)
        if usage.ri_proc_exit_abstime or self._start_abstime not in (None, usage.ri_proc_start_abstime):
            raise ProcessLookupError(errno.ESRCH, "proc_pid_rusage")
        self._start_abstime = usage.ri_proc_start_abstime
        return usage
