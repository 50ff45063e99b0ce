"""Bound how long something takes, on a machine that has other work to do."""

import time

__all__ = ["Stopwatch"]

SPIN_S = 0.02
"""CPU time of a thread that measures how slow the machine is: several slices of Linux's scheduler."""
WORST = 5.0
"""The machine is never taken for slower than this: what hangs still fails."""


class Stopwatch:
    """
    The time since it was made, and what it may be.

    A bound on time holds where a thread that is ready to run gets a CPU. Tests run beside others, so the bound is
    multiplied by what a thread that only computes needs at that time: its time on the clock over its CPU time.
    """

    def __init__(self) -> None:
        self._slowness = _slowness()
        self._begun = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._begun

    def allowed_s(self, bound_s: float) -> float:
        """Return `bound_s`, longer by as much as the machine was busy when this was made or is now."""
        return bound_s * min(WORST, max(self._slowness, _slowness()))


def _slowness() -> float:
    """Return 1 on an idle machine, 2 where a thread gets half a CPU."""
    begun, used = time.monotonic(), time.thread_time()
    while time.thread_time() - used < SPIN_S:
        pass
    return (time.monotonic() - begun) / (time.thread_time() - used)
