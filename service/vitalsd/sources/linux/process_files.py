"""
Keep the files of one Linux process open, and translate their errors.

Facts about the kernel on which this module depends (v6.18; each has a test):

- A descriptor of ``/proc/<pid>`` or of a file below it stays bound to that process or thread: after its exit every read
  fails with ESRCH, even if the kernel has reused the id.
- If the main thread has exited before the others, it is a zombie without memory, and ``task/`` still lists the others.
  The process is dead only if the zombie is its only thread.
- Files below ``task/<tid>/`` also show the whole process: memory, descriptors, command line. Those of a living thread
  still do after the main thread has exited.
"""

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

from vitalsd.sources.base import (
    AccessDeniedError,
    KernelError,
    NoSuchProcessError,
    SourceError,
    TargetGoneError,
    UnsupportedError,
)
from vitalsd.sources.linux.cpu_counters import GONE, read_file, reread
from vitalsd.sources.linux.exit_status import read_exit_status
from vitalsd.sources.linux.procfs import MalformedError, Stat, parse_stat, parse_statm, parse_status, parse_tgid

__all__ = ["MemoryPages", "ProcessFiles"]

ATTEMPTS = 8
"""Attempts to list the threads while the target executes a program, because all threads but one end in exec."""

T = TypeVar("T")


class MemoryPages(NamedTuple):
    """Memory of a process in pages, read through one of its threads."""

    vm: int
    rss: int
    text: int
    shared: int
    """Resident pages of files and of shared memory."""


