"""Get the samples of the feed: read the target directly, or ask a sidecar for what its recorder has."""

import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from math import ceil, isfinite
from typing import Any

from vitalsd.contract.encoding import Detail, encode
from vitalsd.contract.metrics import Unavailable, parse_runtime_metrics
from vitalsd.discovery.http_connection import ExchangeError
from vitalsd.recording.recorder import Recorder, RecorderConfig
from vitalsd.snapshot import Part, measure
from vitalsd.sources.base import Source, SourceError, TargetGoneError
from vitalsd.text import one_line
from vitalsd.top.events import FeedEvent, HangNote, Hangs, InitialHistory, Note, Sample, TargetInfo
from vitalsd_client.locate import RunningSidecar

__all__ = ["DirectBackend", "Pause", "SidecarBackend"]

SIDECAR_POLL_S = 2.0
"""Interval of the discovery of a sidecar of the same target during direct sampling, s."""
PAST_S = 300
"""Length of the history to show at the start, s."""
PAST_THREADS = 64
"""Threads of that history to request, busiest first."""
ALL_S = 86_400
"""Longest history that a sidecar returns, s: one day."""
TREND = 240
"""Rows of a replayed recording to request; no terminal is much wider."""
NOTES_S = 10
"""Longest delay of a mark or an event after the sample that it belongs to, s."""
LATEST_MS = 253_402_300_799_000
"""Latest time that can be shown, Unix time in ms: the end of the year 9999."""
ANSWER_S = 2.0
"""Time limit of an answer, s, beyond the window for which the sidecar may have to wait."""

Pause = Callable[[float], bool]
"""Function that waits until a monotonic time, s; returns False if the feed has to end."""


