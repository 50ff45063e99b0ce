"""
Where the live view has its numbers from: the sidecar that watches the target, or else the target itself.

A sidecar has been recording, so there is a past to show and the marks of others; and two lookers cost the
target no more than one. When it goes, the view goes on without it, and when it comes back, with it.
"""

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

from vitalsd.model import Measured, parse_runtime_metrics
from vitalsd.recorder import Recorder, Recording
from vitalsd.snapshot import measure
from vitalsd.sources import Source, SourceError, TargetGone
from vitalsd.wire import encode
from vitalsd_client.exchange import ExchangeError
from vitalsd_client.places import NoSidecar, Sidecar, locate

__all__ = ["Ended", "Feed", "News", "Note", "Past", "Sample", "Subject", "Trouble"]

LOOK_AGAIN_S = 2.0
"""While sampling directly: between two looks for a sidecar of the same target."""
PAST_S = 300
PAST_THREADS = 64
NOTES_S = 10
PATIENCE_S = 2.0
"""For an answer, beyond the window that may have to be waited for."""
SHUN_S = 30.0
"""A sidecar that lives and does not answer is left alone so long, where the target can be read without it."""


@dataclass(frozen=True, slots=True)
class Subject:
    """Whose numbers follow."""

    pid: int
    name: str
    start_id: str
    via: str
    """Where they come from, in words."""