class ProcessFiles:
    """
    The files of a process that stay open as long as its source; all data but that of its threads come from them.

    Args:
        pid: target, in the pid namespace of the procfs.
        root: mount point of procfs.
        has_pidfd: whether to open a pidfd, which needs a pid in our own pid namespace.

    Raises:
        SourceError: `NoSuchProcessError`, `AccessDeniedError`, `UnsupportedError` or `KernelError`.
    """

    def __init__(self, pid: int, root: str, *, has_pidfd: bool) -> None:
        self.pid = pid
        self.root = root
        self.member = pid
        """Id of the thread through which the process is read: the main one, or another if that has exited."""
        self._fds: list[int] = []
        self._process_stat = -1
        """Descriptor of the ``stat`` of the process; -1 until it is needed."""
        try:
            self.start_ticks, self.first_name = self._attach(has_pidfd)
        except BaseException:
            self.close()
            raise

    def _attach(self, has_pidfd: bool) -> tuple[int, str]:
        """Open the files, and return the start and the name of the main thread."""
        directory = f"{self.root}/{self.pid}"
        try:
            self.directory = self._keep(os.open(directory, os.O_RDONLY | os.O_DIRECTORY))
            self.task = self._keep(os.open("task", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self.directory))
            self._leader = self._keep(os.open(f"{self.pid}/stat", os.O_RDONLY, dir_fd=self.task))
            self._statm = self._keep(os.open("statm", os.O_RDONLY, dir_fd=self.directory))
            # Opened by pid; the reads below prove that it is of this process.
            self._pidfd = self._open_pidfd() if has_pidfd else -1
            process = parse_tgid(read_file("status", self.directory))
            if process not in (self.pid, None):
                raise NoSuchProcessError(f"no process has pid {self.pid}; it is a thread of process {process}")
            stat = self.leader_stat()
        except (FileNotFoundError, ProcessLookupError):
            raise self._absent() from None
        except PermissionError:
            raise self._denied(f"{self.root} hides it") from None
        except MalformedError as error:
            raise KernelError(f"process {self.pid}: {error}") from None
        except OSError as error:
            raise KernelError(f"cannot open {directory}: {error.strerror}") from None
        return stat.start_ticks, stat.name

    def _keep(self, fd: int) -> int:
        self._fds.append(fd)
        return fd

    def _open_pidfd(self) -> int:
        """Return a pidfd, which shows how the process ended (see `exit_status`), or -1 if it cannot be opened."""
        try:
            return self._keep(os.pidfd_open(self.pid))  # type: ignore[attr-defined, unused-ignore]
        except OSError:
            return -1

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return not self._fds

    def close(self) -> None:
        """Release every descriptor. A second call does nothing."""
        while self._fds:
            os.close(self._fds.pop())

    # Content

    def leader_stat(self) -> Stat:
        """Read the ``stat`` of the main thread, which may have exited."""
        return parse_stat(reread(self._leader))

    def process_stat(self) -> Stat:
        """Read the ``stat`` of the process, in which times and faults are sums over all threads."""
        if self._process_stat < 0:
            self._process_stat = self._keep(os.open("stat", os.O_RDONLY, dir_fd=self.directory))
        return parse_stat(reread(self._process_stat))

    def memory(self) -> MemoryPages:
        """Read the pages in use; all are 0 if the main thread has exited."""
        return MemoryPages(*parse_statm(os.pread(self._statm, 256, 0)))

    def status(self) -> dict[str, int]:
        """Read the sizes in ``status``, bytes."""
        return self.of_member(lambda path, directory: parse_status(read_file(f"{path}status", directory)))

    def of_member(self, read: Callable[[str, int], T]) -> T:
        """
        Call `read` with the path prefix and directory of a living thread's files, and return its result.

        If the thread exits meanwhile, call it again with another one.
        """
        while True:
            try:
                if self.member == self.pid:
                    return read("", self.directory)
                return read(f"{self.member}/", self.task)
            except (FileNotFoundError, ProcessLookupError):
                if self.member == self.pid:
                    raise
                self.find_member()

    def find_member(self) -> tuple[MemoryPages, Stat]:
        """
        Find a living thread, and read from it what the main thread, which has exited, does not show any more.

        If a thread executes a program, the kernel ends the others first, and then gives it the id of the main thread.

        Raises:
            TargetGoneError: no thread lives.
        """
        for _ in range(ATTEMPTS):
            for tid in self._candidates():
                try:
                    memory = MemoryPages(*parse_statm(read_file(f"{tid}/statm", self.task)))
                    stat = parse_stat(read_file(f"{tid}/stat", self.task))
                except OSError as error:
                    if error.errno not in GONE:
                        raise
                    continue
                if memory.vm:
                    self.member = tid
                    return memory, stat
            if self.leader_stat().thread_count <= 1:
                break
        raise self._gone("; its parent has not yet collected it (zombie)")

    def _candidates(self) -> Iterator[int]:
        """Yield ids of threads through which the process may be read: the last one, those listed, the main one."""
        yield self.member
        yield from map(int, os.listdir(self.task))
        yield self.pid

    # Errors

    def translated(self, error: OSError | MalformedError) -> SourceError:
        """Return the error of a source for an error of a file of this process."""
        match error:
            case ProcessLookupError() | FileNotFoundError():
                if self._is_hidden():
                    return AccessDeniedError(f"process {self.pid} does not let this user read it any more (hidepid)")
                return self._gone()
            case PermissionError():
                return AccessDeniedError(f"process {self.pid}: {error.strerror}: {error.filename}")
            case MalformedError():
                return KernelError(f"process {self.pid}: {error}")
            case _:
                return KernelError(f"process {self.pid}: {error.strerror}")

    def _gone(self, more: str = "") -> TargetGoneError:
        return TargetGoneError(
            f"target {self.pid} has exited{more}", read_exit_status(self.directory, self._leader, self._pidfd)
        )

    def _is_hidden(self) -> bool:
        """Return whether /proc now hides the living process: open files can be read, and no other can be opened."""
        try:
            os.close(os.open("stat", os.O_RDONLY, dir_fd=self.directory))
        except FileNotFoundError:
            try:
                return self.leader_stat().state not in "ZX"
            except (OSError, MalformedError):
                return False
        except OSError:
            pass
        return False

    def _absent(self) -> SourceError:
        """Return why ``/proc/<pid>`` does not exist; under hidepid=2 the process may exist."""
        if not os.path.exists(f"{self.root}/stat") and not os.path.exists(f"{self.root}/self"):
            return UnsupportedError(f"{self.root} is not a procfs; mount it or name another with --proc-root")
        if self.root == "/proc":
            try:
                os.kill(self.pid, 0)
            except PermissionError:
                return self._denied("/proc hides it (hidepid)")
            except (ProcessLookupError, OverflowError):
                pass
            else:
                if not os.path.exists(f"/proc/{self.pid}"):  # otherwise it has just started
                    return self._denied("/proc hides it (hidepid)")
        return NoSuchProcessError(f"no process has pid {self.pid}")

    def _denied(self, how: str) -> AccessDeniedError:
        """Return why an existing process cannot be read; kill(2) shows whether this user owns it."""
        try:
            os.kill(self.pid, 0)
        except OSError:
            return AccessDeniedError(f"process {self.pid} belongs to another user and {how}")
        return AccessDeniedError(
            f"process {self.pid} is yours and {how}: it does not let itself be read (PR_SET_DUMPABLE, or a program"
            " with privileges of its own); ask as root, or mount /proc without hidepid"
        )
