"""Filter and sort the threads that either macOS source has read, and decode their names."""

import time
from collections.abc import Sequence
from typing import NamedTuple

from vitalsd.snapshot import ThreadRoster
from vitalsd.sources.base import ThreadLook
from vitalsd.sources.darwin.apple_headers import (
    TH_STATE_HALTED,
    TH_STATE_RUNNING,
    TH_STATE_STOPPED,
    TH_STATE_UNINTERRUPTIBLE,
    TH_STATE_WAITING,
)
from vitalsd.sources.darwin.thread_rows import ThreadRows
from vitalsd.sources.names import decode_name

__all__ = [
    "ATTEMPTS",
    "QUANTUM_NS",
    "REALTIME_QUANTUM_NS",
    "RUN_STATES",
    "THREAD_GRAIN_NS",
    "Living",
    "RosterReader",
    "living_threads",
    "thread_look",
]

THREAD_GRAIN_NS = 2_000
"""Step of a thread's CPU time, ns: user and system time are each rounded down to a microsecond."""

QUANTUM_NS = 10_000_000
"""
Quantum of the scheduler, ns (osfmk/kern/sched_prim.c): the time of a thread that runs on another CPU is added after a
quantum at the latest.
"""

REALTIME_QUANTUM_NS = 50_000_000
"""Longest quantum of a real-time thread, ns; it is the thread's ``computation`` (max_rt_quantum, the same file)."""

BASEPRI_RTQUEUES = 97
"""From this priority on a thread is real-time (osfmk/kern/sched.h)."""

ATTEMPTS = 3
"""Attempts to list the threads until one of them is alive, because an exec replaces all of them."""

RUN_STATES = {
    TH_STATE_RUNNING: "running",
    TH_STATE_STOPPED: "stopped",
    TH_STATE_WAITING: "waiting",
    TH_STATE_UNINTERRUPTIBLE: "uninterruptible",
    TH_STATE_HALTED: "halted",
}


class Living(NamedTuple):
    """The threads alive, by ascending id; times in ns."""

    tids: Sequence[int]
    user_ns: Sequence[int]
    system_ns: Sequence[int]
    names: Sequence[tuple[bytes]]
    run_states: Sequence[int]
    priorities: Sequence[int]

    @property
    def lag_ns(self) -> int:
        """Most by which the CPU time of a running thread may be behind, ns."""
        return REALTIME_QUANTUM_NS if max(self.priorities) >= BASEPRI_RTQUEUES else QUANTUM_NS

    @property
    def running(self) -> int:
        """Number of threads that run, or are runnable and wait for a CPU."""
        return self.run_states.count(TH_STATE_RUNNING)

    @property
    def main_state(self) -> str | None:
        """Name of the state of the oldest thread."""
        return RUN_STATES.get(self.run_states[0])


def living_threads(thread_ids: Sequence[int], rows: ThreadRows) -> Living:
    """
    Return the figures of the threads that are alive, by ascending id.

    Args:
        thread_ids: ids in the order of `rows`; 0 for a thread that could not be read any more.
        rows: as the kernel filled them.
    """
    number = len(thread_ids)
    run_states = rows.run_states(number)
    living = Living(
        thread_ids,
        rows.user_ns(number),
        rows.system_ns(number),
        rows.names(number),
        run_states,
        rows.priorities(number),
    )
    order: Sequence[int] = range(number)
    if 0 in thread_ids or TH_STATE_HALTED in run_states:
        order = [i for i in order if thread_ids[i] and run_states[i] != TH_STATE_HALTED]
    elif sorted(thread_ids) == thread_ids:
        return living
    order = sorted(order, key=thread_ids.__getitem__)
    return Living(
        [living.tids[i] for i in order],
        [living.user_ns[i] for i in order],
        [living.system_ns[i] for i in order],
        [living.names[i] for i in order],
        [living.run_states[i] for i in order],
        [living.priorities[i] for i in order],
    )


def thread_look(living: Living, tid: int | None = None) -> ThreadLook | None:
    """
    Return the look at one thread; macOS has no wait for a CPU, no time slices and no wait channel of a thread.

    Args:
        living: the threads alive.
        tid: which of them; ``None``: the only one.

    Returns:
        ``None`` if it is not there.
    """
    if not living.tids or (tid is not None and tid not in living.tids):
        return None
    i = 0 if tid is None else living.tids.index(tid)
    cpu_ns = living.user_ns[i] + living.system_ns[i]
    return ThreadLook(time.monotonic_ns(), cpu_ns, state=RUN_STATES.get(living.run_states[i]))


class RosterReader:
    """Make the rosters of successive snapshots. All births are 0, because ids of threads are unique since boot."""

    def __init__(self) -> None:
        self._raw: Sequence[tuple[bytes]] = ()
        self._decoded: dict[bytes, str] = {}
        self._roster = ThreadRoster()

    def read(self, tids: Sequence[int], raw_names: Sequence[tuple[bytes]]) -> ThreadRoster:
        """
        Return the roster of the threads with these ids, ascending; the same object while nothing changes.

        Args:
            tids: ascending.
            raw_names: the 64 bytes of ``pth_name`` of each thread, in a tuple of one element.
        """
        names = self._roster.names
        if raw_names != self._raw:
            self._raw = raw_names
            known = self._decoded
            self._decoded = {
                raw: known.get(raw) or decode_name(raw.partition(b"\0")[0]) for (raw,) in dict.fromkeys(raw_names)
            }
            names = tuple(self._decoded[raw] for (raw,) in raw_names)
        self._roster = ThreadRoster(tuple(tids), (0,) * len(tids), names).sharing(self._roster)
        return self._roster
