"""
Encode the wire contract as bytes: a `Measurement`, or the reason why there is none, in JSON.

This module does not use the models of `vitalsd.contract.metrics`, because a pydantic dump costs more than the whole
measurement; a property test compares the two. The JSON is ASCII, so that control characters and bidirectional marks
in a thread's name reach no terminal unescaped.
"""

import json
import math
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from json.encoder import encode_basestring_ascii as quote
from operator import add
from typing import Any, Literal

from vitalsd.contract.host import RecordedHost, os_version
from vitalsd.contract.json_pieces import to_json
from vitalsd.contract.limits import ANSWER_BYTES, ANSWER_THREADS
from vitalsd.snapshot import MEMORY_PRESSURE_LEVELS, THERMAL_STATES, Identity, Measurement, ProcessFigures, ThreadRoster
from vitalsd.sources.base import SourceError
from vitalsd.text import iso

__all__ = ["Detail", "Labels", "Sort", "encode", "target_json", "unavailable", "unavailable_json"]

Detail = Literal["basic", "full"]
Sort = Literal["tid", "cpu", "name"]

MAX_KEPT = 16
"""Different answers of one measurement that are cached; together they have at most `ANSWER_BYTES`."""

SIZES = tuple(name for name in ProcessFigures._fields if name.endswith("_bytes"))
"""Figures in bytes; the answer has each in KiB, with a name that ends in ``_kb``."""
COUNTS = tuple(name for name in ProcessFigures._fields if not name.endswith(("_bytes", "_ns")))
"""Figures that the answer has unchanged. Those that end in ``_ns`` become rates, by `measure`."""

DECIMALS = 3
"""Decimals of every percentage: 0.001 % of a second is 10 µs."""


def unavailable(error: SourceError | str, platform: str) -> bytes:
    """Encode the `Unavailable` variant as bytes."""
    return json.dumps(unavailable_json(error, platform), separators=(",", ":")).encode()


def unavailable_json(error: SourceError | str, platform: str) -> dict[str, Any]:
    """Make the `Unavailable` variant of an error of a source; no other function turns such an error into an answer."""
    return {"platform": platform, "available": False, "reason": str(error)}


def target_json(identity: Identity) -> dict[str, Any]:
    """Return the JSON object that names one run of one process, as all answers have it."""
    return {
        "pid": identity.pid,
        "name": identity.name,
        "started_at": iso(identity.started_unix_ns),
        "start_id": identity.start_id,
    }


class Labels:
    """
    Cache the part of each thread's JSON that does not change while its threads do not, for the last few rosters.

    To write that part anew is most of the cost of an answer.
    """

    KEPT = 8
    """Rosters in the cache."""

    def __init__(self) -> None:
        self._kept: list[tuple[ThreadRoster, list[str]]] = []

    def of(self, roster: ThreadRoster) -> list[str]:
        """Return ``{"tid":1,"name":"main","cpu_percent":`` for each thread."""
        for kept, labels in self._kept:
            if kept == roster:
                return labels
        labels = [
            f'{{"tid":{tid},"name":{quote(name)},"cpu_percent":'
            for tid, name in zip(roster.tids, roster.names, strict=True)
        ]
        self._kept = [(roster, labels), *self._kept[: self.KEPT - 1]]
        return labels


def encode(
    measurement: Measurement,
    identity: Identity,
    *,
    requested_ms: int,
    mode: Literal["wait", "trailing"] = "wait",
    detail: Detail = "basic",
    sort: Sort = "tid",
    limit: int | None = None,
    children: bool = False,
    labels: Labels | None = None,
    warnings: tuple[str, ...] = (),
    host: RecordedHost | None = None,
) -> bytes:
    """
    Encode the answer of ``GET /metrics``; equal requests for one measurement share the bytes.

    Args:
        measurement: the figures.
        identity: the process that was measured.
        requested_ms: the requested window, ms; the answer holds the measured one.
        mode: how the window was chosen, for ``detail=full``.
        detail: which fields the answer has.
        sort: order of the threads; ``cpu`` is busiest first, and equal threads are in the order of their tids.
        limit: maximum number of threads, applied after sorting.
        children: whether ``detail=full`` has the descendants of the target and the sum of the application.
        labels: a cache for what is the same in the next answer.
        warnings: added to those of the measurement, for ``detail=full``.
        host: the machine that was recorded; ``None``: this one.
    """
    key = (requested_ms, mode, detail, sort, limit, children, warnings, host)
    body = measurement.encoded.get(key)
    if body is None:
        order = _order(measurement, sort, limit)
        constant = (labels or Labels()).of(measurement.last.roster) if detail == "basic" else []

        def render(shown: Sequence[int]) -> bytes:
            cut = len(shown) < len(order)
            if detail == "basic":
                return _basic(measurement, identity, shown, constant, cut=cut)
            full = _full(measurement, identity, shown, requested_ms, mode)
            if host is not None:
                full["host"] |= {"cpu_count": host.cpu_count, "os_version": host.version, "arch": host.arch}
            full["warnings"] += warnings
            if children:
                full |= _family(measurement, full["warnings"])
            if cut:
                full["warnings"].append(f"only the busiest {len(shown)} of {len(order)} threads are shown")
            return to_json(full)

        body = _fitting(measurement, order, render)
        kept = measurement.encoded
        if len(kept) >= MAX_KEPT or sum(map(len, kept.values())) + len(body) > ANSWER_BYTES:
            kept.clear()
        kept[key] = body
    return body


