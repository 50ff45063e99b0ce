"""
Push metrics to an OpenTelemetry Collector over OTLP/HTTP, if enabled (``pip install vitalsd[otlp]``).

The counters of the target are sent unchanged, with the names, units and attributes of the semantic conventions for
processes. The conventions have no name for the CPU time of a thread and the kernel's thread id, so these are in the
namespace ``vitalsd``.

The data points are made from a snapshot with the classes of the SDK and sent by its exporter. Its instruments are not
used: they would begin each counter at the start of this service and not of the target, could not change the target of
a resource, and would keep every thread that has exited.
"""

import asyncio
import io
import logging
import platform
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import suppress
from http.cookiejar import DefaultCookiePolicy
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from vitalsd import __version__
from vitalsd.contract.host import os_version
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
    Point,
    SignalsReading,
    TargetReading,
    busiest_threads,
)
from vitalsd.sampling.target_pool import Targets
from vitalsd.snapshot import Identity, Snapshot
from vitalsd.sources.base import SourceError
from vitalsd.text import iso, one_line, printable
from vitalsd.worker_thread import Worker

if TYPE_CHECKING:
    import requests
    from opentelemetry.sdk.metrics.export import Metric, MetricsData

__all__ = [
    "CREDENTIALS",
    "DEFAULT_URL",
    "NotInstalledError",
    "Push",
    "check_installed",
    "endpoint_of",
    "isolate",
    "metrics_data",
]

ReadingT = TypeVar("ReadingT")

DEFAULT_URL = "http://127.0.0.1:4318"
PATH = "/v1/metrics"
TIMEOUT_S = 10.0
"""Longest time limit of one push, s; a shorter interval of pushes shortens it."""
LOG_INTERVAL_S = 600.0
"""Least time between two warnings in the log about a Collector that is down, s."""
CREDENTIALS = frozenset(
    f"OTEL_EXPORTER_OTLP_{name}" for name in ("HEADERS", "CERTIFICATE", "CLIENT_KEY", "CLIENT_CERTIFICATE")
)
"""Variables of the environment that the SDK may use: every user of the machine could read a command line."""
HOW_TO_INSTALL = "--otlp needs more: pip install 'vitalsd[otlp]'"
NAMESPACE = uuid.UUID("0b6c1a52-6f0e-5d8e-9d5a-3c0f3f1f7a11")
"""Namespace of the UUIDs (version 5) that name a host and a run of a target."""
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
"""Names of OpenTelemetry for architectures, by the name that the kernel uses."""

log = logging.getLogger("vitalsd.exporters.otlp")


class NotInstalledError(Exception):
    """The packages of the extra ``otlp`` are missing; ``str(error)`` states how to install them."""


def check_installed() -> None:
    """Check that the packages of the extra exist, without importing them. Raises `NotInstalledError`."""
    for name in ("requests", "opentelemetry.exporter.otlp.proto.http"):
        try:
            found = find_spec(name)
        except ModuleNotFoundError:
            found = None
        if found is None:
            raise NotInstalledError(f"{HOW_TO_INSTALL} (there is no {name})")


