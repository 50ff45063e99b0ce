"""
Read a run back from disk.

`vitalsd.recording.run_files` has the files that belong to it. A run that is no longer written and has no end on record
has crashed.
"""

import json
from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from math import isinf
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

from typing_extensions import TypedDict

from vitalsd.contract.application import Application
from vitalsd.contract.host import HostFactsJson, RecordedHost
from vitalsd.contract.limits import HISTORY_GAUGES, LABEL_CHARACTERS
from vitalsd.contract.shapes import APP, PROGRAM, Count, Doc, Lazy, UtcTime
from vitalsd.contract.signals_page import NAME
from vitalsd.recording.hang_causes import HangCause
from vitalsd.recording.run_database import Tables, readable
from vitalsd.recording.run_files import disk_bytes, is_being_written, is_of
from vitalsd.recording.run_image import UnreadableRunError
from vitalsd.recording.scalars import SCALARS, snapshot_fields
from vitalsd.recording.segment import CHILD_NUMBERS, WAIT_STEP_NS, ChildIdentity, Segment, ThreadDeltas
from vitalsd.recording.series import MAX_EVENTS, MAX_MARKS, Event, EventKind, Mark, Record
from vitalsd.snapshot import MEMORY_PRESSURE_LEVELS, THERMAL_STATES, Identity, Snapshot, ThreadRoster
from vitalsd.text import iso

__all__ = ["UNKNOWN_END", "Run", "RunJson", "State", "UnreadableRunError", "describe", "read_run"]

SCALARS_BYTES = 8 * len(SCALARS)
"""Size of the scalars of one snapshot on disk, bytes."""
CONSTANTS = ("cpu_grain_ns", "thread_grain_ns", "thread_lag_ns", "source", "image", "reading", "cpu_count")
"""Fields of a snapshot that are the same in a whole segment, stored with it as JSON."""
MAX_TEXT = 16_384
"""Limit of a value in ``meta``, the constants of a segment or the detail of an event, characters."""
MAX_META = 100
"""Limit of the values in ``meta``; a run that vitalsd writes has 10."""
THREAD_BYTES = 32
"""Least size of a file for each of its threads, bytes: a real one takes 35, with its place in a segment."""
CHILD_BYTES = 24
"""Least size of a file for each of its children, bytes: a real one takes about 30."""
LEVELS = (("machine_memory_pressure_level", MEMORY_PRESSURE_LEVELS), ("machine_thermal_level", THERMAL_STATES))
"""Scalars that are an index, and what they are an index of."""
LARGEST = 2**63 - 1
"""Largest number that a run holds: that of a signed integer of 64 bits."""

State = Literal["running", "clean", "crashed"]

UNKNOWN_END = "the sidecar ended before the process or with it; how the process ended is not known"
"""`Run.ended` of a run without an end on record that another process recorded."""


class RunJson(TypedDict):
    """A run on disk."""

    id: str
    state: Annotated[State, Doc("crashed: it ended by a fatal signal or an error, and its last seconds are recorded.")]
    ended: Annotated[str | None, Doc("How it ended; null while it runs, or if it is not known.")]
    reported: Annotated[bool, Doc("Has gone into a bug report already.")]
    app: Annotated[str | None, APP]
    app_version: str | None
    platform: Annotated[str, Lazy("vitalsd.contract.metrics:Platform")]
    host: HostFactsJson
    pid: Count
    name: str
    program: Annotated[str, PROGRAM]
    started_at: UtcTime
    recorded_from: UtcTime | None
    recorded_to: UtcTime | None
    snapshots: Count
    size_bytes: Count


