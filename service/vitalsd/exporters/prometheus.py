"""
``GET /metrics`` for scrapers: which form an ``Accept`` asks for, and counters as Prometheus text or OpenMetrics.

Cumulative counters and gauges of one instant: a scraper brings its own windows, so nothing is waited for.
"""

import platform
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from heapq import nlargest
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from vitalsd import __version__
from vitalsd.snapshot import Identity, Snapshot
from vitalsd.text import printable

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

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
        """The families, as prometheus-client's encoders ask for them."""
        yield _gauge("vitalsd_target_up", "1 if the target can be read, else 0.", self.target is not None)
        if self.target is not None:
            yield from self._process(*self.target)
        yield from self._ourselves()

    def _process(self, identity: Identity, snapshot: Snapshot) -> "Iterator[Metric]":
        yield _counter(
            "process_cpu_seconds",
            "CPU time of the target, living and exited threads, user and system, in seconds.",
            snapshot.cpu_ns / 1e9,
        )
        yield _gauge("process_resident_memory_bytes", "Resident memory of the target in bytes.", snapshot.rss_bytes)
        yield _gauge("process_virtual_memory_bytes", "Virtual memory of the target in bytes.", snapshot.vm_bytes)
        yield _gauge(
            "process_start_time_seconds", "Start of the target in Unix time, seconds.", identity.started_unix_ns / 1e9
        )
        yield _gauge("process_threads", "Threads of the target.", len(snapshot.roster))
        if self.private and snapshot.extras is not None and snapshot.extras.open_fds is not None:
            yield _gauge("process_open_fds", "Open file descriptors of the target.", snapshot.extras.open_fds)
        yield _info("vitalsd_target", "The target.", {"pid": str(identity.pid), "name": printable(identity.name)})
        yield from self._threads(snapshot)

    def _threads(self, snapshot: Snapshot) -> "Iterator[Metric]":
        if not self.threads:
            return
        from prometheus_client.core import CounterMetricFamily

        family = CounterMetricFamily(
            "vitalsd_thread_cpu_seconds",
            f"CPU time of a living thread in seconds; of more than {self.threads}, those with the most.",
            labels=("tid", "thread"),
        )
        roster, cpu_ns = snapshot.roster, snapshot.thread_cpu_ns
        shown = nlargest(self.threads, range(len(roster)), key=lambda i: (cpu_ns[i], -i))
        for i in sorted(shown):
            family.add_metric((str(roster.tids[i]), printable(roster.names[i])), cpu_ns[i] / 1e9)
        yield family
        yield _gauge(
            "vitalsd_threads_left_out",
            "Living threads without a series of their own.",
            len(snapshot.roster) - len(shown),
        )

    def _ourselves(self) -> "Iterator[Metric]":
        usage = resource.getrusage(resource.RUSAGE_SELF)
        yield _info("vitalsd_build", "This service.", {"version": __version__, "python": platform.python_version()})
        yield _counter("vitalsd_cpu_seconds", "CPU time of this service in seconds.", time.process_time())
        yield _gauge(
            "vitalsd_peak_resident_memory_bytes",
            "Most resident memory this service ever had, in bytes.",
            usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        )
        yield _counter("vitalsd_snapshots", "Snapshots taken of the target.", self.snapshots_taken)
        if self.recorder is not None:
            yield _counter("vitalsd_recorder_missed", "Snapshots the recorder missed.", self.recorder["missed"])
            yield _gauge("vitalsd_recorder_size_bytes", "Memory of the record in bytes.", self.recorder["size_bytes"])
            yield _gauge("vitalsd_recorder_snapshots", "Snapshots in the record.", self.recorder["snapshots"])


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


def _gauge(name: str, text: str, value: float) -> "Metric":
    from prometheus_client.core import GaugeMetricFamily

    return GaugeMetricFamily(name, text, value=float(value))


def _counter(name: str, text: str, value: float) -> "Metric":
    from prometheus_client.core import CounterMetricFamily

    return CounterMetricFamily(name, text, value=value)


def _info(name: str, text: str, labels: dict[str, str]) -> "Metric":
    from prometheus_client.core import InfoMetricFamily

    return InfoMetricFamily(name, text, value=labels)
