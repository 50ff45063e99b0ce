"""How far apart the rounds of one run are."""

import statistics
from collections.abc import Sequence

__all__ = ["spread"]


def spread(values: Sequence[float], digits: int | None = None) -> float | None:
    """
    From the first quartile to the third, rounded: the middle half of the rounds lies within it.

    In the unit of `values`; ``None`` of a single round, which has none.
    """
    if len(values) < 2:
        return None
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return round(third - first, digits)
