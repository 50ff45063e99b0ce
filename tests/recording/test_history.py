"""The table over time: true to the snapshots, in JSON and CSV, and readable again."""

import csv
import io
import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recording.test_series import record_of
from support.fake_process import IDENTITY, SECOND_NS, Process, lives
from vitalsd.contract.limits import HISTORY_CELLS, HISTORY_ROWS
from vitalsd.recording.history import history
from vitalsd.recording.history_import import parse_json, read_history
from vitalsd.recording.series import Event, Mark, Record
from vitalsd.snapshot import Snapshot


@given(lives())
def test_history_rows_are_differences_of_snapshots(snapshots: list[Snapshot]) -> None:
    """A row has the CPU burnt since the snapshot before, of the process and, unless it executed, of each thread."""
    table = history(record_of(snapshots), top=10_000)
    pairs = list(pairwise(snapshots))
    assert table.cpu_ns == [max(0, b.cpu_ns - a.cpu_ns) for a, b in pairs]
    assert table.elapsed_ns == [b.monotonic_ns - a.monotonic_ns for a, b in pairs]
    assert table.rss_bytes == [b.rss_bytes for _, b in pairs]
    assert table.thread_count == [len(b.roster) for _, b in pairs]
    for row, (a, b) in enumerate(pairs):
        before = dict(zip(zip(a.roster.tids, a.roster.births, strict=True), a.thread_cpu_ns, strict=True))
        if a.image != b.image:
            assert all(t.cpu_ns[row] is None for t in table.threads)
            continue
        expected = sorted(
            max(0, ns - before.get(key, 0))
            for key, ns in zip(zip(b.roster.tids, b.roster.births, strict=True), b.thread_cpu_ns, strict=True)
        )
        assert sorted(ns for t in table.threads if (ns := t.cpu_ns[row]) is not None) == expected


@given(lives(), st.integers(0, 5))
def test_history_top_keeps_the_busiest_threads(snapshots: list[Snapshot], top: int) -> None:
    """`top` cuts the list of threads after the ones that burnt most."""
    record = record_of(snapshots)
    every = history(record, top=10_000).threads
    shown = history(record, top=top).threads
    assert [t.total_ns for t in shown] == sorted((t.total_ns for t in every), reverse=True)[:top]


@given(lives(), st.integers(1, 30 * SECOND_NS))
def test_history_downsampled_keeps_the_total_cpu_time(snapshots: list[Snapshot], step_ns: int) -> None:
    """Down-sampling changes how the CPU time is divided over rows, not how much there is."""
    record = record_of(snapshots)
    fine, coarse = history(record), history(record, step_ns=step_ns)
    assert sum(coarse.elapsed_ns) == sum(fine.elapsed_ns)
    assert sum(coarse.cpu_ns) == sum(fine.cpu_ns)
    assert all(ns >= step_ns for ns in coarse.elapsed_ns[:-1])


def test_history_row_of_an_exec_is_null() -> None:
    """The thread that called exec has the id of the main thread afterwards, and its CPU time."""
    process = Process({(1, 1): ("main", 7), (2, 1): ("worker", 4 * SECOND_NS)})
    snapshots = [process.snapshot()]
    for _ in range(2):
        process.pass_time(SECOND_NS, [1000])
        snapshots.append(process.snapshot())
    process.exited_ns += process.threads[1, 1][1]
    process.threads = {(1, 1): ("main", 4 * SECOND_NS)}
    process.image += 1
    for _ in range(2):
        process.pass_time(SECOND_NS, [2000])
        snapshots.append(process.snapshot())
    table = history(record_of(snapshots), top=10)
    assert {thread.tid: thread.cpu_ns for thread in table.threads} == {
        1: [1000, 1000, None, 2000],
        2: [0, 0, None, None],
    }
    assert {thread.tid: thread.total_ns for thread in table.threads} == {1: 4000, 2: 0}
    assert sum(table.cpu_ns) == 6000
    merged = history(record_of(snapshots), top=10, step_ns=2 * SECOND_NS)
    assert {thread.tid: thread.cpu_ns for thread in merged.threads} == {1: [2000, None], 2: [0, None]}