class Run(NamedTuple):
    """Describe a run on disk; `read_run` returns its content too."""

    id: str
    path: Path
    identity: Identity
    state: State
    ended: str | None
    """How it ended, in words; ``None`` while it runs or if that is not known."""
    first_wall_ns: int | None
    last_wall_ns: int | None
    snapshots: int
    reported: bool
    """Whether a bug report contains it."""
    size_bytes: int
    application: Application = Application()
    """The application that the client named."""
    host: RecordedHost = RecordedHost()
    """The machine on which it was recorded."""

    def to_json(self) -> RunJson:
        """Return it as ``GET /runs`` and ``vitalsd runs --json`` list it."""
        return {
            "id": self.id,
            "state": self.state,
            "ended": self.ended,
            "reported": self.reported,
            "app": self.application.app,
            "app_version": self.application.app_version,
            "platform": self.identity.platform,
            "host": self.host.to_json(),
            "pid": self.identity.pid,
            "name": self.identity.name,
            "program": self.identity.program,
            "started_at": iso(self.identity.started_unix_ns),
            "recorded_from": None if self.first_wall_ns is None else iso(self.first_wall_ns),
            "recorded_to": None if self.last_wall_ns is None else iso(self.last_wall_ns),
            "snapshots": self.snapshots,
            "size_bytes": self.size_bytes,
        }


def read_run(path: Path) -> tuple[Run, Record]:
    """
    Return a run and its record, exact to the last snapshot that was written. Nothing on disk is changed.

    Raises:
        UnreadableRunError: vitalsd did not write it, or it is damaged.
        OSError: it cannot be read.
    """
    with readable(path) as tables:
        return _described(tables, path), _record(tables)


def describe(path: Path) -> Run:
    """
    Return what a listing shows of a run, without reading all of it.

    Nothing on disk is changed. Raise as `read_run` does.
    """
    with readable(path) as tables:
        return _described(tables, path)


def _meta(tables: Tables) -> dict[str, str]:
    found = dict(_typed(row, (str, str)) for row in tables.rows("SELECT key, value FROM meta LIMIT ?", MAX_META))
    return {key: _text(value) for key, value in found.items()}


def _text(value: str) -> str:
    if len(value) > MAX_TEXT:
        raise ValueError(f"a text of {len(value)} characters; a run has at most {MAX_TEXT}")
    return value


def _typed(row: Sequence[Any], kinds: Sequence[type]) -> Any:
    """Return `row` if its values have the types `kinds`: a column of SQLite takes any type. Raise `TypeError`."""
    if tuple(map(type, row)) != tuple(kinds):
        raise TypeError(f"{row!r:.80} where there should be {', '.join(kind.__name__ for kind in kinds)}")
    return row


def _check_sizes(*numbers: int) -> None:
    if not all(0 <= number <= LARGEST for number in numbers):
        raise ValueError("a number that is negative or too large")


def _identity(meta: dict[str, str]) -> Identity:
    identity = Identity(**json.loads(meta["identity"]))
    _typed(identity, (str, int, str, str, int, int, str))
    _check_sizes(identity.pid, identity.start_key, identity.started_unix_ns)
    return identity


def _described(tables: Tables, path: Path) -> Run:
    meta = _meta(tables)
    # Not count(*): SQLite executes it in one instruction, so the limit of instructions would not bound it.
    (count,) = tables.row("SELECT count(rowid) FROM frame")
    wall = SCALARS.index("wall_ns")
    scalars = "SELECT substr(numbers, 1, ?) FROM frame WHERE rowid = (SELECT {}(rowid) FROM frame)"
    first_wall_ns, last_wall_ns = (
        None if row is None else _array("q", row[0])[wall]
        for row in (tables.row(scalars.format(which), SCALARS_BYTES) for which in ("min", "max"))
    )
    state: State = "clean"
    identity, ended = _identity(meta), meta.get("ended")
    if ended is None:
        state = "running" if is_being_written(path) else "crashed"
        if state == "crashed" and not is_of(path, f"{identity.start_id}-{identity.pid}"):
            ended = UNKNOWN_END
    elif "crashed" in meta:
        state = "crashed"
    return Run(
        id=path.stem,
        path=path,
        identity=identity,
        state=state,
        ended=ended,
        first_wall_ns=first_wall_ns,
        last_wall_ns=last_wall_ns,
        snapshots=count,
        reported="reported" in meta,
        size_bytes=disk_bytes(path),
        application=Application.checked(meta.get("app"), meta.get("app_version")),
        host=RecordedHost.read(json.loads(meta.get("host", "{}"))),
    )