@dataclass(frozen=True, slots=True)
class Past:
    """What was recorded before, oldest first: percent, KiB, and per thread id percent."""

    cpu_percent: tuple[float, ...]
    rss_kb: tuple[float, ...]
    threads: dict[int, tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class Sample:
    """One window; `body` is the answer of ``/metrics`` that `metrics` was read from."""

    wall_ms: int
    metrics: Measured
    body: bytes


@dataclass(frozen=True, slots=True)
class Note:
    """A mark or an event of the record; `kind` is ``mark`` or that of the event."""

    wall_ms: int
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Trouble:
    """There are no numbers for now, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The target has exited."""

    reason: str


News = Subject | Past | Sample | Note | Trouble | Ended


class Feed:
    """
    The news of one target, for as long as it lives.

    Args:
        find: the pid of the target, asked for at the start and after every loss. Raises `SourceError`.
        open_source: opens a pid. Raises `SourceError`.
        interval_s: between two samples.
        first_s: until the first one; a screen that stays empty for long looks broken.
        url: ask this sidecar and nobody else.
        pid: with `url`: about this process; ``None``: about the sidecar's own target.
        follow: when the target has exited, wait for the next one.
        sidecars: look for one that watches the target.
    """

    def __init__(
        self,
        find: Callable[[], int],
        open_source: Callable[[int], Source],
        *,
        interval_s: float = 1.0,
        first_s: float = 60.0,
        url: str | None = None,
        pid: int | None = None,
        follow: bool = False,
        sidecars: bool = True,
    ) -> None:
        self.interval_s = interval_s
        self.follow = follow
        self._find = find
        self._open_source = open_source
        self._first_s = min(first_s, interval_s)
        self._url = url
        self._pid = pid
        self._sidecars = sidecars
        self._stopped = threading.Event()
        self._session: _Remote | _Direct | None = None
        self._subject: Subject | None = None
        self._shunned: tuple[Sidecar, float] | None = None

    def stop(self) -> None:
        """End `news` at its next wait; from any thread."""
        self._stopped.set()

    def mark(self, label: str) -> str | None:
        """
        Put a label on the record's clock; from any thread. It may take `PATIENCE_S`.

        Returns:
            Why it could not be done; ``None`` if it was.
        """
        session = self._session
        if session is None:
            return "there is nothing to mark yet"
        try:
            session.mark(label)
        except (ValueError, ExchangeError) as error:
            return str(error)
        return None

    def news(self) -> Iterator[News]:
        """
        All that there is to tell, waiting in between; to be called once.

        Raises:
            SourceError, NoSidecar, ExchangeError: there is nothing to tell from the start.
        """
        while not self._stopped.is_set():
            self._session = None
            try:
                with closing(self._open()) as self._session:
                    for each in self._session.news(self._pause):
                        if isinstance(each, Subject):
                            if self._is_another(each):
                                raise TargetGone(f"process {each.pid} has exited; its pid is another process now")
                            self._subject = each
                        yield each
            except TargetGone as error:
                if self._subject is None:
                    raise
                yield Ended(str(error))
                if not self.follow:
                    return
            except (SourceError, NoSidecar, ExchangeError) as error:
                if isinstance(self._session, _Remote) and self._url is None:
                    self._shunned = self._session.sidecar, time.monotonic() + SHUN_S
                    continue  # at once, without it
                if self._subject is None:
                    raise
                yield Trouble(str(error))
            else:
                continue
            if not self._pause(time.monotonic() + self.interval_s):
                return

    def _is_another(self, found: Subject) -> bool:
        return not self.follow and self._subject is not None and self._subject.start_id != found.start_id

    def _open(self) -> "_Remote | _Direct":
        if self._url is not None:
            return _Remote(locate(url=self._url, pid=self._pid)[0], self._url, self.interval_s)
        pid = self._find()
        if (sidecar := self._watching(pid)) is not None:
            return _Remote(sidecar, "a sidecar", self.interval_s)
        return _Direct(self._open_source(pid), self.interval_s, self._first_s, lambda: self._watching(pid) is not None)

    def _watching(self, pid: int) -> Sidecar | None:
        with suppress(NoSidecar):
            if self._sidecars:
                # Those that watch another process could be asked as well, but have no past of this one.
                watching = (each for each in locate(pid=pid) if each.pid is None)
                return next((each for each in watching if not self._is_shunned(each)), None)
        return None

    def _is_shunned(self, sidecar: Sidecar) -> bool:
        return self._shunned is not None and self._shunned[0] == sidecar and time.monotonic() < self._shunned[1]

    def _pause(self, until: float) -> bool:
        """Wait until that monotonic time; False if it is over."""
        return not self._stopped.wait(max(0.0, until - time.monotonic()))


class _Direct:
    """Reads the target; the record is in memory alone, for its events and for marks."""

    def __init__(self, source: Source, interval_s: float, first_s: float, relieved: Callable[[], bool]) -> None:
        self._source = source
        self._interval_s = interval_s
        self._first_s = first_s
        self._relieved = relieved
        self._recorder = Recorder(source.identity(), Recording(interval_s, retention_s=PAST_S, max_bytes=4 << 20))
        self._told = _Told()

    def close(self) -> None:
        self._source.close()

    def mark(self, label: str) -> None:
        self._recorder.mark(label)

    def news(self, pause: Callable[[float], bool]) -> Iterator[News]:
        identity = self._source.identity()
        yield Subject(identity.pid, identity.name, identity.start_id, "sampled directly")
        last = self._source.snapshot()
        self._recorder.observe(last)
        due = time.monotonic() + self._first_s
        look_again = due + LOOK_AGAIN_S
        while pause(due):
            due = max(due + self._interval_s, time.monotonic())
            try:
                now = self._source.snapshot()
            except SourceError as error:
                self._recorder.failed(error)
                yield from self._notes()
                raise
            self._recorder.observe(now)
            yield from self._notes()
            if now.monotonic_ns > last.monotonic_ns:
                requested_ms = round(self._interval_s * 1000)
                yield _sample(encode(measure(last, now), identity, requested_ms=requested_ms))
                last = now
            if time.monotonic() >= look_again:
                if self._relieved():
                    return
                look_again = time.monotonic() + LOOK_AGAIN_S

    def _notes(self) -> list[Note]:
        record = self._recorder.record
        return self._told.fresh(
            [Note(mark.wall_ns // 1_000_000, "mark", mark.label) for mark in list(record.marks)]
            + [Note(event.wall_ns // 1_000_000, event.kind, event.detail) for event in list(record.events)]
        )


class _Remote:
    """Asks a sidecar for what its recorder has; each time on a connection of its own, so that nothing is held open."""

    def __init__(self, sidecar: Sidecar, via: str, interval_s: float) -> None:
        self.sidecar = sidecar
        self._via = via
        self._interval_s = interval_s
        self._told = _Told()

    def close(self) -> None:
        """Nothing is held."""

    def mark(self, label: str) -> None:
        body = json.dumps({"label": label}).encode()
        self._ask("/marks", {}, method="POST", body=body, headers={"Content-Type": "application/json"})

    def news(self, pause: Callable[[float], bool]) -> Iterator[News]:
        try:
            yield from self._news(pause)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ExchangeError(f"this is no answer of a sidecar: {type(error).__name__}") from None

    def _news(self, pause: Callable[[float], bool]) -> Iterator[News]:
        who = {} if self.sidecar.pid is None else {"pid": self.sidecar.pid}
        recorded = not who and self._json("/info").get("recorder") is not None
        if recorded:
            table = self._json("/history", {"seconds": PAST_S, "top": PAST_THREADS})
            yield self._subject(table["target"])
            yield _past(table)
            yield from self._notes(table)
        else:
            yield self._subject(self._json("/metrics", {"window_ms": 10, "detail": "full", **who})["target"])
        window_ms = min(60_000, max(10, round(self._interval_s * 1000)))
        uptime_s = -1.0
        due = time.monotonic()
        while True:
            sample = _sample(self._ask("/metrics", {"window_ms": window_ms, "mode": "trailing", **who}))
            now_s = sample.metrics.process.uptime_secs
            if now_s < uptime_s:
                return  # another process: the sidecar has gone on to the next one of that name
            if now_s > uptime_s:
                yield sample
            if recorded:
                yield from self._notes(self._json("/history", {"seconds": NOTES_S, "top": 0}))
                # No news: the recorder is slower than we are, or it has stopped.
                if now_s == uptime_s and (ended := (self._json("/info")["recorder"] or {}).get("ended")):
                    raise TargetGone(ended)
            uptime_s = now_s
            due = max(due + self._interval_s, time.monotonic())
            if not pause(due):
                return

    def _subject(self, target: dict[str, Any]) -> Subject:
        return Subject(int(target["pid"]), str(target["name"]), str(target["start_id"]), self._via)

    def _notes(self, table: dict[str, Any]) -> list[Note]:
        return self._told.fresh(
            [Note(int(mark["time_ms"]), "mark", str(mark["label"])) for mark in table["marks"]]
            + [Note(int(event["time_ms"]), str(event["kind"]), str(event["detail"])) for event in table["events"]]
        )

    def _json(self, path: str, query: dict[str, Any] | None = None) -> dict[str, Any]:
        found = json.loads(self._ask(path, query or {}))
        if not isinstance(found, dict):
            raise ValueError(f"{path} answered no object")
        return found

    def _ask(self, path: str, query: dict[str, Any], **options: Any) -> bytes:
        deadline = time.monotonic() + self._interval_s + PATIENCE_S
        answer = self.sidecar.get(path, query, deadline=deadline, **options)
        if answer.status in (200, 201):
            return answer.body
        try:
            told = json.loads(answer.body)
            reason = str(told.get("reason") if told.get("available") is False else told["detail"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            reason = f"{path} was answered with status {answer.status}"
        if answer.status == 410:
            raise TargetGone(reason)
        raise ExchangeError(reason)


class _Told:
    """Which notes have been told already, so that looking back twice tells nothing twice."""

    def __init__(self) -> None:
        self._seen: deque[Note] = deque(maxlen=4096)

    def fresh(self, notes: list[Note]) -> list[Note]:
        fresh = sorted((note for note in notes if note not in self._seen), key=lambda note: note.wall_ms)
        self._seen.extend(fresh)
        return fresh


def _past(table: dict[str, Any]) -> Past:
    threads = {
        int(thread["tid"]): tuple(float(each or 0) for each in thread["cpu_percent"]) for thread in table["threads"]
    }
    return Past(tuple(map(float, table["cpu_percent"])), tuple(map(float, table["rss_kb"])), threads)


def _sample(body: bytes) -> Sample:
    metrics = parse_runtime_metrics(body)
    if not isinstance(metrics, Measured):
        raise ExchangeError(metrics.reason)
    return Sample(time.time_ns() // 1_000_000, metrics, body)