def test_history_row_that_violates_an_invariant_is_null() -> None:
    """A thread that used more than its process, or idle threads of a process that ran; the others have theirs."""
    process = Process({(1, 1): ("main", 0), (2, 1): ("worker", 0)})
    snapshots = [process.snapshot()]
    for burnt_ns, unseen_ns in (([5000, 10_000], 0), ([0, SECOND_NS], -SECOND_NS), ([0, 0], 50_000), ([3, 4], 0)):
        process.pass_time(SECOND_NS, burnt_ns)
        process.exited_ns += unseen_ns
        snapshots.append(process.snapshot())
    table = history(record_of(snapshots), top=10)
    assert {thread.tid: thread.cpu_ns for thread in table.threads} == {
        1: [5000, 0, None, 3],
        2: [10_000, None, None, 4],
    }
    assert table.cpu_ns == [15_000, 0, 50_000, 7]


def test_history_row_across_a_reread_of_counters_is_null() -> None:
    """No difference spans that, in the record and in the file of a run."""
    process = Process()
    snapshots = []
    for second in range(4):
        process.pass_time(SECOND_NS, [1000])
        snapshots.append(replace(process.snapshot(), reading=int(second > 1)))
    (thread,) = history(record_of(snapshots)).threads
    assert thread.cpu_ns == [1000, None, 1000]


def test_history_since_a_time_has_only_later_rows() -> None:
    """Only rows that end after the given time are shown, the first of them whole."""
    process, snapshots = Process(), []
    for _ in range(20):
        process.pass_time(SECOND_NS, [1000])
        snapshots.append(process.snapshot())
    table = history(record_of(snapshots), since_ns=snapshots[-5].monotonic_ns)
    assert table.elapsed_ns == [SECOND_NS] * 5


def test_history_mark_before_the_first_snapshot_is_kept() -> None:
    """A mark on a sidecar that is just ready may be before its first snapshot; the long past is not shown."""
    process, snapshots = Process(), []
    for _ in range(4):
        process.pass_time(SECOND_NS, [1000])
        snapshots.append(process.snapshot())
    record, first = record_of(snapshots), snapshots[0]
    for early_ns, label in ((100 * SECOND_NS, "long ago"), (1000, "early"), (-SECOND_NS, "within")):
        record.marks.append(Mark(first.wall_ns - early_ns, first.monotonic_ns - early_ns, label))
    assert [mark.label for mark in history(record).marks] == ["early", "within"]


@pytest.mark.parametrize("count", [0, 1])
def test_history_of_one_snapshot_has_no_row(count: int) -> None:
    """A row needs two snapshots."""
    table = history(record_of([Process().snapshot()] * count))
    assert json.loads(table.to_json())["time_ms"] == []
    assert len(table.to_csv().splitlines()) == 1


def test_history_of_a_reused_tid_has_two_threads() -> None:
    """Each with its name and what it burnt."""
    process = Process()
    snapshots = [process.snapshot()]
    for birth, name in ((7, "first"), (8, "second")):
        process.threads[4243, birth] = name, 0
        snapshots.append(process.snapshot())
        for _ in range(4):
            process.pass_time(SECOND_NS, [0, birth * 10_000_000])
            snapshots.append(process.snapshot())
        process.end_thread(4243, birth)
        process.pass_time(SECOND_NS)
    table = history(record_of(snapshots), top=10)
    back = history(read_history(table.to_json()), top=10)
    assert {(each.name, each.total_ns) for each in back.threads if each.tid == 4243} == {
        ("first", 280_000_000),
        ("second", 320_000_000),
    }
    assert [(each.tid, each.name) for each in back.threads] == [(each.tid, each.name) for each in table.threads]


def test_history_read_back_has_the_start_of_the_target_in_ms() -> None:
    """What a replay says is what the report says."""
    record = record_of([Process().snapshot()])
    for ms in range(1000):
        record.identity = record.identity._replace(started_unix_ns=1_764_185_480_000_000_000 + ms * 1_000_000)
        body = history(record).to_json()
        assert json.loads(history(read_history(body)).to_json())["target"] == json.loads(body)["target"]