class DirectBackend:
    """
    Read the target directly; keep a recording in memory only, for its events and for marks.

    Args:
        source: an open source; `close` closes it.
        interval_s: time between two samples, s.
        first_s: time until the first sample, s.
        relieved: returns whether a sidecar of the target can be asked now; called every `SIDECAR_POLL_S`.
        detail: which fields the samples have.
    """

    def __init__(
        self,
        source: Source,
        interval_s: float,
        first_s: float,
        relieved: Callable[[], bool],
        detail: Detail = "basic",
    ) -> None:
        self._source = source
        self._interval_s = interval_s
        self._first_s = first_s
        self._relieved = relieved
        self._detail = detail
        self._parts = Part.FIGURES if detail == "full" else Part.NONE
        self._recorder = Recorder(source.identity(), RecorderConfig(interval_s, retention_s=PAST_S, max_bytes=4 << 20))
        self._seen_notes = _SeenNotes()
        self.final = False
        """Whether no other process can follow the one that has ended: always False here."""

    def close(self) -> None:
        """Close the source."""
        self._source.close()

    def mark(self, label: str) -> None:
        """Record a mark in memory. Raises `ValueError`: it cannot be a label."""
        self._recorder.mark(label)

    def events(self, pause: Pause) -> Iterator[FeedEvent]:
        """Yield the target, then a sample each interval, until the process ends or a sidecar can be asked."""
        last = self._source.snapshot(parts=self._parts)
        self._recorder.observe(last)
        identity = self._source.identity()
        yield TargetInfo(identity.pid, identity.name, identity.start_id, "sampled directly")
        due = time.monotonic() + self._first_s
        look_again = due + SIDECAR_POLL_S
        while pause(due):
            due = max(due + self._interval_s, time.monotonic())
            try:
                now = self._source.snapshot(parts=self._parts)
            except SourceError as error:
                self._recorder.failed(error)
                yield from self._notes()
                raise
            if identity != (identity := self._source.identity()):
                yield TargetInfo(identity.pid, identity.name, identity.start_id, "sampled directly")
            self._recorder.identify(identity)
            self._recorder.observe(now)
            yield from self._notes()
            if now.monotonic_ns > last.monotonic_ns:
                requested_ms = round(self._interval_s * 1000)
                yield _sample(encode(measure(last, now), identity, requested_ms=requested_ms, detail=self._detail))
                last = now
            if time.monotonic() >= look_again:
                if self._relieved():
                    return
                look_again = time.monotonic() + SIDECAR_POLL_S

    def _notes(self) -> list[Note]:
        record = self._recorder.record
        return self._seen_notes.fresh(
            [Note(mark.wall_ns // 1_000_000, "mark", mark.label) for mark in list(record.marks)]
            + [Note(event.wall_ns // 1_000_000, event.kind, event.detail) for event in list(record.events)]
        )


class SidecarBackend:
    """
    Ask a sidecar for what its recorder has, each time on a new connection, so that no connection stays open.

    Args:
        sidecar: the sidecar to ask.
        via: text for the sidecar in the view.
        interval_s: time between two samples, s.
        detail: which fields the samples have.
    """

    def __init__(self, sidecar: RunningSidecar, via: str, interval_s: float, detail: Detail = "basic") -> None:
        self.sidecar = sidecar
        self._via = via
        self._interval_s = interval_s
        self._detail = detail
        self._seen_notes = _SeenNotes()
        self.final = False
        """Whether no other process can follow the one that has ended: the sidecar replays a file."""

    def close(self) -> None:
        """Do nothing: no connection is open between two requests."""

    def mark(self, label: str) -> None:
        """Record a mark in the sidecar. Raises `ExchangeError`."""
        body = json.dumps({"label": label}).encode()
        self._ask("/marks", {}, method="POST", body=body, headers={"Content-Type": "application/json"})

    def events(self, pause: Pause) -> Iterator[FeedEvent]:
        """Yield the target, its history, then samples and notes. Raises `ExchangeError`."""
        try:
            yield from self._recorded_events(pause)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ExchangeError(f"this is no answer of a sidecar: {type(error).__name__}") from None

    def _recorded_events(self, pause: Pause) -> Iterator[FeedEvent]:
        process = {} if self.sidecar.pid is None else {"pid": self.sidecar.pid}
        info = {} if process else self._json("/info")
        recorder, self.final = info.get("recorder"), info.get("replay") is not None
        recorded = recorder is not None
        if recorder is not None:
            ended = recorder.get("ended")
            table = self._json("/history", _whole(recorder) if self.final else {"seconds": PAST_S, "top": PAST_THREADS})
            yield self._target_info(table["target"])
            yield _past(table)
            yield from self._notes(table)
            yield _hangs(table)
            if self.final:
                yield from self._last_window(table)
            if ended:
                raise TargetGoneError(one_line(str(ended)))
        else:
            yield self._target_info(self._json("/metrics", {"window_ms": 10, "detail": "full", **process})["target"])
        window_ms = min(60_000, max(10, round(self._interval_s * 1000)))
        uptime_s = -1.0
        due = time.monotonic()
        while True:
            sample = self._window(window_ms, process)
            now_s = sample.metrics.process.uptime_secs
            if now_s < uptime_s:
                return  # The sidecar measures the next process of that name now.
            if recorded:
                yield from self._latest()
            if now_s > uptime_s:
                yield sample
            # Without a new sample the recorder has a longer interval than this view, or it has stopped.
            elif recorded and (ended := (self._json("/info")["recorder"] or {}).get("ended")):
                yield from self._latest()
                raise TargetGoneError(one_line(str(ended)))
            uptime_s = now_s
            due = max(due + self._interval_s, time.monotonic())
            if not pause(due):
                return

    def _last_window(self, table: dict[str, Any]) -> Iterator[Sample]:
        """Yield the last window of a replayed recording, with the time of its end."""
        if table["time_ms"]:
            window_ms = min(60_000, max(10, int(table["interval_ms"])))
            sample = self._window(window_ms, {})
            yield replace(sample, wall_ms=_wall_ms({"time_ms": table["time_ms"][-1]}))

    def _window(self, window_ms: int, process: dict[str, int]) -> Sample:
        """Return the window that has just been recorded."""
        query = {"window_ms": window_ms, "mode": "trailing", "detail": self._detail, **process}
        return _sample(self._ask("/metrics", query))

    def _latest(self) -> Iterator[FeedEvent]:
        table = self._json("/history", {"seconds": ceil(self._interval_s) + NOTES_S, "top": 0})
        notes = self._notes(table)
        if any(note.kind == "executed" for note in notes):
            yield self._target_info(table["target"])
        yield from notes
        yield _hangs(table)

    def _target_info(self, target: dict[str, Any]) -> TargetInfo:
        return TargetInfo(int(target["pid"]), str(target["name"]), str(target["start_id"]), self._via)

    def _notes(self, table: dict[str, Any]) -> list[Note]:
        """Return the new marks and events; a hang when it is over, or at the end of a replayed recording."""
        return self._seen_notes.fresh(
            [Note(_wall_ms(mark), "mark", str(mark["label"])) for mark in table["marks"]]
            + [
                Note(_wall_ms(event), str(event["kind"]), str(event["detail"]))
                for event in table["events"]
                if event["kind"] != "hang"
            ]
            + [Note(hang.wall_ms, "hang", hang.text) for hang in _hangs(table).hangs if self.final or not hang.ongoing]
        )

    def _json(self, path: str, query: dict[str, Any] | None = None) -> dict[str, Any]:
        found = json.loads(self._ask(path, query or {}))
        if not isinstance(found, dict):
            raise ValueError(f"{path} answered no object")
        return found

    def _ask(self, path: str, query: dict[str, Any], **options: Any) -> bytes:
        deadline = time.monotonic() + self._interval_s + ANSWER_S
        answer = self.sidecar.get(path, query, deadline=deadline, **options)
        if answer.status in (200, 201):
            return answer.body
        try:
            refusal = json.loads(answer.body)
            reason = str(refusal.get("reason") if refusal.get("available") is False else refusal["detail"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            reason = f"{path} was answered with status {answer.status}"
        if answer.status == 410:
            raise TargetGoneError(one_line(reason))
        raise ExchangeError(reason)


class _SeenNotes:
    """Remember the notes that were yielded, so that none is yielded twice."""

    def __init__(self) -> None:
        self._seen: deque[Note] = deque(maxlen=4096)

    def fresh(self, notes: list[Note]) -> list[Note]:
        """Return the notes that were not returned before, oldest first."""
        fresh = sorted((note for note in notes if note not in self._seen), key=lambda note: note.wall_ms)
        self._seen.extend(fresh)
        return fresh


def _wall_ms(note: dict[str, Any]) -> int:
    """Return the time of a note, Unix time in ms. Raises `ValueError`: it is after the year 9999."""
    wall_ms = int(note["time_ms"])
    if not 0 <= wall_ms <= LATEST_MS:
        raise ValueError(f"a time of {wall_ms}")
    return wall_ms


def _hangs(table: dict[str, Any]) -> Hangs:
    return Hangs(
        tuple(
            HangNote(
                wall_ms=_wall_ms(event),
                heartbeat=str(event["heartbeat"]),
                duration_ms=max(0, min(int(event["duration_ms"]), LATEST_MS)),
                cause=str(event["cause"]),
                detail=str(event["detail"]),
                ongoing=bool(event["ongoing"]),
            )
            for event in table["events"]
            if event["kind"] == "hang"
        )
    )


def _whole(recorder: dict[str, Any]) -> dict[str, int]:
    """Return the query for a whole replayed recording, downsampled to about `TREND` rows."""
    step_ms = int(recorder["snapshots"]) * int(recorder["interval_ms"]) // TREND
    return {"seconds": ALL_S, "top": PAST_THREADS, "step_ms": min(step_ms, 3_600_000)}


def _past(table: dict[str, Any]) -> InitialHistory:
    threads = {
        int(thread["tid"]): tuple(float(each or 0) for each in thread["cpu_percent"]) for thread in table["threads"]
    }
    past = InitialHistory(tuple(map(float, table["cpu_percent"])), tuple(map(float, table["rss_kb"])), threads)
    if not all(map(isfinite, chain(past.cpu_percent, past.rss_kb, *threads.values()))):
        raise ValueError("what is no number to draw")
    return past


def _sample(body: bytes) -> Sample:
    metrics = parse_runtime_metrics(body)
    if isinstance(metrics, Unavailable):
        raise ExchangeError(metrics.reason)
    return Sample(time.time_ns() // 1_000_000, metrics, body)
