"""Describe one line of a doctor's report."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["BUG", "Finding", "Verdict", "between", "make_finding", "not_here"]

BUG = "report it with the output of `vitalsd doctor --json`"
"""The next step after a failure that the user cannot mend."""

Verdict = Literal["pass", "fail", "not here"]


@dataclass(frozen=True, slots=True)
class Finding:
    """Hold what was checked, what was expected, and what was measured."""

    check: str
    """Id of the check for programs, the same in every run and version: ``cpu.own.30``."""
    what: str
    expected: str
    measured: str
    verdict: Verdict
    next_step: str | None = None
    """What the user should do; only after a failure."""


def make_finding(check: str, what: str, expected: str, measured: str, good: bool, next_step: str) -> Finding:
    """Return a finding that passes if `good`, and otherwise fails, with `next_step`."""
    return Finding(check, what, expected, measured, "pass" if good else "fail", None if good else next_step)


def not_here(check: str, what: str, why: str) -> Finding:
    """Return a finding about what this platform or machine does not have."""
    return Finding(check, what, "-", why, "not here")


def between(low: float, high: float, unit: str, digits: int = 1) -> str:
    """Return a range in words."""
    return f"{low:.{digits}f} to {high:.{digits}f} {unit}"