@given(lives(max_steps=40))
def test_history_json_read_back_is_equal(snapshots: list[Snapshot]) -> None:
    """A record rebuilt from the JSON gives the same table, to the digits that the JSON has."""
    table = json.loads(history(record_of(snapshots), top=10_000).to_json())
    again = json.loads(history(read_history(json.dumps(table).encode()), top=10_000).to_json())
    for column in ("rss_kb", "time_ms"):
        assert again[column] == table[column]
    for row, count in enumerate(table["thread_count"]):
        executed = all(t["cpu_percent"][row] is None for t in table["threads"])  # no figure says which threads lived
        assert executed or again["thread_count"][row] == count
    assert again["cpu_percent"] == pytest.approx(table["cpu_percent"], abs=0.002, rel=1e-4)
    assert sum(len(t["cpu_percent"]) for t in again["threads"]) <= sum(len(t["cpu_percent"]) for t in table["threads"])


@pytest.mark.parametrize("hours", [-1, 1])
def test_history_marks_keep_their_row_after_a_clock_step(hours: int) -> None:
    """The monotonic clock, which cannot be set, decides the row; a replay of the table has it there too."""
    process, snapshots = Process(), []
    for second in range(10):
        snapshots.append(process.snapshot())
        if second > 5:
            snapshots[-1].wall_ns += hours * 3600 * SECOND_NS
        process.pass_time(SECOND_NS, [0])
    record = record_of(snapshots)
    half_ns = SECOND_NS // 2
    for at in (snapshots[3], snapshots[7]):
        record.marks.append(Mark(at.wall_ns - half_ns, at.monotonic_ns - half_ns, "F12"))
    record.events.append(Event(snapshots[9].wall_ns + half_ns, snapshots[9].monotonic_ns + half_ns, "exited", "it has"))
    for table in (history(record), history(read_history(history(record).to_json()))):
        rows = list(csv.DictReader(io.StringIO(table.to_csv().decode())))
        assert [i for i, row in enumerate(rows) if row["marks"]] == [2, 6]
        assert [i for i, row in enumerate(rows) if row["events"]] == [8]


def test_history_read_back_adds_no_sleep_and_no_thread_time() -> None:
    """A step of the wall clock is no sleep, and what threads burnt that are not shown is the process's alone."""
    process, snapshots = Process(), []
    process.threads[4243, 7] = "ends", 0
    for second in range(10):
        snapshots.append(process.snapshot())
        if second == 5:
            process.end_thread(4243, 7)
        if second > 5:
            snapshots[-1].wall_ns += 3600 * SECOND_NS
        process.pass_time(SECOND_NS, [100_000_000] * len(process.threads))
    back = read_history(history(record_of(snapshots), top=1).to_json())
    m = back.window(8000)
    assert m is not None
    assert (m.suspended_ns, m.exited_ns) == (0, 0)
    assert m.cpu_ns == m.living_ns + m.unattributed_ns
    assert not any("slept" in warning for warning in m.warnings)


def test_history_of_the_last_seconds_excludes_older_marks() -> None:
    """Of its last seconds, those from before them are no part."""
    process = Process()
    record = Record(IDENTITY, interval_ns=SECOND_NS, retention_ns=2**62, max_bytes=2**40)
    for second in range(20):
        snapshot = process.snapshot()
        record.append(snapshot)
        if second % 10 == 5:
            record.add_event("missed", f"at {second}", at=snapshot)
            record.marks.append(Mark(snapshot.wall_ns, snapshot.monotonic_ns, f"at {second}"))
        process.pass_time(SECOND_NS, [0])
    back = read_history(history(record).to_json())
    assert back.last is not None
    since = history(back, since_ns=back.last.monotonic_ns - 8 * SECOND_NS)
    assert [mark.label for mark in since.marks] == [event.detail for event in since.events] == ["at 15"]


@pytest.mark.parametrize(
    "damage",
    [
        {"events": [{"time_ms": 1, "kind": {}, "detail": ""}]},
        {"events": [{"time_ms": 1, "kind": "surprised", "detail": ""}]},
        {"time_ms": ["x" * 1000]},
        {"rss_kb": [[]]},
        {"cpu_percent": [float("inf")]},
    ],
)
def test_history_damaged_is_refused(damage: dict[str, Any]) -> None:
    """What others may have put into a report that is replayed."""
    process = Process()
    record = record_of([process.snapshot()])
    process.pass_time(SECOND_NS, [0])
    record.append(process.snapshot())
    table = json.loads(history(record).to_json())
    with pytest.raises(ValueError, match="not a history"):
        read_history(json.dumps(table | damage).encode())


