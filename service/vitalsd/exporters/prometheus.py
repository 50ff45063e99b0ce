"""
Encode counters as Prometheus text or OpenMetrics, for scrapers of ``GET /metrics``.

All are cumulative counters and gauges of one instant. A scraper computes rates over its own interval, so the sidecar
does not wait for a window.
"""

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from vitalsd import __version__
from vitalsd.exporters.counters import (
    MACHINE_COUNTERS,
    NO_SIGNALS,
    OWN_COUNTERS,
    SIGNAL_COUNTERS,
    TARGET_COUNTERS,
    TARGET_UP,
    THREAD_COUNTERS,
    THREADS_LEFT_OUT,
    Counter,
    OwnReading,
    SignalsReading,
    TargetReading,
    busiest_threads,
)
from vitalsd.snapshot import Identity, Snapshot
from vitalsd.text import printable

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

ReadingT = TypeVar("ReadingT")

__all__ = ["THREAD_METRICS", "Form", "Scrape", "content_type_of", "expose"]

Form = Literal["text/plain;version=0.0.4", "text/plain;version=1.0.0", "application/openmetrics-text"]
"""Media types that `prometheus_client.exposition.choose_encoder` accepts."""

THREAD_METRICS = 256
"""Threads with a series of their own: thousands of series of one target would overload the scraper's database."""


class Scrape(NamedTuple):
    """
    The content of one scrape.

    Args:
        target: identity and counters; ``None`` if the target cannot be read, which ``vitalsd_target_up`` reports.
        threads: maximum number of threads with a series of their own, those with the most CPU time; 0: none.
        snapshots_taken: number of snapshots of this target by this sidecar.
        recorder: its state, as in ``/info``; ``None``: there is no recorder.
        private: also export heartbeats, gauges, and counters that the kernel shows only to the user of the target.
        signals: heartbeats and gauges.
    """

    target: tuple[Identity, Snapshot] | None
    threads: int
    snapshots_taken: int
    recorder: Mapping[str, Any] | None
    private: bool = True
    signals: SignalsReading = NO_SIGNALS

    def collect(self) -> "Iterator[Metric]":
        """Yield the metric families; the encoders of prometheus-client call this."""
        target = None if self.target is None else TargetReading(*self.target)
        yield from _families((TARGET_UP,), target)
        if target is not None:
            identity = target.identity
            rows = TARGET_COUNTERS + MACHINE_COUNTERS
            yield from _families((row for row in rows if self.private or not row.is_private), target)
            yield _info("vitalsd_target", "The target.", {"pid": str(identity.pid), "name": printable(identity.name)})
            yield from self._threads(target.snapshot)
            yield from self._signals()
        yield _info("vitalsd_build", "This service.", {"version": __version__, "python": platform.python_version()})
        yield from _families(OWN_COUNTERS, OwnReading(self.snapshots_taken, self.recorder))

    def _signals(self) -> "Iterator[Metric]":
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for row in SIGNAL_COUNTERS:
            points = row.points(self.signals) if self.private else ()
            if points:
                kind = CounterMetricFamily if row.kind == "counter" else GaugeMetricFamily
                family = kind(row.prometheus, row.help, labels=row.labels)
                for labels, value in points:
                    family.add_metric([labels[name] for name in row.labels], value)
                yield family

    def _threads(self, snapshot: Snapshot) -> "Iterator[Metric]":
        if not self.threads:
            return
        from prometheus_client.core import CounterMetricFamily

        roster, shown = snapshot.roster, busiest_threads(snapshot, self.threads)
        for row in THREAD_COUNTERS:
            if (values := row.values(snapshot)) is None:
                continue
            family = CounterMetricFamily(row.prometheus, row.help.format(limit=self.threads), labels=("tid", "thread"))
            for i in shown:
                family.add_metric((str(roster.tids[i]), printable(roster.names[i])), values[i])
            yield family
        yield from _families((THREADS_LEFT_OUT,), len(roster) - len(shown))


def expose(scrape: Scrape, form: Form) -> tuple[bytes, str]:
    """Return the text of a scrape and its content type."""
    encode, content_type = _encoder(form)
    return encode(scrape), content_type


def content_type_of(form: Form) -> str:
    """Return the content type that `expose` gives to `form`."""
    return _encoder(form)[1]


def _encoder(form: Form) -> tuple[Callable[[Any], bytes], str]:
    """Return encoder and content type of `form`; load prometheus-client, which is not needed before a scrape."""
    from prometheus_client.exposition import choose_encoder

    return choose_encoder("application/openmetrics-text;version=1.0.0" if "open" in form else form)


def _families(rows: Iterable[Counter[ReadingT]], reading: ReadingT) -> "Iterator[Metric]":
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    for row in rows:
        value = row.value(reading)
        if not row.prometheus or value is None:
            continue
        if row.kind == "counter":
            yield CounterMetricFamily(row.prometheus, row.help, value=value)
        else:
            yield GaugeMetricFamily(row.prometheus, row.help, value=float(value))


def _info(name: str, text: str, labels: dict[str, str]) -> "Metric":
    from prometheus_client.core import InfoMetricFamily

    return InfoMetricFamily(name, text, value=labels)