def _fitting(m: Measurement, order: Sequence[int], render: Callable[[Sequence[int]], bytes]) -> bytes:
    """Render as many threads of `order` as the limits of an answer allow: the busiest ones, in that order."""
    most = ANSWER_THREADS
    while True:
        shown = order
        if len(order) > most:
            busiest = set(sorted(order, key=lambda i: -m.thread_cpu_ns[i])[:most])
            shown = [i for i in order if i in busiest]
        body = render(shown)
        if len(body) <= ANSWER_BYTES or not shown:
            return body
        most = len(shown) * ANSWER_BYTES // len(body) * 9 // 10


def _order(m: Measurement, sort: Sort, limit: int | None) -> Sequence[int]:
    threads: Sequence[int] = range(len(m.last.roster))
    if sort == "cpu":
        threads = sorted(threads, key=lambda i: -m.thread_cpu_ns[i])
    elif sort == "name":
        threads = sorted(threads, key=m.last.roster.names.__getitem__)
    return threads if limit is None else threads[:limit]


def _basic(m: Measurement, identity: Identity, order: Sequence[int], labels: list[str], *, cut: bool) -> bytes:
    percent = 100 / m.elapsed_ns
    values = [repr(round(ns * percent, DECIMALS)) if ns else "0.0" for ns in m.thread_cpu_ns]
    for i in m.born:
        values[i] = "0.0"
    entries: Iterable[str] = map(add, labels, values)
    if order != range(len(values)):
        every = list(entries)
        entries = [every[i] for i in order]
    threads = "},".join(entries)
    truncated = ',"truncated":true' if cut else ""
    return (
        f'{{"sample_window_ms":{_ms(m.elapsed_ns)},'
        f'"process":{{"cpu_percent":{round(m.cpu_ns * percent, DECIMALS)},'
        f'"rss_kb":{m.last.rss_bytes // 1024},'
        f'"vm_size_kb":{m.last.vm_bytes // 1024},'
        f'"uptime_secs":{round(m.last.uptime_ns / 1e9, DECIMALS)}}},'
        f'"threads":[{threads}{"}" if threads else ""}],'
        f'"platform":{quote(identity.platform)}{truncated}}}'
    ).encode()


def _ms(ns: int) -> int:
    return (ns + 500_000) // 1_000_000


def _full(m: Measurement, identity: Identity, order: Sequence[int], requested_ms: int, mode: str) -> dict[str, Any]:
    last, warnings = m.last, list(m.warnings)
    figures = last.figures or ProcessFigures()
    if last.thread_figures is None:
        warnings.append("the record has no states, priorities and user/system split: null")
    return {
        "sample_window_ms": _ms(m.elapsed_ns),
        "process": _full_process(m, figures),
        "threads": _full_threads(m, order),
        "platform": identity.platform,
        "schema": 2,
        "target": target_json(identity),
        "window": {
            "requested_ms": requested_ms,
            "measured_ms": round(m.elapsed_ns / 1e6, DECIMALS),
            "mode": mode,
            "started_at": iso(m.first.wall_ns, "microseconds"),
            "ended_at": iso(last.wall_ns, "microseconds"),
            "suspended": m.suspended_ns > 0,
        },
        "accounting": {
            "process_percent": _percent(m, m.cpu_ns),
            "living_percent": _percent(m, m.living_ns),
            "exited_percent": _percent(m, m.exited_ns),
            "unattributed_percent": _percent(m, m.unattributed_ns),
        },
        "resolution": {
            "cpu_ns": last.thread_grain_ns,
            "lag_ns": last.thread_lag_ns,
            "source": last.source,
        },
        "host": {
            "cpu_count": os.cpu_count(),
            "os": identity.platform,
            "os_version": os_version(),
            "arch": platform.machine(),
        },
        "machine": _machine(m),
        "truncated": len(order) < len(last.roster),
        "warnings": warnings,
    }