def _record(tables: Tables) -> Record:
    meta = _meta(tables)
    interval_ns, retention_ns = int(meta["interval_ns"]), int(meta["retention_ns"])
    _check_sizes(interval_ns, retention_ns)
    record = Record(_identity(meta), interval_ns=interval_ns, retention_ns=retention_ns)
    threads: dict[int, tuple[int, int, str]] = {}
    for thread_id, *thread in tables.rows("SELECT rowid, tid, birth, name FROM thread"):
        threads[thread_id] = tuple(_typed(thread, (int, int, str)))
        if len(threads) * THREAD_BYTES > tables.size_bytes:
            raise ValueError("it has more threads than fit into it")
    children: dict[int, list[ChildIdentity]] = {}
    for number, (segment_id, *child) in enumerate(
        tables.rows("SELECT segment, pid, birth, name, found_ns FROM child ORDER BY rowid"), 1
    ):
        children.setdefault(segment_id, []).append(ChildIdentity(*_typed(child, (int, int, str, int))))
        if number * CHILD_BYTES > tables.size_bytes:
            raise ValueError("it has more children than fit into it")
    # The key of every table here is its rowid: SQLite sorts nothing, and refuses a table that has none.
    frames = tables.rows("SELECT segment, numbers, moved, code, children, gauges FROM frame ORDER BY rowid")
    newest = 0
    for segment_id, group in groupby(frames, key=lambda row: row[0]):
        if segment_id <= newest:  # a hostile file could demand thousands of copies of one segment
            raise ValueError(f"snapshots of segment {segment_id!r:.20} after those of {newest}")
        newest = segment_id
        row = tables.row("SELECT threads, cpu_ns, waits, constants FROM segment WHERE rowid = ?", segment_id)
        if row is not None:
            record.restore(_segment(row, group, threads, children.get(segment_id, ())))
    for row in _newest(tables, "wall_ns, monotonic_ns, label FROM mark", MAX_MARKS):
        mark = Mark(*_typed(row, (int, int, str)))
        if len(mark.label) > LABEL_CHARACTERS:
            raise ValueError(f"a label of {len(mark.label)} characters; it has at most {LABEL_CHARACTERS}")
        record.marks.append(mark)
    columns = "wall_ns, monotonic_ns, kind, detail, duration_ns, heartbeat, cause, ongoing"
    for row in _newest(tables, f"{columns} FROM event", MAX_EVENTS):
        record.put_hang(_event(row)) if row[2] == "hang" else record.events.append(_event(row))
    return record


def _event(row: Sequence[Any]) -> Event:
    kinds = (int, str, str) if row[2] == "hang" else (type(None),) * 3
    event = Event(*_typed(row, (int, int, str, str, *kinds, int)))
    if event.kind not in get_args(EventKind):
        raise ValueError(f"an event {event.kind!r:.80}")
    if event.duration_ns is not None:
        _check_sizes(event.duration_ns)
        if event.cause not in get_args(HangCause) or not NAME.fullmatch(event.heartbeat or ""):
            raise ValueError(f"a hang {event!r:.80}")
    return event._replace(detail=_text(event.detail), ongoing=bool(event.ongoing))


def _newest(tables: Tables, columns: str, count: int) -> list[Any]:
    return list(tables.rows(f"SELECT {columns} ORDER BY rowid DESC LIMIT ?", count))[::-1]


def _segment(
    row: Sequence[Any],
    frames: Iterable[Sequence[Any]],
    threads: Mapping[int, tuple[int, int, str]],
    children: Sequence[ChildIdentity],
) -> Segment:
    """Return the segment in `row` with the snapshots of `frames`."""
    ids, cpu_ns, base_waits, constants = row
    segment: Segment | None = None
    for _, numbers, moved, code, child_numbers, values in frames:
        scalars, deltas = _frame(numbers, moved, code)
        if segment is None:
            keys = [threads[thread_id] for thread_id in _array("I", ids)]
            waits = None if base_waits is None else _array("Q", base_waits)
            known = json.loads(_text(constants))
            gauge_names = _gauge_names(known.pop("gauges"))
            segment = Segment(_first_snapshot(scalars, keys, _array("Q", cpu_ns), waits, known), gauge_names)
            for child in children:
                segment.add_child(child)
        _check(segment, scalars, deltas)
        gauges = _gauges(values, len(segment.gauge_names))
        segment.add(scalars, deltas, _children(child_numbers, len(children)), gauges)
    assert segment is not None
    return segment


