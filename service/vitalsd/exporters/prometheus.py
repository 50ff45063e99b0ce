"""
``GET /metrics`` for scrapers: which form an ``Accept`` asks for, and counters as Prometheus text or OpenMetrics.

Cumulative counters and gauges of one instant: a scraper brings its own windows, so nothing is waited for.
"""

import platform
import re
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from vitalsd import __version__
from vitalsd.exporters.counters import (
    OWN_COUNTERS,
    TARGET_COUNTERS,
    TARGET_UP,
    THREAD_COUNTERS,
    THREADS_LEFT_OUT,
    Counter,
    OwnReading,
    TargetReading,
    busiest_threads,
)
from vitalsd.snapshot import Identity, Snapshot
from vitalsd.text import printable

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

ReadingT = TypeVar("ReadingT")

__all__ = ["OFFERED", "THREAD_METRICS", "Form", "Scrape", "content_type_of", "expose", "negotiate"]

Form = Literal["json", "text/plain;version=0.0.4", "text/plain;version=1.0.0", "application/openmetrics-text"]

THREAD_METRICS = 256
"""Threads with a series of their own. A target with thousands would drown the database that scrapes it."""

OFFERED: tuple[tuple[Form, str, str, frozenset[str]], ...] = (
    ("json", "application", "json", frozenset()),
    ("application/openmetrics-text", "application", "openmetrics-text", frozenset(("1.0.0",))),
    ("text/plain;version=1.0.0", "text", "plain", frozenset(("1.0.0",))),
    ("text/plain;version=0.0.4", "text", "plain", frozenset(("0.0.4",))),
)
"""Form, type, subtype and the values of ``version`` that mean it; the first one wins where all are welcome alike."""

TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
RANGE = re.compile(rf"\s*({TOKEN})/({TOKEN})\s*((?:;[^;]*)*)", re.ASCII)
QUALITY = re.compile(r"0?\.[0-9]+|0\.?|1(?:\.0*)?", re.ASCII)
"""More than RFC 9110 allows: the HTTP client of Java 8 says ``q=.2``."""


def negotiate(accept: str) -> Form | None:
    """
    The form that an ``Accept`` header likes best (RFC 9110 §12.5.1); ``None`` if it takes none of ours.

    Without a header, for ``*/*``, and for a browser's list it is JSON. ``text/plain`` without a version
    is the oldest Prometheus text.
    """
    if not accept.strip():
        return "json"
    ranges = [parsed for part in accept.split(",")[:64] if (parsed := _range(part)) is not None]
    welcome: dict[Form, float] = {}
    for offered, kind, subtype, versions in OFFERED:
        means = [(_specificity(asked, kind, subtype, versions), quality) for asked, quality in ranges]
        welcome[offered] = max((each for each in means if each[0] >= 0), default=(0, 0.0))[1]
    form = max(welcome, key=welcome.__getitem__)
    return form if welcome[form] > 0 else None


def _range(part: str) -> tuple[tuple[str, str, str], float] | None:
    """Type, subtype and version of one media range, and its quality, 1 if that is none; ``None`` if it is not one."""
    found = RANGE.fullmatch(part)
    if found is None:
        return None
    parameters: dict[str, str] = {}
    for parameter in found[3].split(";"):
        name, _, value = parameter.partition("=")
        parameters[name.strip().lower()] = value.strip().strip('"')
    given = parameters.get("q", "1")
    quality = float(given) if QUALITY.fullmatch(given) else 1.0
    return (found[1].lower(), found[2].lower(), parameters.get("version", "")), quality


def _specificity(asked: tuple[str, str, str], kind: str, subtype: str, versions: frozenset[str]) -> int:
    """How exactly a range means a form: 3 with its version, 2, 1 ``type/*``, 0 ``*/*``; -1 if it does not."""
    asked_kind, asked_subtype, asked_version = asked
    if (asked_kind, asked_subtype) == ("*", "*"):
        return 0
    if asked_kind != kind:
        return -1
    if asked_subtype == "*":
        return 1
    if asked_subtype != subtype:
        return -1
    if not asked_version or not versions:
        # Text of no stated version is what scrapers spoke before there was a second one.
        return -1 if (subtype, versions) == ("plain", frozenset(("1.0.0",))) else 2
    return 3 if asked_version in versions else -1


class Scrape(NamedTuple):
    """
    What one scrape shows.

    Args:
        target: who and what; ``None`` when it cannot be read, which is said by ``vitalsd_target_up``.
        threads: at most so many with series of their own: those with the most CPU time; 0 for none.
        snapshots_taken: of this target, by this service.
        recorder: as in ``/info``; ``None`` without one.
        private: also show what the kernel shows to the user of the target alone.
    """

    target: tuple[Identity, Snapshot] | None
    threads: int
    snapshots_taken: int
    recorder: dict[str, Any] | None
    private: bool = True

    def collect(self) -> "Iterator[Metric]":
        """Yield the families, as prometheus-client's encoders ask for them."""
        target = None if self.target is None else TargetReading(*self.target)
        yield from _families((TARGET_UP,), target)
        if target is not None:
            identity = target.identity
            yield from _families((row for row in TARGET_COUNTERS if self.private or not row.is_private), target)
            yield _info("vitalsd_target", "The target.", {"pid": str(identity.pid), "name": printable(identity.name)})
            yield from self._threads(target.snapshot)
        yield _info("vitalsd_build", "This service.", {"version": __version__, "python": platform.python_version()})
        yield from _families(OWN_COUNTERS, OwnReading(self.snapshots_taken, self.recorder))

    def _threads(self, snapshot: Snapshot) -> "Iterator[Metric]":
        if not self.threads:
            return
        from prometheus_client.core import CounterMetricFamily

        roster, shown = snapshot.roster, busiest_threads(snapshot, self.threads)
        for row in THREAD_COUNTERS:
            values = row.values(snapshot)
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
    """Return what encodes `form`. It loads prometheus-client, which a sidecar that is not scraped does without."""
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