def endpoint_of(url: str) -> str:
    """
    Return the URL to which metrics are sent: `url` with ``/v1/metrics`` added, unless it ends so.

    Raises:
        ValueError: `url` is not the http or https URL of a Collector.
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        usable = usable and not (parts.query or parts.fragment or parts.username is not None)
    except ValueError:
        usable = False
    if not usable:
        raise ValueError(f"{url!r} is not the URL of a Collector; one looks like {DEFAULT_URL}")
    return url if parts.path.endswith(PATH) else url.rstrip("/") + PATH


def isolate(environ: MutableMapping[str, str]) -> list[str]:
    """
    Remove the variables that would change the content, the destination or the transport of pushes.

    `CREDENTIALS` stay. Call this only in a process of our own, before the SDK is imported, because the SDK reads many
    variables, some of them at import. To the file in SSLKEYLOGFILE, urllib3 would write the keys of the connection.

    Returns:
        The names of the removed variables.
    """
    ignored = sorted(
        name for name in environ if (name.startswith("OTEL_") and name not in CREDENTIALS) or name == "SSLKEYLOGFILE"
    )
    for name in ignored:
        del environ[name]
    return ignored


def metrics_data(
    target: tuple[Identity, Snapshot] | None,
    *,
    threads: int,
    snapshots_taken: int,
    since_ns: int,
    signals: SignalsReading = NO_SIGNALS,
) -> "MetricsData":
    """
    Return the data of one push.

    Args:
        target: identity, and a snapshot with figures; ``None`` if the target cannot be read, which
            ``vitalsd.target.up`` reports.
        threads: maximum number of threads with a series of their own, those with the most CPU time; 0: none.
        snapshots_taken: number of snapshots by this service.
        since_ns: Unix time, ns, at which the counts of snapshots and of hangs began.
        signals: heartbeats and gauges.
    """
    from opentelemetry.sdk.metrics.export import MetricsData, ResourceMetrics, ScopeMetrics
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope

    own = _Points(since_ns, time.time_ns())
    reading = None if target is None else TargetReading(*target)
    metrics = [*own.of((TARGET_UP,), reading), *own.of(OWN_COUNTERS, OwnReading(snapshots_taken))]
    attributes: dict[str, Any] = {}
    if reading is not None:
        identity, snapshot = reading
        points = _Points(identity.started_unix_ns, snapshot.wall_ns)
        metrics += points.of(TARGET_COUNTERS + MACHINE_COUNTERS, reading)
        metrics += _threads(points, snapshot, threads)
        metrics += _signals(own, signals)
        attributes = _resource(identity)
    scope = ScopeMetrics(InstrumentationScope("vitalsd", __version__), metrics, "")
    return MetricsData([ResourceMetrics(Resource(_host() | attributes), [scope], "")])


def _host() -> dict[str, Any]:
    """Return the attributes of the machine; none identifies it: no name, no address, no machine id."""
    machine = platform.machine()
    return {
        "service.name": "vitalsd",
        "host.arch": ARCHITECTURES.get(machine, machine),
        "os.type": sys.platform,
        "os.version": os_version(),
    }


def _resource(identity: Identity) -> dict[str, Any]:
    """Return the attributes of the target: its program and its run. The ids of host and run change with every boot."""
    return {
        "service.name": printable(identity.name) or "vitalsd",
        "service.instance.id": str(uuid.uuid5(NAMESPACE, f"{identity.start_id} {identity.boot_id}")),
        "host.id": str(uuid.uuid5(NAMESPACE, identity.boot_id)),
        "process.pid": identity.pid,
        "process.creation.time": iso(identity.started_unix_ns),
        "process.executable.name": printable(identity.name),
    }


def _threads(points: "_Points", snapshot: Snapshot, limit: int) -> Iterator["Metric"]:
    if not limit:
        return
    roster, shown = snapshot.roster, busiest_threads(snapshot, limit)
    labels = {i: {"vitalsd.thread.id": roster.tids[i], "thread.name": printable(roster.names[i])} for i in shown}
    for row in THREAD_COUNTERS:
        if (values := row.values(snapshot)) is None:
            continue
        description = row.description.format(limit=limit)
        yield points.sum(row.otel, row.unit, description, [(labels[i], values[i]) for i in shown])
    yield from points.of((THREADS_LEFT_OUT,), len(roster) - len(shown))


def _signals(points: "_Points", signals: SignalsReading) -> Iterator["Metric"]:
    for row in SIGNAL_COUNTERS:
        if values := row.points(signals):
            make = points.sum if row.kind == "counter" else points.gauge
            yield make(row.otel, row.unit, row.help, values)


class _Points:
    """Make metrics of one instant that are counted since another; both are Unix times in ns."""

    def __init__(self, since_ns: int, now_ns: int) -> None:
        self._since_ns = since_ns
        self._now_ns = max(now_ns, since_ns)

    def of(self, rows: Iterable[Counter[ReadingT]], reading: ReadingT) -> Iterator["Metric"]:
        """Yield the metrics of a table."""
        for row in rows:
            points, text = row.points(reading) if row.otel else (), row.description or row.help
            if points and row.kind == "gauge":
                yield self.gauge(row.otel, row.unit, text, points)
            elif points:
                since_ns = self._since_ns if row.is_since_start else 0
                yield self.sum(row.otel, row.unit, text, points, since_ns, is_monotonic=row.kind == "counter")

    def sum(
        self,
        name: str,
        unit: str,
        text: str,
        values: Iterable[Point],
        since_ns: int | None = None,
        *,
        is_monotonic: bool = True,
    ) -> "Metric":
        """Return a cumulative sum; with `since_ns` 0 its start is unknown."""
        from opentelemetry.sdk.metrics.export import AggregationTemporality, Metric, NumberDataPoint, Sum

        since_ns = self._since_ns if since_ns is None else since_ns
        points = [NumberDataPoint(attributes, since_ns, self._now_ns, value) for attributes, value in values]
        return Metric(name, text, unit, Sum(points, AggregationTemporality.CUMULATIVE, is_monotonic))

    def gauge(self, name: str, unit: str, text: str, values: Iterable[Point]) -> "Metric":
        """Return a gauge: values of this instant."""
        from opentelemetry.sdk.metrics.export import Gauge, Metric, NumberDataPoint

        return Metric(
            name,
            text,
            unit,
            Gauge([NumberDataPoint(attributes, 0, self._now_ns, value) for attributes, value in values]),
        )


class Push:
    """
    Push the counters of the default target every `interval_s`. A Collector that is down or slow blocks nothing else.

    A push that failed is not repeated: the counters are cumulative, so the next push includes it.

    Args:
        targets: has the default target.
        url: as `endpoint_of` returns it.
        interval_s: time between two pushes, s; the first one is sent at once.
        threads: see `metrics_data`.

    Raises:
        NotInstalledError: the packages of the extra are missing.
    """

    def __init__(self, targets: Targets, url: str, *, interval_s: float, threads: int) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http import Compression
            from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        except ImportError as error:
            raise NotInstalledError(f"{HOW_TO_INSTALL} ({error})") from None

        # `_Failures` logs failures, and not every one.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        self.url = url
        self._targets = targets
        self._interval_s = interval_s
        self._threads = threads
        self._since_ns = time.time_ns()
        self._failures = _Failures(url)
        self._exporter = OTLPMetricExporter(
            endpoint=url,
            timeout=min(TIMEOUT_S, interval_s),
            compression=Compression.Gzip,
            session=_session(self._failures),
        )
        self._worker = Worker("vitalsd-otlp")

    async def run(self, _: object) -> None:
        """Push until cancelled; see `vitalsd.sidecar.service.BackgroundTask`."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        try:
            while True:
                data = await self._collect()
                await asyncio.wrap_future(self._worker.submit(lambda data=data: self._send(data)))  # type: ignore[misc]
                due = max(due + self._interval_s, loop.time())
                await asyncio.sleep(due - loop.time())
        except Exception:
            # A failure of pushes must not end the sidecar.
            log.exception("nothing more is sent to %s", self.url)
        finally:
            self._exporter.shutdown()
            self._worker.stop(0)

    async def _collect(self) -> "MetricsData":
        read = None
        target = self._targets.default
        with suppress(SourceError):
            read = await target.identity(), await target.snapshot()
        return metrics_data(
            read,
            threads=self._threads,
            snapshots_taken=target.snapshots_taken,
            since_ns=self._since_ns,
            signals=SignalsReading.of(target),
        )

    def _send(self, data: "MetricsData") -> None:
        from opentelemetry.sdk.metrics.export import MetricExportResult

        self._failures.accepted = True
        exported = self._exporter.export(data) is MetricExportResult.SUCCESS
        # The exporter counts a redirect as success, although it does not follow it.
        self._failures.note(exported and self._failures.accepted)