def _full_process(m: Measurement, figures: ProcessFigures) -> dict[str, Any]:
    last = m.last
    sizes = {f"{name.removesuffix('_bytes')}_kb": _kb(getattr(figures, name)) for name in SIZES}
    return {
        "cpu_percent": _percent(m, m.cpu_ns),
        "rss_kb": _kb(last.rss_bytes),
        "vm_size_kb": _kb(last.vm_bytes),
        "uptime_secs": round(last.uptime_ns / 1e9, DECIMALS),
        "user_percent": _percent(m, m.user_ns),
        "system_percent": _percent(m, _rest(m.cpu_ns, m.user_ns)),
        "cpu_percent_error": _error_percent(m, m.cpu_error_ns),
        "wait_percent": _percent(m, m.wait_ns),
        "wait_percent_error": None if last.wait_error_ns is None else _error_percent(m, last.wait_error_ns),
        "children_percent": _percent(m, m.reaped_ns),
        **sizes,
        "thread_count": len(last.roster),
        **{name: getattr(figures, name) for name in COUNTS},
        "p_core_percent": _percent(m, m.p_core_ns),
        "qos_percent": None if m.qos_ns is None else {name: _percent(m, ns) for name, ns in m.qos_ns.items()},
    }


def _full_threads(m: Measurement, order: Sequence[int]) -> list[dict[str, Any]]:
    last, roster = m.last, m.last.roster
    nothing = [None] * len(roster)
    user_ns = m.thread_user_ns or nothing
    priorities = last.thread_figures.priorities if last.thread_figures else nothing
    return [
        {
            "tid": roster.tids[i],
            "name": roster.names[i],
            "cpu_percent": None if i in m.unknown else _percent(m, m.thread_cpu_ns[i]),
            "user_percent": _percent(m, user_ns[i]),
            "system_percent": _percent(m, _rest(m.thread_cpu_ns[i], user_ns[i])),
            "cpu_percent_error": None if i in m.unknown else _error_percent(m, m.thread_error_ns(i)),
            "wait_percent": None if m.thread_wait_ns is None or i in m.unknown else _percent(m, m.thread_wait_ns[i]),
            "cpu_time_ns": last.thread_cpu_ns[i],
            "state": m.thread_state(i),
            "priority": priorities[i],
            "born_in_window": i in m.born,
        }
        for i in order
    ]


def _machine(m: Measurement) -> dict[str, Any] | None:
    """Return what the machine did, without the name of any process; ``None``: it was not read at both ends."""
    use, now = m.machine, m.last.machine
    if use is None or now is None:
        return None
    ours_ns = m.cpu_ns if m.tree is None else m.tree.cpu_ns
    return {
        "scope": "container" if now.in_container else "host",
        "cpu_percent": _percent(m, use.busy_ns),
        "other_percent": None if use.busy_ns is None else _percent(m, max(0, use.busy_ns - ours_ns)),
        "load_1m": None if now.load_milli is None else now.load_milli / 1000,
        "memory_available_kb": _kb(now.memory_available_bytes),
        "swap_used_kb": _kb(now.swap_used_bytes),
        "pressure_percent": {
            "cpu": _percent(m, use.cpu_pressure_ns),
            "memory": _percent(m, use.memory_pressure_ns),
            "io": _percent(m, use.io_pressure_ns),
        },
        "memory_pressure": None
        if now.memory_pressure_level is None
        else MEMORY_PRESSURE_LEVELS[now.memory_pressure_level],
        "quota_throttled_percent": _percent(m, use.quota_throttled_ns),
        "thermal_state": None if now.thermal_level is None else THERMAL_STATES[now.thermal_level],
    }


def _family(m: Measurement, warnings: list[str]) -> dict[str, Any]:
    """Return the living descendants, and the target with them as one application; null if they were not read."""
    use, now = m.tree, m.last.tree
    if use is None or now is None:
        warnings.append("children: they were not recorded; start the sidecar with --children, or ask with mode=wait")
        return {"children": None, "application": None}
    return {
        "children": [
            {
                "pid": child.pid,
                "name": child.name,
                "cpu_percent": _percent(m, cpu_ns),
                "rss_kb": _kb(child.rss_bytes),
                "thread_count": child.thread_count or None,
            }
            for child, cpu_ns in use.children
        ],
        "application": {
            "cpu_percent": _percent(m, use.cpu_ns),
            "rss_kb": _kb(now.rss_bytes),
            "process_count": now.process_count,
            "complete": use.complete,
        },
    }


def _percent(m: Measurement, ns: int | None) -> float | None:
    return None if ns is None else round(ns * 100 / m.elapsed_ns, DECIMALS)


def _error_percent(m: Measurement, ns: int) -> float:
    # Rounded up, and half a unit more, because rounding moves the figure that this is the error bar of.
    unit = float(10**DECIMALS)
    return math.ceil(ns * 100 * unit / m.elapsed_ns + 0.5) / unit


def _kb(size: int | None) -> int | None:
    return None if size is None else size // 1024


def _rest(whole: int, part: int | None) -> int | None:
    return None if part is None else whole - part
