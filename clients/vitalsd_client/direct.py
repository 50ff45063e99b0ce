"""Measure a process without a sidecar; imported on demand, because it loads the sources."""

import time
from types import TracebackType
from typing import Literal

from vitalsd.contract.encoding import encode
from vitalsd.contract.metrics import RuntimeMetrics, parse_runtime_metrics
from vitalsd.snapshot import Part, Snapshot, measure
from vitalsd.sources import open_source
from vitalsd.sources.base import SourceError

__all__ = ["DirectMeasurement", "DirectMeasurementError"]


class DirectMeasurementError(Exception):
    """Report that the process cannot be measured directly; ``str(error)`` is the reason."""


class DirectMeasurement:
    """
    Measure one process from now on: the window runs already while the client asks a sidecar.

    Args:
        detail: ``full`` also reads the counters of `FullMetrics`.
        pid: the process to measure; ``None``: this process.
        children: with ``full``, also read the descendants of the process.

    Raises:
        DirectMeasurementError: it cannot be read.
    """

    def __init__(self, detail: Literal["basic", "full"], pid: int | None = None, *, children: bool = False) -> None:
        self._detail = detail
        self._children = children
        self._parts = (Part.DETAIL if detail == "full" else Part.NONE) | (Part.CHILDREN if children else Part.NONE)
        try:
            self._source = open_source(pid)
        except SourceError as error:
            raise DirectMeasurementError(f"and it cannot be measured directly: {error}") from None
        try:
            self._first = self._snapshot()
        except SourceError as error:
            self._source.close()
            raise DirectMeasurementError(f"and it cannot be measured directly: {error}") from None

    def _snapshot(self) -> Snapshot:
        return self._source.snapshot(parts=self._parts)

    def measured(self, window_ms: int) -> RuntimeMetrics:
        """
        Sleep until `window_ms` have passed since the first snapshot, and return the metrics.

        Raises:
            DirectMeasurementError: the process cannot be read any more.
        """
        time.sleep(max(0, self._first.monotonic_ns + window_ms * 1_000_000 - time.monotonic_ns()) / 1e9)
        try:
            measurement = measure(self._first, self._snapshot())
            body = encode(
                measurement,
                self._source.identity(),
                requested_ms=window_ms,
                detail=self._detail,
                children=self._children,
            )
        except SourceError as error:
            raise DirectMeasurementError(f"and it cannot be measured directly: {error}") from None
        return parse_runtime_metrics(body)

    def __enter__(self) -> "DirectMeasurement":
        """Return itself: the source is open since construction."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the source."""
        self._source.close()
