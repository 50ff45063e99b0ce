"""
Look at single threads of one Linux process: what they do, and where in the kernel they sleep.

Facts about the kernel on which this module depends (v6.18; each has a test):

- A descriptor of ``task/<tid>/schedstat`` stays bound to that thread: after its exit a read fails with ESRCH, even if
  the kernel has reused the id.
- ``wchan`` is ``0`` for a thread that does not sleep, and for every thread of a process that the reader may not trace
  by its user id (ptrace(2), PTRACE_MODE_READ): one of another user, or one that is not dumpable.
- Field 12 of ``task/<tid>/stat`` counts the major faults of that thread alone.
- Without run-delay accounting in the kernel, all three fields of ``schedstat`` are 0.
"""

import os
import time

from vitalsd.sources.base import ThreadLook
from vitalsd.sources.linux.cpu_counters import GONE, USER_TICK_NS, read_file
from vitalsd.sources.linux.procfs import STATES, parse_schedstat, parse_stat

__all__ = ["ThreadLooks", "wait_channel"]

MAX_KEPT = 40
"""Descriptors that stay open: more than a page has heartbeats."""

SYNONYMS = {
    "ep_poll": "epoll",
    "do_epoll_wait": "epoll",
    "do_epoll_pwait": "epoll",
    "poll_schedule_timeout": "poll",
    "do_poll": "poll",
    "do_sys_poll": "poll",
    "do_select": "select",
    "core_sys_select": "select",
    "futex_do_wait": "futex",
    "futex_wait": "futex",
    "futex_wait_queue": "futex",
    "futex_wait_queue_me": "futex",
    "futex_wait_multiple": "futex",
    "futex_wait_requeue_pi": "futex",
    "futex_lock_pi": "futex",
    "rt_mutex_slowlock_block": "futex",
    "__refrigerator": "frozen",
    "get_signal": "frozen",
    "do_freezer_trap": "frozen",
    "do_signal_stop": "stopped",
}
"""
Names of what a thread waits for, by the function of the kernel. select(2) sleeps in the function of poll(2), so both
mostly have the name ``poll``. A thread that cgroup v2 freezes sleeps in ``get_signal`` or ``do_freezer_trap``.
Sources: fs/eventpoll.c, fs/select.c, kernel/futex/, kernel/freezer.c, kernel/signal.c, from v4.15 to v6.18.
"""


class ThreadLooks:
    """
    Look at threads below ``task/``, and keep the ``schedstat`` of the last `MAX_KEPT` of them open.

    Args:
        task_fd: descriptor of ``/proc/<pid>/task``.
    """

    def __init__(self, task_fd: int) -> None:
        self._task_fd = task_fd
        self._schedstats: dict[int, int] = {}
        """Descriptors by thread id, in the order in which they were opened."""

    def look_at(self, tid: int, *, closely: bool) -> ThreadLook | None:
        """
        Look at a thread; see `vitalsd.sources.base.Source.look_at`.

        Raises:
            OSError: a file cannot be read; not for a thread that has ended.
            MalformedError: a file has content that no kernel writes.
        """
        begun_ns = time.monotonic_ns()  # before the first read, after which Python may wait for the interpreter lock
        try:
            cpu_ns, wait_ns, slices = parse_schedstat(self._read_schedstat(tid))
            counts = cpu_ns > 0
            if not closely and counts:
                return ThreadLook(begun_ns, cpu_ns, wait_ns, slices)
            stat = parse_stat(read_file(f"{tid}/stat", self._task_fd))
            if stat.state in "ZXx":
                return None
            channel = wait_channel(read_file(f"{tid}/wchan", self._task_fd)) if closely else None
        except OSError as error:
            if error.errno not in GONE:
                raise
            self._release(tid)
            return None
        return ThreadLook(
            begun_ns,
            cpu_ns if counts else (stat.utime_ticks + stat.stime_ticks) * USER_TICK_NS,
            wait_ns if counts else None,
            slices if counts else None,
            STATES.get(stat.state),
            stat.major_faults,
            channel,
        )

    def close(self) -> None:
        """Release every descriptor."""
        for tid in list(self._schedstats):
            self._release(tid)

    def _read_schedstat(self, tid: int) -> bytes:
        fd = self._schedstats.get(tid)
        if fd is None:
            if len(self._schedstats) >= MAX_KEPT:
                self._release(next(iter(self._schedstats)))
            try:
                fd = os.open(f"{tid}/schedstat", os.O_RDONLY, dir_fd=self._task_fd)
            except FileNotFoundError:
                os.stat(str(tid), dir_fd=self._task_fd)  # raises if it is the thread that does not exist
                return b"0 0 0"
            self._schedstats[tid] = fd
        return os.pread(fd, 64, 0)

    def _release(self, tid: int) -> None:
        fd = self._schedstats.pop(tid, None)
        if fd is not None:
            os.close(fd)


def wait_channel(content: bytes) -> str | None:
    """
    Return where a thread sleeps, from its ``wchan``.

    A compiler appends suffixes to the copies of a function that it makes, such as ``.constprop.0``; they are cut.

    Returns:
        A name from `SYNONYMS`, or that of the function; ``None``: the kernel shows none.
    """
    name = content.decode("ascii", "replace").strip().partition(".")[0]
    if not name or name == "0" or not name.isprintable():
        return None
    return SYNONYMS.get(name, name[:64])
