"""Limit the time of an operation, on a machine that is busy with other work."""

import time

__all__ = ["Stopwatch"]

SPIN_S = 0.02
"""CPU time of the thread that measures the slowness of the machine, s: several time slices of Linux."""
WORST = 5.0
"""Largest factor of slowness, so that a hang still fails."""


class Stopwatch:
    """
    Measure the time since the construction, and return the allowed time.

    A time limit holds only if a thread that is ready to run gets a CPU. Tests run in parallel, so the limit is
    multiplied by the slowness of a thread that only computes: its elapsed time divided by its CPU time.
    """

    def __init__(self) -> None:
        self._slowness = _slowness()
        self._begun = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """Return the time since the construction, s."""
        return time.monotonic() - self._begun

    def allowed_s(self, bound_s: float) -> float:
        """Return `bound_s` times the slowness of the machine, at the construction or now, s."""
        return bound_s * min(WORST, max(self._slowness, _slowness()))


def _slowness() -> float:
    """Return the slowness: 1 on an idle machine, 2 if a thread gets half a CPU."""
    begun, used = time.monotonic(), time.thread_time()
    while time.thread_time() - used < SPIN_S:
        pass
    return (time.monotonic() - begun) / (time.thread_time() - used)
