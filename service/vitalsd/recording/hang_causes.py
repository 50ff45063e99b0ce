"""
Find out why a thread is silent, from looks at it.

The shares of the time in which it ran, waited for a CPU and slept decide, and not the state at the looks: looks and
wake-ups happen together, so a thread that sleeps most of the time may be seen running. The state decides only for a
stopped thread, and for one that was runnable and never ran: the kernel adds a wait for a CPU when the wait is over.

A thread that waits for the interpreter lock of Python wakes up after each switch interval, 5 ms, so it gets a CPU 160
to 200 times a second and runs nearly nothing. From outside a lock and a condition variable are one thing, a futex.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from vitalsd.sources.base import ThreadLook

__all__ = ["IDLE", "Cause", "Evidence", "HangCause", "TimeShares", "awaits_interpreter_lock"]

HangCause = Literal["busy", "starved", "blocked", "paging", "stopped", "interpreter_lock", "idle", "unknown"]

IDLE = ("poll", "epoll", "select")
"""Calls in which an event loop waits for events."""
HALF = 0.5
"""Share of the time from which on one explanation is enough."""
LOCK_WAKES = 100
"""Least number of wake-ups in a second asleep of a thread that waits for the interpreter lock."""
MOST_LOCK_WAKES = 250
"""Most of them, seen from outside, where the switch interval of the target is not known to be 5 ms."""
LOCK_RUN = 0.2
"""Most CPU time of a thread that waits for the interpreter lock, as a share."""
LOCK_SLEEP = 0.25
"""Least time asleep of a thread that waits for the interpreter lock, as a share; on a busy machine the rest is wait."""
FAULTS = 20
"""Least number of major faults a second of a thread that pages."""
PAGING_RUN = 0.9
"""CPU time from which on a thread does not page, as a share."""
PAGING_STATES = 0.3
"""Least share of the looks that find a paging thread in a fault: uninterruptible, half of them runnable."""
STILL_RUN = 0.02
"""Most CPU time between two looks of a thread that starves throughout, as a share."""
MARGIN = 1.5
"""By how much the larger of two explanations must exceed the smaller one; otherwise both fit."""


class Cause(NamedTuple):
    """Why a thread is silent."""

    cause: HangCause
    detail: str


@dataclass(slots=True)
class TimeShares:
    """What a thread did in some time, ns."""

    elapsed_ns: int = 0
    run_ns: int = 0
    wait_ns: int = 0
    still_ns: int = 0
    """Time between two looks at which it was runnable, and in which it did not run."""
    slices: int = 0

    def add(self, before: ThreadLook, now: ThreadLook, most_ns: int) -> None:
        """
        Add the time between two looks.

        Args:
            before: the earlier look.
            now: the later look.
            most_ns: limit of the time in which the thread slept. In more than that the machine or the sidecar may have
                stood still.
        """
        run_ns = max(0, now.cpu_ns - before.cpu_ns)
        elapsed_ns = now.monotonic_ns - before.monotonic_ns
        wait_ns = 0
        if now.wait_ns is not None and before.wait_ns is not None:
            wait_ns = max(0, min(now.wait_ns - before.wait_ns, elapsed_ns - run_ns))
        elapsed_ns = max(min(elapsed_ns, most_ns), run_ns + wait_ns, 1)
        self.elapsed_ns += elapsed_ns
        self.run_ns += run_ns
        self.wait_ns += wait_ns
        if now.slices is not None and before.slices is not None:
            self.slices += max(0, now.slices - before.slices)
        is_runnable = now.state == "running" and before.state in ("running", None)
        if is_runnable and run_ns < STILL_RUN * elapsed_ns and wait_ns < STILL_RUN * elapsed_ns:
            self.still_ns += elapsed_ns

    @property
    def asleep_ns(self) -> int:
        """Time in which it neither ran nor waited for a CPU, ns."""
        return max(0, self.elapsed_ns - self.run_ns - self.wait_ns)

    def of(self, part_ns: int) -> float:
        """Return a time as a share of the elapsed one, from 0 to 1."""
        return min(1.0, part_ns / self.elapsed_ns) if self.elapsed_ns else 0.0

    @property
    def polls_lock(self) -> bool:
        """Whether it slept, and woke up as often as a thread that waits for the interpreter lock, or more often."""
        return (
            self.slices * 1_000_000_000 >= LOCK_WAKES * self.asleep_ns
            and self.of(self.asleep_ns) >= LOCK_SLEEP
            and self.of(self.run_ns) <= LOCK_RUN
        )

    @property
    def wakes_per_s(self) -> float:
        """Number of wake-ups in a second asleep."""
        return self.slices * 1e9 / max(1, self.asleep_ns)


def awaits_interpreter_lock(before: ThreadLook, now: ThreadLook) -> bool:
    """Return whether a Python thread did nothing but wait for the interpreter lock between two looks."""
    shares = TimeShares()
    shares.add(before, now, now.monotonic_ns - before.monotonic_ns)
    return shares.polls_lock


@dataclass(slots=True)
class Evidence:
    """The looks at one silent thread; `before` is the last look before them, if there was one."""

    before: ThreadLook | None = None
    shares: TimeShares = field(default_factory=TimeShares)
    stalled: TimeShares = field(default_factory=TimeShares)
    """The same for the time between looks that were too far apart."""
    is_locked: bool = False
    """Whether the sidecar, in the same process, waited for the interpreter lock in that time."""
    states: Counter[str | None] = field(default_factory=Counter)
    channels: Counter[str | None] = field(default_factory=Counter)
    """Wait channels of the looks that found it asleep."""
    _span_ns: int = 0
    """Time from the first look to the last one, ns."""
    _faults: int | None = None
    _fault_count: int = 0
    _fault_ns: int = 0
    """Time in which the major faults were counted, ns."""

    def add(self, look: ThreadLook, most_ns: int, *, is_locked: bool = False) -> None:
        """
        Add a look.

        Args:
            look: the look; without a state it only counts time.
            most_ns: see `TimeShares.add`.
            is_locked: whether the sidecar waited for the interpreter lock of this process since the look before.
        """
        before = self.before
        self.is_locked |= is_locked
        if before is not None:
            self.shares.add(before, look, most_ns)
            elapsed_ns = look.monotonic_ns - before.monotonic_ns
            self._span_ns += elapsed_ns
            if elapsed_ns > most_ns:
                self.stalled.add(before, look, elapsed_ns)
        if look.state is not None and not is_locked:
            self.states[look.state] += 1
            if look.state not in ("running", "stopped", "traced"):
                self.channels[look.wait_channel] += 1
        if look.major_faults is not None:
            if self._faults is not None and before is not None:
                self._fault_count += max(0, look.major_faults - self._faults)
                self._fault_ns += look.monotonic_ns - before.monotonic_ns
            self._faults = look.major_faults
        self.before = look

    def cause(self, usual: str | None = None, *, is_python: bool | None = None) -> Cause:
        """
        Return the cause that the looks show.

        Args:
            usual: wait channel in which the thread sleeps between two beats; ``None``: unknown.
            is_python: whether the thread is one of Python; ``None``: unknown.
        """
        if self.is_locked and self.stalled.elapsed_ns > HALF * self._span_ns:
            return self._under_lock()
        return (
            self._halted()
            or self._paging()
            or self._interpreter_lock(is_python)
            or _on_cpu(self.shares)
            or self._asleep(usual)
        )

    def _under_lock(self) -> Cause:
        """Tell a thread that waited for the interpreter lock from the one that held it."""
        held = self.stalled
        if held.polls_lock:
            return Cause("interpreter_lock", "another thread held it")
        on_cpu = _on_cpu(held)
        if on_cpu is not None:
            return Cause(on_cpu.cause, f"{on_cpu.detail}, while it kept the interpreter lock")
        return Cause("blocked", "slept while no other Python thread could run: it may have kept the interpreter lock")

    def _share(self, *states: str) -> float:
        """Return the share of the looks that found the thread in one of these states."""
        return sum(self.states[state] for state in states) / max(1, self.states.total())

    def _halted(self) -> Cause | None:
        if self._share("stopped") > HALF:
            return Cause("stopped", "by a signal, such as SIGSTOP")
        # A tracer such as strace stops a thread for a moment at each system call, and lets it run.
        if self._share("traced") > HALF and self.shares.of(self.shares.run_ns) < STILL_RUN:
            return Cause("stopped", "by a debugger")
        if self.channels["frozen"] > HALF * self.states.total():
            return Cause("stopped", "by a control group freezer")
        return None

    def _paging(self) -> Cause | None:
        if self._fault_ns == 0 or self.shares.of(self.shares.run_ns) >= PAGING_RUN:
            return None
        per_s = self._fault_count * 1e9 / self._fault_ns
        if per_s >= FAULTS and self._share("uninterruptible") + self._share("running") / 2 >= PAGING_STATES:
            return Cause("paging", f"{per_s:.0f} major page faults a second")
        return None

    def _interpreter_lock(self, is_python: bool | None) -> Cause | None:
        channel, wakes = self._channel(), self.shares.wakes_per_s
        if is_python is False or not self.shares.polls_lock or channel not in ("futex", None):
            return None
        if not is_python and wakes > MOST_LOCK_WAKES:
            return None
        if channel is None:  # on a busy machine each wake-up waits for a CPU, so that no look finds it asleep
            return Cause("unknown", f"woke up {wakes:.0f} times a second, and no look found it asleep")
        return Cause("interpreter_lock", f"woke up {wakes:.0f} times a second in futex")

    def _channel(self) -> str | None:
        """Return the most common wait channel; ``None``: no look has found one."""
        known = [(count, name) for name, count in self.channels.items() if name is not None]
        return max(known)[1] if known else None

    def _asleep(self, usual: str | None) -> Cause:
        """Return the cause of a thread that mostly slept."""
        channel = self._channel()
        looks = self.channels.total()
        if channel is None:
            if looks and self.before is not None and self.before.slices is None:
                return Cause("blocked", "asleep; this platform does not say where")
            return Cause("unknown", "the kernel does not show where it sleeps" if looks else self._unseen())
        idle = sum(self.channels[name] for name in IDLE)
        if max(idle, looks - idle) < MARGIN * min(idle, looks - idle):
            return Cause("unknown", "sleeps in an event loop, and as often elsewhere")
        if idle > looks - idle:
            return Cause("idle", max(IDLE, key=self.channels.__getitem__))
        if channel == usual == "futex":
            return Cause("unknown", "waits in futex, where it usually waits")
        return Cause("blocked", channel)

    def _unseen(self) -> str:
        return (
            "no look found it asleep" if self.states.total() else "the silence was too short for a look at its thread"
        )


def _on_cpu(shares: TimeShares) -> Cause | None:
    """Return the cause of a thread that mostly ran or waited for a CPU."""
    run = shares.of(shares.run_ns)
    wait = max(shares.of(shares.wait_ns), shares.of(shares.still_ns))
    if run + wait < HALF:
        return None
    detail = f"ran {run:.0%}, waited for a CPU {wait:.0%}"
    if run >= HALF:
        return Cause("busy", detail)
    if wait >= HALF:
        return Cause("starved", detail)
    if max(run, wait) < MARGIN * min(run, wait):
        return Cause("unknown", detail)
    return Cause("busy" if run > wait else "starved", detail)
