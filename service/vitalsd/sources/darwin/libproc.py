"""
Call libproc, which reads any process of our effective user.

Facts about the functions on which the calls depend (xnu-11417):

- ``proc_pidinfo`` returns 0 for an error *and* for an empty list; only errno distinguishes them.
- ``proc_pid_rusage`` has no argument for the size of the buffer, and writes the whole struct of its flavor.
"""

import ctypes
import errno
import os
import sys
from collections.abc import Sequence
from ctypes import Structure, c_char, c_int, c_int32, c_size_t, c_uint64
from itertools import repeat
from typing import Any, Literal

from vitalsd.sources.darwin.apple_headers import (
    ARG_MAX,
    CTL_KERN,
    KERN_PROCARGS2,
    PROC_PIDLISTFDS,
    PROC_PIDLISTTHREADIDS,
    PROC_PIDT_SHORTBSDINFO,
    PROC_PIDTASKALLINFO,
    PROC_PIDTHREADID64INFO,
    PROC_PIDUNIQIDENTIFIERINFO,
    PROC_PIDVNODEPATHINFO,
    proc_bsdshortinfo,
    proc_taskallinfo,
    proc_threadinfo,
    proc_uniqidentifierinfo,
    proc_vnodepathinfo,
    rusage_info_v2,
    rusage_info_v4,
    rusage_info_v6,
)
from vitalsd.sources.darwin.functions import MachError, as_passed, os_error
from vitalsd.sources.darwin.thread_rows import ThreadRows

__all__ = ["Libproc"]

_PROC_FLAVORS: dict[type[Structure], tuple[str, int]] = {
    proc_taskallinfo: ("PROC_PIDTASKALLINFO", PROC_PIDTASKALLINFO),
    proc_bsdshortinfo: ("PROC_PIDT_SHORTBSDINFO", PROC_PIDT_SHORTBSDINFO),
    proc_uniqidentifierinfo: ("PROC_PIDUNIQIDENTIFIERINFO", PROC_PIDUNIQIDENTIFIERINFO),
    proc_vnodepathinfo: ("PROC_PIDVNODEPATHINFO", PROC_PIDVNODEPATHINFO),
}


