"""Compute the spread of the rounds of one run."""

import statistics
from collections.abc import Sequence

__all__ = ["spread"]


def spread(values: Sequence[float], digits: int | None = None) -> float | None:
    """
    Return the interquartile range, rounded: the middle half of the rounds lies within it.

    It has the unit of `values`; a single round has none (``None``).
    """
    if len(values) < 2:
        return None
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return round(third - first, digits)
