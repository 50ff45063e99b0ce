"""Ages of reports in the spool: what the clock moved between two uses, without its steps."""

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
"""Beyond this, some 30 million years, a clock counts as this. So every sum of clocks is a number that JSON has."""

USE_S = 60.0
"""A use so soon after the last one is not written down: each time costs two syncs of the disk."""


@dataclass(frozen=True, slots=True)
class Use:
    """One use of the spool."""

    before: float
    """Unix time, s, of the use before; of this one if there was none."""
    age_clock: float
    """Clock for ages, s: Unix time without the steps that were seen since the spool was made."""


class SpoolClock:
    """
    The clock of one spool, with a file that has its last use and the steps of the clock since the spool was made.

    Args:
        directory: of the spool.
        write: writes a file of this name and content, whole or not at all; raises `OSError`.
        now: Unix time, s.
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
        Note a use of the spool, and return what the clock did since the one before.

        What it moved back, or forward by more than the longest time, is a step of the clock, or a long time without a
        use; neither makes a report older.
        """
        now = min(max(-FAR_S, self.now()), FAR_S)
        known = self._read() or self._last_use
        last, steps = known or (now, 0.0)
        moved = now - last
        if not 0.0 <= moved <= self._longest_s:
            steps += moved
        if known is None or not 0.0 <= moved < USE_S:
            self._last_use = now, steps
            with suppress(OSError):  # then this object knows it, and the next one compares with an earlier use
                self._write(CLOCK, json.dumps({"used": now, "steps": steps}).encode())
        return Use(last, now - steps)

    def _read(self) -> tuple[float, float] | None:
        with suppress(OSError, ValueError, RecursionError, AttributeError):
            fd = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with os.fdopen(fd, "rb") as file:
                found = json.loads(file.read(4096))
            used, steps = found.get("used"), found.get("steps")
            if is_number(used) and is_number(steps):
                return float(used), float(steps)
        return None


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and abs(value) <= 2 * FAR_S