class Libproc:
    """
    Calls on processes by their pids. Each releases the interpreter lock, because it may wait for a target inside exec.

    Args:
        slow: see `vitalsd.sources.darwin.libsystem.LibSystem`.

    Raises:
        OSError: a call failed, with its errno.
        MachError: a reply is shorter than documented.
    """

    def __init__(self, slow: Any) -> None:
        self._slow = slow
        self._pidinfo_as_passed = as_passed(slow, "proc_pidinfo")

    def info(self, pid: int, info: Structure, arg: int = 0) -> None:
        """Fill `info`; its type determines the flavor."""
        name, flavor = _PROC_FLAVORS[type(info)]
        size = ctypes.sizeof(info)
        got = self._pidinfo(name, pid, flavor, arg, ctypes.addressof(info), size)
        if got < size:
            raise MachError(f"proc_pidinfo({name}) answered {got} bytes of {size}")

    def list_of(self, pid: int, flavor: Literal["PROC_PIDLISTFDS", "PROC_PIDLISTTHREADIDS"], buffer: Any) -> int:
        """Fill `buffer` with a list, and return its length in bytes; if the buffer is full, the list may be longer."""
        number = PROC_PIDLISTFDS if flavor == "PROC_PIDLISTFDS" else PROC_PIDLISTTHREADIDS
        return self._pidinfo(flavor, pid, number, 0, ctypes.addressof(buffer), ctypes.sizeof(buffer))

    def rusage(self, pid: int, info: rusage_info_v2 | rusage_info_v4 | rusage_info_v6, flavor: int) -> None:
        """Fill the fields of `info` that `flavor` has: that of the struct, or an older one."""
        self._slow.proc_pid_rusage(pid, flavor, ctypes.addressof(info))

    def command_line(self, pid: int) -> tuple[str, list[bytes]]:
        """
        Return the path of the executable, and the words of the command line, first the name of the program.

        The reply also contains the environment, which is not returned.

        Raises:
            OSError: EINVAL for a process that is gone, is a zombie or belongs to another user.
        """
        oid = (c_int * 3)(CTL_KERN, KERN_PROCARGS2, pid)
        # Into a buffer shorter than the reply the kernel writes the end of the reply, which is the environment.
        buffer = (c_char * ARG_MAX)()
        size = c_size_t(ARG_MAX)
        try:
            self._slow.sysctl(
                ctypes.addressof(oid), len(oid), ctypes.addressof(buffer), ctypes.addressof(size), None, 0
            )
        except OSError as error:
            raise os_error("sysctl(KERN_PROCARGS2)", error.errno or 0) from None
        answer = ctypes.string_at(buffer, size.value)
        number = int.from_bytes(answer[:4], sys.byteorder)
        path, _, padded = answer[4:].partition(b"\0")
        return os.fsdecode(path), padded.lstrip(b"\0").split(b"\0", number)[:number]

    def working_directory(self, pid: int) -> str:
        """
        Return the absolute path of the current directory of process `pid`.

        Source: ``pvi_cdir`` of PROC_PIDVNODEPATHINFO. The kernel puts the path together from the names in its cache and
        leaves out the first names of one that is longer than 1023 bytes, which the reply does not show. The kernel also
        reads the attributes of the directory, so the call can wait for a file server.

        Raises:
            OSError: ESRCH for a process that is gone or a zombie; EPERM for another user's; ENOENT if the kernel has
                no path of the directory; any other errno of the file system or of a security policy.
            MachError: the reply is shorter than the struct.
        """
        info = proc_vnodepathinfo()
        self.info(pid, info)
        path = os.fsdecode(info.pvi_cdir.vip_path)
        if not path:
            raise os_error("proc_pidinfo(PROC_PIDVNODEPATHINFO)", errno.ENOENT)
        return path

    def pids(self) -> list[int]:
        """Return the pids of all processes, also of zombies and of other users' processes, ascending."""
        room = int(self._slow.proc_listallpids(None, 0))
        while True:
            buffer = (c_int32 * (room + 32))()
            count = int(self._slow.proc_listallpids(ctypes.addressof(buffer), ctypes.sizeof(buffer)))
            if count < len(buffer):
                return sorted(buffer[:count])
            room = 2 * len(buffer)

    def children(self, pid: int) -> list[int]:
        """
        Return the pids of the children of a process, also of zombies and of other users' processes, ascending.

        The list is empty for a process that is gone. The kernel walks through all processes for it.
        """
        room = 64
        while True:
            buffer = (c_int32 * room)()
            ctypes.set_errno(0)
            count = int(self._slow.proc_listchildpids(pid, ctypes.addressof(buffer), ctypes.sizeof(buffer)))
            if count <= 0 and ctypes.get_errno():
                raise os_error("proc_listchildpids", ctypes.get_errno())
            if count < room:
                return sorted(buffer[:count])
            room *= 2

    def _pidinfo(self, name: str, pid: int, flavor: int, arg: int, address: int, size: int) -> int:
        ctypes.set_errno(0)
        got: int = self._slow.proc_pidinfo(pid, flavor, arg, address, size)
        if got <= 0 and ctypes.get_errno():
            raise os_error(f"proc_pidinfo({name})", ctypes.get_errno())
        return got

    def thread_infos(self, pid: int, thread_ids: Sequence[int], rows: ThreadRows) -> Sequence[int]:
        """
        Fill `rows` with the threads `thread_ids` of a process, and return these ids, 0 for a thread that has ended.

        It makes one call per thread. If that fails, a second call reads the errno, which later calls have overwritten.
        """
        size = ctypes.sizeof(proc_threadinfo)
        rows.reserve(len(thread_ids))
        asked = map(c_uint64, thread_ids)
        got = list(
            map(self._pidinfo_as_passed, repeat(pid), repeat(PROC_PIDTHREADID64INFO), asked, rows.infos, repeat(size))
        )
        if got.count(size) == len(got):
            return thread_ids
        return [
            tid if bytes_got == size or self._thread_info(pid, tid, address) else 0
            for tid, bytes_got, address in zip(thread_ids, got, rows.info_at, strict=False)
        ]

    def _thread_info(self, pid: int, thread_id: int, address: int) -> bool:
        """Write the `proc_threadinfo` of a thread to `address`; False if it or its process has ended."""
        name, size = "PROC_PIDTHREADID64INFO", ctypes.sizeof(proc_threadinfo)
        try:
            got = self._pidinfo(name, pid, PROC_PIDTHREADID64INFO, thread_id, address, size)
        except ProcessLookupError:
            return False
        if got < size:
            raise MachError(f"proc_pidinfo({name}) answered {got} bytes of {size}")
        return True