def _session(failures: "_Failures") -> "requests.Session":
    """Return the HTTP session of one `Push`; it reports each answer, and each error instead of one, to `failures`."""
    import requests

    class Session(requests.Session):
        """
        A session that reads only the head of an answer: a body may be endless, or expand to any size.

        It takes neither proxies nor passwords from the environment, and reports the reason of a failure.
        """

        def request(self, *arguments: Any, **options: Any) -> requests.Response:
            try:
                answer = super().request(*arguments, **options | {"stream": True, "allow_redirects": False})
            except requests.RequestException as error:
                failures.reason = _root(error)
                raise
            with answer:
                if answer.headers.get("Content-Length") == "0":
                    answer.content  # noqa: B018 - reads to the end, so that the connection is reused
                head = requests.Response()
                head.status_code, head.reason, head.url = answer.status_code, answer.reason, answer.url
                head.headers = answer.headers
                head.raw = io.BytesIO()
            failures.answered(head.status_code, head.reason or "")
            return head

    session = Session()
    session.trust_env = False
    session.headers["Accept-Encoding"] = "identity"
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=()))
    return session


class _Failures:
    """Log when the Collector begins to fail, every `LOG_INTERVAL_S` while it does, and when it works again."""

    def __init__(self, url: str) -> None:
        self.reason = "it cannot be sent"
        self.accepted = True
        """Whether the last answer was not a redirect."""
        self._url = url
        self._count = 0
        self._logged_s = float("-inf")
        self._has_logged = False

    def answered(self, status: int, reason: str) -> None:
        """Store the answer of the Collector: its status, and its reason phrase, which is escaped and cut."""
        self.accepted = not 300 <= status < 400
        self.reason = f"it answers {status} {one_line(reason, 100)}".rstrip()
        if not self.accepted:
            self.reason += ", and redirects are not followed; give the URL that it leads to"

    def note(self, well: bool) -> None:
        if well:
            if self._has_logged:
                log.info("%s takes metrics again; %d pushes were lost", self._url, self._count)
            self._count, self._has_logged = 0, False
            return
        self._count += 1
        if time.monotonic() - self._logged_s >= LOG_INTERVAL_S:
            self._logged_s, self._has_logged = time.monotonic(), True
            text = "cannot push metrics to %s: %s; retrying, the next message is in %d min at the earliest"
            log.warning(text, self._url, self.reason, LOG_INTERVAL_S // 60)


def _root(error: BaseException) -> str:
    """Return the last text of the operating system in a chain of exceptions, or the type of the first exception."""
    found: BaseException | None = error
    word = type(error).__name__
    while found is not None:
        if isinstance(found, OSError) and found.strerror and found.errno is not None:
            word = found.strerror
        found = found.__cause__ or found.__context__
    return word