def _frame(numbers: bytes, moved: int | None, code: str) -> tuple["array[int]", ThreadDeltas]:
    """Return the scalars and deltas of one frame. Raise `ValueError` or `TypeError`."""
    named = SCALARS_BYTES + 4 * (moved or 0)
    indexes = None if moved is None else _array("I", numbers[SCALARS_BYTES:named])
    used_code, waited_code = code[:1], code[1:]
    used_until = len(numbers)
    if waited_code:
        _array(used_code, b"")  # checks the kind
        _array(waited_code, b"")
        used_size, waited_size = array(used_code).itemsize, array(waited_code).itemsize
        used_until = named + (len(numbers) - named) // (used_size + waited_size) * used_size
    used_ns = _array(used_code, numbers[named:used_until])
    waits = _array(waited_code, numbers[used_until:]) if waited_code else None
    return _array("q", numbers[:SCALARS_BYTES]), ThreadDeltas(indexes, used_ns, waits)


def _children(content: bytes | None, known: int) -> "array[int] | None":
    """Return the integers of the children of one frame. Raise `ValueError` for what cannot be such."""
    if content is None:
        return None
    numbers = _array("q", content)
    if len(numbers) % CHILD_NUMBERS or min(numbers, default=0) < 0:
        raise ValueError("a child of another length, or with a negative number")
    if max(numbers[::CHILD_NUMBERS], default=-1) >= known:
        raise ValueError("a snapshot of more children than there are")
    return numbers


def _gauge_names(found: Any) -> tuple[str, ...]:
    """Return the names of the gauges of a segment. Raise `ValueError` or `TypeError` for what cannot be such."""
    names = tuple(found)
    if len(names) > HISTORY_GAUGES or len(set(names)) < len(names) or not all(map(NAME.fullmatch, names)):
        raise ValueError(f"gauges {found!r:.80}")
    return names


def _gauges(content: bytes | None, count: int) -> "array[float] | None":
    """Return the values of the gauges of one frame. Raise `ValueError` for what cannot be such."""
    if content is None:
        return None
    values = array("d", content)
    if len(values) != count or any(map(isinf, values)):
        raise ValueError("a snapshot with other gauges than its segment has, or with an infinite one")
    return values


def _check(segment: Segment, scalars: "array[int]", deltas: ThreadDeltas) -> None:
    """Raise `ValueError` for what cannot be a snapshot of that segment."""
    threads = len(segment.base_cpu_ns)
    count = threads if deltas.indexes is None else len(deltas.indexes)
    if len(scalars) != len(SCALARS) or len(deltas.used_ns) != count:
        raise ValueError("a snapshot of another length")
    if deltas.waits is not None and (segment.base_waits is None or len(deltas.waits) != count):
        raise ValueError("a snapshot with other waits than it has threads")
    if deltas.indexes and max(deltas.indexes) >= threads:
        raise ValueError("a snapshot of more threads than there are")
    for name, texts in LEVELS:
        if scalars[SCALARS.index(name)] >= len(texts):
            raise ValueError(f"a {name} of {scalars[SCALARS.index(name)]}")


def _first_snapshot(
    scalars: "array[int]",
    keys: list[tuple[int, int, str]],
    cpu_ns: "array[int]",
    waits: "array[int] | None",
    constants: dict[str, Any],
) -> Snapshot:
    if len(cpu_ns) != len(keys) or (waits is not None and len(waits) != len(keys)):
        raise ValueError("threads without CPU time")
    _typed([constants[name] for name in CONSTANTS], (int, int, int, str, str, int, int))
    _check_sizes(*(constants[name] for name in CONSTANTS[:3]), constants["cpu_count"])
    roster = ThreadRoster(*zip(*keys, strict=True)) if keys else ThreadRoster()
    fields = snapshot_fields(scalars)
    wait_ns = None if waits is None else [steps * WAIT_STEP_NS for steps in waits]
    return Snapshot(**fields, roster=roster, thread_cpu_ns=cpu_ns, thread_wait_ns=wait_ns, **constants)


def _array(code: str, content: bytes) -> "array[int]":
    if code not in ("H", "I", "Q", "q"):
        raise ValueError(f"numbers of a kind {code!r:.80}")
    return array(code, content)
