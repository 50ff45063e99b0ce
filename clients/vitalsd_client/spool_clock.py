"""Compute the ages of reports in the spool from a clock without steps, such as corrections by months."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

__all__ = ["CLOCK", "SpoolClock", "Use", "is_number"]

CLOCK = "clock"
"""Name of the file with the last use of the spool and the steps of the clock."""

FAR_S = 1e15
"""Limit to which every reading of the clock is clamped, s, about 30 million years: its sums stay numbers of JSON."""

USE_S = 60.0
"""Shortest time between two writes of the last use, s: each write costs two syncs of the disk."""


@dataclass(frozen=True, slots=True)
class Use:
    """Hold the two times of one use of the spool."""

    before: float
    """Unix time of the previous use, s; of this one if there is none."""
    age_clock: float
    """Clock for ages, s: Unix time minus the steps that were seen since the spool was made."""


class SpoolClock:
    """
    Keep the last use of one spool, and the sum of the steps of the clock since it was made, in a file.

    Args:
        directory: directory of the spool.
        write: writes a file of this name and content atomically; raises `OSError`.
        now: returns Unix time, s.
        longest_s: the longest time between two uses that counts as age, s.
    """

    def __init__(
        self,
        directory: Path,
        write: Callable[[str, bytes], None],
        now: Callable[[], float],
        longest_s: float,
    ) -> None:
        self._path = directory / CLOCK
        self._write = write
        self.now = now
        self._longest_s = longest_s
        self._last_use: tuple[float, float] | None = None

    def use(self) -> Use:
        """
        Record a use of the spool, and return the times of this use.

        A move of the clock backwards, or forwards by more than the longest time, is a step of the clock or a long
        time without a use; neither makes a report older.
        """
        now = min(max(-FAR_S, self.now()), FAR_S)
        known = self._read() or self._last_use
        last, steps = known or (now, 0.0)
        moved = now - last
        if not 0.0 <= moved <= self._longest_s:
            steps += moved
        if known is None or not 0.0 <= moved < USE_S:
            self._last_use = now, steps
            with suppress(OSError):  # this object keeps it in memory; the next process compares with an earlier use
                self._write(CLOCK, json.dumps({"used": now, "steps": steps}).encode())
        return Use(last, now - steps)

    def _read(self) -> tuple[float, float] | None:
        """Return the last use and the sum of the steps, s; ``None``: there is no file, or it is damaged."""
        with suppress(OSError, ValueError, RecursionError, AttributeError):
            fd = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with os.fdopen(fd, "rb") as file:
                found = json.loads(file.read(4096))
            used, steps = found.get("used"), found.get("steps")
            if is_number(used) and is_number(steps):
                return float(used), float(steps)
        return None


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value of parsed JSON is a number that a clock of the spool can have."""
    return isinstance(value, (int, float)) and abs(value) <= 2 * FAR_S