@given(
    st.one_of(
        st.binary(), st.recursive(st.none() | st.integers() | st.text(), st.lists).map(lambda v: json.dumps(v).encode())
    )
)
def test_history_of_other_content_raises_only_value_error(body: bytes) -> None:
    """What is not a history raises ValueError and nothing else."""
    with pytest.raises(ValueError, match="not a history"):
        read_history(body)


def test_csv_with_hostile_names_has_the_columns_of_its_header() -> None:
    """Every row has the columns of the header; names and labels are escaped and never begin a cell as a formula."""
    process = Process(threads={(1, 1): ('=cmd|"/c calc"\n,\x1b[31m', 0)})
    record = record_of([process.snapshot()])
    process.pass_time(SECOND_NS, [SECOND_NS // 2])
    record.append(process.snapshot())
    record.add_event("executed", "another program: \x1b[31m", at=process.snapshot())
    text = history(record).to_csv().decode()
    head, row = csv.reader(io.StringIO(text))
    assert len(head) == len(row)
    assert row[head.index('1 =cmd|"/c calc"\\n,\\x1b[31m cpu_percent')] == "50.0"
    assert row[-1] == "executed: another program: \\x1b[31m"
    assert "\x1b" not in text


FORMULAS = [f"{lead}{sign}1+2" for lead in (";", "a;", "a,", "\t", "a\t", "\r", '";', "';", "") for sign in "=+-@"]


@pytest.mark.parametrize("text", FORMULAS)
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_cells_never_begin_a_formula_with_any_separator(text: str, delimiter: str) -> None:
    """Names, labels, kinds and details of events: spreadsheets of many locales separate cells by `;`."""
    process = Process(threads={(1, 1): (text, 0), (2, 1): ("plain", 0)})
    record = record_of([process.snapshot()])
    process.pass_time(SECOND_NS, [SECOND_NS // 2, 0])
    record.append(process.snapshot())
    last = process.snapshot()
    record.events.append(Event(last.wall_ns, last.monotonic_ns, text, text))  # type: ignore[arg-type] # of a replay
    record.marks.append(Mark(last.wall_ns, last.monotonic_ns, text))
    for line in csv.reader(io.StringIO(history(record).to_csv().decode()), delimiter=delimiter):
        for cell in line:
            assert not cell.lstrip(' \t\r\n"').startswith(("=", "+", "-", "@")), (cell, line)


def test_history_beyond_10000_rows_is_downsampled() -> None:
    """A long record comes in longer rows, at most 10 000, and no CPU time is lost by it."""
    process = Process()
    snapshots = [process.snapshot()]
    for _ in range(HISTORY_ROWS + 500):
        process.pass_time(10_000_000, [1000])
        snapshots.append(process.snapshot())
    table = history(record_of(snapshots))
    assert HISTORY_ROWS // 4 < len(table.elapsed_ns) <= HISTORY_ROWS
    assert sum(table.elapsed_ns) == snapshots[-1].monotonic_ns - snapshots[0].monotonic_ns
    assert sum(table.cpu_ns) == 1000 * (len(snapshots) - 1)


def test_history_beyond_the_cell_limit_is_truncated() -> None:
    """Rows times threads are bounded: the idlest threads go, and `truncated` is in the answer then alone."""
    process = Process(threads={(tid, 1): ("", 0) for tid in range(1, 3001)})
    snapshots = [process.snapshot()]
    for _ in range(400):
        process.pass_time(SECOND_NS, [5, 9])
        snapshots.append(process.snapshot())
    record = record_of(snapshots)
    table = history(record, top=20_000)
    assert table.truncated
    assert len(table.threads) == HISTORY_CELLS // len(snapshots)
    assert [thread.tid for thread in table.threads[:2]] == [2, 1]
    body = table.to_json()
    assert len(body) < 10 << 20
    assert json.loads(body)["truncated"] is True
    assert "truncated" not in json.loads(history(record, top=50).to_json())


def test_parse_json_of_many_small_values_is_refused() -> None:
    """A value takes up to 250 bytes once it is parsed: 24 MiB of brackets would be 600."""
    for value in (b"[],", b"{},", b"0,"):
        with pytest.raises(ValueError, match="more values than a history"):
            parse_json(b"[" + value * 2_000_000 + b"0]")


def test_parse_json_of_the_largest_history_is_read() -> None:
    """A million numbers, and 1000 marks of nothing but brackets and commas."""
    cells = ",".join(["100.123"] * 10_000)
    threads = ",".join(f'{{"tid":{tid},"name":"a,b[c]","cpu_percent":[{cells}]}}' for tid in range(100))
    marks = ",".join(f'{{"time_ms":1,"label":"{"[,{" * 66}"}}' for _ in range(1000))
    assert len(parse_json(f'{{"threads":[{threads}],"marks":[{marks}]}}'.encode())["threads"]) == 100


def test_read_history_of_more_cells_than_a_history_is_refused() -> None:
    """Threads that come and go in each row would take 100 times the memory of their JSON."""
    body = json.loads(history(record_of([Process().snapshot() for _ in range(1)])).to_json())
    rows = 9000
    columns = {name: [1] * rows for name in ("time_ms", "elapsed_ms", "cpu_percent", "rss_kb", "vm_size_kb")}
    threads = [
        {"tid": tid, "name": "x", "cpu_percent": [1 if (tid + row) % 2 else None for row in range(rows)]}
        for tid in range(1, 121)
    ]
    with pytest.raises(ValueError, match="120 threads, 0 children and 0 gauges in 9000 rows"):
        read_history(body | columns | {"threads": threads})


@pytest.mark.parametrize(
    "change",
    [
        {"interval_ms": 10**4000},
        {"interval_ms": -1},
        {"marks": [{"time_ms": 10**40, "label": "A"}]},
        {"events": [{"time_ms": -(10**40), "kind": "missed", "detail": "A"}]},
        {"target": {"pid": 10**40, "name": "x", "start_id": "1-2-a", "started_at": "2026-01-01T00:00:00Z"}},
        {"target": {"pid": 1, "name": "x", "start_id": f"1-{10**40}-a", "started_at": "2026-01-01T00:00:00Z"}},
        {"threads": [{"tid": 10**40, "name": "x", "cpu_percent": [0]}]},
    ],
)
def test_read_history_of_a_number_out_of_range_is_refused(change: dict[str, Any]) -> None:
    """No such number gets into an answer, where it would be an error."""
    process = Process()
    first = process.snapshot()
    process.pass_time(SECOND_NS)
    body = json.loads(history(record_of([first, process.snapshot()])).to_json())
    read_history(body)
    with pytest.raises(ValueError, match="not a history of vitalsd"):
        read_history(body | change)


def test_read_history_cuts_texts_to_what_a_recorder_writes() -> None:
    """A redact hook may make a label longer; the rest of the record is not lost for that."""
    process = Process()
    first = process.snapshot()
    process.pass_time(SECOND_NS)
    body = json.loads(history(record_of([first, process.snapshot()])).to_json())
    body |= {"marks": [{"time_ms": 1, "label": "x" * 10**6}]}
    body |= {"events": [{"time_ms": 1, "kind": "missed", "detail": "x" * 10**6}]}
    record = read_history(body)
    assert len(record.marks[0].label) == 200
    assert len(record.events[0].detail) == 16_384


def test_read_history_of_many_notes_before_many_equal_rows_ends() -> None:
    """10 000 rows at one time and 2000 notes before them: each note is looked up, not searched for."""
    body = json.loads(history(record_of([Process().snapshot()])).to_json())
    columns = {name: [0] * 10_000 for name in ("time_ms", "elapsed_ms", "cpu_percent", "rss_kb", "vm_size_kb")}
    notes = [{"time_ms": -5, "label": "x", "kind": "missed", "detail": "x"}] * 1000
    record = read_history(body | columns | {"threads": [], "marks": notes, "events": notes})
    assert (len(record.marks), len(record.events)) == (1000, 1000)
