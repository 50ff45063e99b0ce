"""Take snapshots as fast as possible while threads are born and end, and check that nothing grows."""

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import NamedTuple

from vitalsd.doctor.cpu_load import BurnerProcess
from vitalsd.doctor.finding import BUG, Finding, judged, not_here
from vitalsd.doctor.process_checks import held
from vitalsd.snapshot import Part
from vitalsd.sources.platform import Platform

__all__ = ["Slope", "slope", "soak"]

BATCH = 50
"""Snapshots between two counts."""
CHURNED = 4
"""Short-lived threads that run at once. A count may differ by so many although nothing leaks."""
SEGMENTS = 20
"""Parts of the soak, after the warm-up, that give one point each for the slope."""
STUDENT = 2.101
"""Standard errors on each side of a slope that hold 95 %: Student's t for 18 degrees of freedom, 20 points."""
WARM_UP = 0.2
"""Part of the soak after which caches and the arenas of the allocator have reached their full size."""
RSS_BYTES = 1 << 20
"""Growth of resident memory over the soak that is allowed in any case, bytes: allocators fragment."""
RSS_BYTES_PER_SNAPSHOT = 1
"""More growth that is allowed, bytes per snapshot: the smallest object, of 16 bytes, lost in every 16th."""


class Slope(NamedTuple):
    """Hold how fast a quantity grows, per unit of x."""

    per_unit: float
    margin: float
    """Half of the 95 % interval of `per_unit`."""


def slope(points: Sequence[tuple[float, float]]) -> Slope:
    """
    Return the slope of the line of least squares through `SEGMENTS` points.

    Raises:
        ValueError: there are more or fewer.
    """
    if len(points) != SEGMENTS:
        raise ValueError(f"a slope needs {SEGMENTS} points, not {len(points)}")
    mean_x = sum(x for x, _ in points) / SEGMENTS
    mean_y = sum(y for _, y in points) / SEGMENTS
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    rise = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    rest = sum((y - mean_y - rise * (x - mean_x)) ** 2 for x, y in points)
    return Slope(rise, STUDENT * math.sqrt(rest / (SEGMENTS - 2) / spread))


def soak(platform: Platform, seconds: float, progress: Callable[[float], None]) -> Iterator[Finding]:
    """
    Check what this process holds while it reads itself and another process for `seconds`.

    Args:
        platform: opens the processes.
        seconds: duration, s.
        progress: called with the part that is done, from 0 to 1.
    """
    # The lowest count of each segment: a leak raises it, and what comes and goes, as threads do, does not. It also
    # bounds the memory of the soak itself.
    floors: dict[str, dict[int, tuple[float, float]]] = {}
    taken = segment = 0
    begun = time.monotonic()
    with (
        BurnerProcess((5,)) as other,
        closing(platform.open_source(None)) as own,
        closing(platform.open_source(other.pid)) as foreign,
        _churn() as born,
    ):
        while segment < SEGMENTS:
            done = (time.monotonic() - begun) / seconds
            progress(min(1.0, done))
            for i in range(BATCH):
                parts = Part.DETAIL | Part.CHILDREN if i % 10 in (0, 5) else Part.NONE
                (own, foreign)[i % 2].snapshot(parts=parts)
            taken += BATCH
            if done < WARM_UP:
                continue
            now = {**held(platform), "rss": own.snapshot().rss_bytes}
            for kind, value in now.items():
                floor = floors.setdefault(kind, {})
                if segment not in floor or value < floor[segment][1]:
                    floor[segment] = taken, value
            # At most one segment further, however late it is: no segment stays empty.
            segment += done >= WARM_UP + (1 - WARM_UP) * (segment + 1) / SEGMENTS
    for kind in ("descriptors", "threads", "ports", "references", "rss"):
        check, what = f"soak.{kind}", f"{'resident memory' if kind == 'rss' else kind} over {taken} snapshots"
        if kind not in floors:
            yield not_here(check, what, "of macOS alone")
            continue
        yield _judged(check, what, kind, list(floors[kind].values()), born[0])


def _judged(check: str, what: str, kind: str, points: Sequence[tuple[float, float]], born: int) -> Finding:
    found = slope(points)
    span = points[-1][0] - points[0][0]
    scale, unit = (1 / 1024, " KiB") if kind == "rss" else (1.0, "")
    allowed = RSS_BYTES + RSS_BYTES_PER_SNAPSHOT * span if kind == "rss" else CHURNED
    return judged(
        check,
        what,
        f"no certain growth over {allowed * scale:.0f}{unit}" if kind == "rss" else "no growth",
        f"{found.per_unit * 1000 * scale:+.2f} ± {found.margin * 1000 * scale:.2f}{unit} per 1000,"
        f" {points[0][1] * scale:.0f} -> {points[-1][1] * scale:.0f}{unit}, {born} threads came and went",
        (found.per_unit - found.margin) * span <= allowed,
        f"each snapshot leaves something behind; {BUG}",
    )


@contextmanager
def _churn() -> Iterator[list[int]]:
    """Start and end threads all the time; yield a list with their number so far."""
    over = threading.Event()
    born = [0]

    def run() -> None:
        while not over.is_set():
            threads = [threading.Thread(target=time.sleep, args=(0.0005 * i,), daemon=True) for i in range(CHURNED)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            born[0] += len(threads)

    churner = threading.Thread(target=run, daemon=True)
    churner.start()
    try:
        yield born
    finally:
        over.set()
        churner.join()
