"""One line of a doctor's report."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["BUG", "Finding", "Verdict", "between", "judged", "not_here"]

BUG = "report it with the output of `vitalsd doctor --json`"
"""The next step where nothing that the user can do is known."""

Verdict = Literal["pass", "fail", "not here"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What was looked at, what it should be, what it is."""

    check: str
    """The same in every run and version, for programs: ``cpu.own.30``."""
    what: str
    expected: str
    measured: str
    verdict: Verdict
    next_step: str | None = None
    """Of a failure alone: what to do about it."""


def judged(check: str, what: str, expected: str, measured: str, good: bool, next_step: str) -> Finding:
    """A line that passes or fails; `next_step` is for the latter."""
    return Finding(check, what, expected, measured, "pass" if good else "fail", None if good else next_step)


def not_here(check: str, what: str, why: str) -> Finding:
    """A line about what this platform or machine does not have."""
    return Finding(check, what, "-", why, "not here")


def between(low: float, high: float, unit: str, digits: int = 1) -> str:
    """A range in words."""
    return f"{low:.{digits}f} to {high:.{digits}f} {unit}"
