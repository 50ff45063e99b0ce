"""How far apart the rounds of one run are."""

import statistics
from collections.abc import Sequence

__all__ = ["spread"]


def spread(values: Sequence[float]) -> float:
    """From the first quartile to the third: the middle half of the rounds lies within it. In the unit of `values`."""
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return third - first
