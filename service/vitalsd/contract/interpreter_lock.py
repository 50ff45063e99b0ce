"""Release the interpreter lock in long computations, so that threads of the host program need not wait for it."""

import time

__all__ = ["LockRelease"]

HELD_NS = 1_000_000


class LockRelease:
    """
    Release the interpreter lock about once in a millisecond of work.

    A thread that waits for the lock forces a release only after sys.getswitchinterval() seconds, 5 ms by default, and
    not at all while a function in C runs.
    """

    def __init__(self) -> None:
        self._since_ns = time.monotonic_ns()

    def __call__(self) -> None:
        """Release the lock if the last release was more than a millisecond ago; to be called between pieces of work."""
        if time.monotonic_ns() - self._since_ns > HELD_NS:
            time.sleep(0)  # On Linux some 50 µs, in which a thread that waits for the lock takes it.
            self._since_ns = time.monotonic_ns()
