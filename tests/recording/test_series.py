"""The record gives back what it was given, within its bounds."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.fake_process import ALL_PARTS, IDENTITY, SECOND_NS, Process, lives, same
from vitalsd.recording.segment import SEGMENT_LENGTH
from vitalsd.recording.series import MAX_MARKS, Record
from vitalsd.snapshot import Child, MachineFigures, Part, ProcessTree, Snapshot, measure


def record_of(snapshots: list[Snapshot], **bounds: int) -> Record:
    record = Record(IDENTITY, interval_ns=SECOND_NS, **{"retention_ns": 2**62, "max_bytes": 2**40, **bounds})
    for snapshot in snapshots:
        record.append(snapshot)
    return record


@given(lives())
def test_series_returns_the_snapshots_it_was_given(snapshots: list[Snapshot]) -> None:
    """Every snapshot comes back as it was, whatever threads and program did in between."""
    back = list(record_of(snapshots).snapshots())
    assert len(back) == len(snapshots)
    assert all(map(same, back, snapshots))


@given(lives(), st.data())
def test_series_at_or_before_returns_the_latest_not_after(snapshots: list[Snapshot], data: st.DataObject) -> None:
    """The snapshot found for a time is the latest one not after it, or the oldest of all."""
    record = record_of(snapshots)
    at_ns = data.draw(st.integers(snapshots[0].monotonic_ns - 5, snapshots[-1].monotonic_ns + 5))
    expected = [s for s in snapshots if s.monotonic_ns <= at_ns][-1:] or snapshots[:1]
    found = record.at_or_before(at_ns)
    assert found is not None
    assert same(found, expected[0])


@given(lives(), st.integers(10, 60_000))
def test_series_window_equals_measuring_its_two_ends(snapshots: list[Snapshot], window_ms: int) -> None:
    """A window read from the record has the numbers that measuring its two ends gives."""
    found = record_of(snapshots).window(window_ms)
    if found is None:
        assert len(snapshots) == 1
        return
    assert found.last is snapshots[-1]
    first = next(s for s in snapshots if s.monotonic_ns == found.first.monotonic_ns)
    expected = measure(first, snapshots[-1])
    assert list(found.thread_cpu_ns) == list(expected.thread_cpu_ns)
    assert (found.cpu_ns, found.exited_ns, found.born) == (expected.cpu_ns, expected.exited_ns, expected.born)


def test_series_window_longer_than_the_recording_is_cut_with_a_warning() -> None:
    """A window longer than the record is cut to what there is, with a warning."""
    process = Process()
    record = record_of([process.snapshot()])
    assert record.window(1000) is None
    process.pass_time(SECOND_NS)
    record.append(process.snapshot())
    window = record.window(60_000)
    assert window is not None
    assert window.elapsed_ns == SECOND_NS
    assert window.warnings == ("the record reaches back only 1.0 s",)
    exact = record.window(1000)
    assert exact is not None
    assert exact.warnings == ()


def test_callers_with_one_window_share_one_measurement() -> None:
    """The same window of the same past is computed once, and anew after the next snapshot."""
    process = Process()
    record = record_of([process.snapshot()])
    process.pass_time(SECOND_NS)
    record.append(process.snapshot())
    assert record.window(500) is record.window(500)
    before = record.window(500)
    process.pass_time(SECOND_NS)
    record.append(process.snapshot())
    assert record.window(500) is not before


def test_series_evicts_segments_older_than_the_retention() -> None:
    """The record reaches back as far as asked, give or take a segment, and no further."""
    process, record = Process(), record_of([], retention_ns=100 * SECOND_NS)
    for _ in range(1000):
        process.pass_time(SECOND_NS, [1])
        record.append(process.snapshot())
    assert 100 <= len(record) <= 100 + 64
    oldest = record.at_or_before(0)
    assert oldest is not None
    assert 100 <= (process.monotonic_ns - oldest.monotonic_ns) / SECOND_NS <= 164


def test_series_at_its_byte_limit_keeps_less_time() -> None:
    """With thousands of threads that all run, the bound shortens how far back it reaches."""
    process = Process(threads={(tid, 1): (f"worker {tid}", 0) for tid in range(1, 3001)})
    record = record_of([], max_bytes=1 << 20)
    for _ in range(300):
        process.pass_time(SECOND_NS, [1_000_000] * 3000)
        record.append(process.snapshot())
    segment_bytes = 3000 * (64 * 4 + 64 + 100)
    assert record.size_bytes <= (1 << 20) + segment_bytes
    assert 1 <= len(record) < 300


def test_series_of_a_thousand_threads_for_15_minutes_fits_8_mib() -> None:
    """The worst case at one snapshot a second: every one of 1000 threads runs and waits every second."""
    keys = [(tid, 1) for tid in range(1, 1001)]
    process = Process(threads={key: (f"worker {key[0]}", 0) for key in keys}, machine=MachineFigures())
    record = record_of([])
    for second in range(900):
        process.pass_time(SECOND_NS, [1_234_567] * 1000)
        process.waits = dict.fromkeys(keys, second * 990_000_000)
        record.append(process.snapshot(parts=Part.FIGURES))
    assert len(record) == 900
    assert record.size_bytes <= 8 << 20


@pytest.mark.parametrize(
    ("threads", "changing", "waiting"),
    [(500, False, False), (500, False, True), (5, True, False), (100, True, False), (100, True, True)],
)
def test_series_byte_count_matches_the_allocated_memory(threads: int, changing: bool, waiting: bool) -> None:
    """What it says it holds is what was allocated, or up to half more if changing threads share their numbers."""
    import tracemalloc

    process = Process(threads={(tid, 1): (f"worker {tid}", 0) for tid in range(1, threads + 1)})
    process.snapshot()
    tracemalloc.start()
    record = record_of([])
    for number in range(300):
        if changing:
            process.threads[(threads + number, 1)] = process.threads.pop((threads - 1 + number, 1))
        process.pass_time(SECOND_NS, [1_234_567] * threads)
        process.waits = dict.fromkeys(process.threads, number * 2_345_678) if waiting else None
        record.append(process.snapshot())
    process.waits = None
    current, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # It is 0.82 of it by itself; threads that other tests have left allocate, too.
    assert 0.75 * current < record.size_bytes < 1.5 * current


def test_series_with_many_children_stays_within_its_bytes() -> None:
    """Their numbers count, so the record reaches less far back."""
    process, record = Process(), record_of([], max_bytes=1 << 20)
    for second in range(600):
        process.pass_time(SECOND_NS, [1])
        children = tuple(Child(pid, second // 100, f"cc {pid}", second, 0, 4096, 1) for pid in range(100, 300))
        process.tree = ProcessTree(second, 0, 0, 201, 0, children)
        record.append(process.snapshot(parts=ALL_PARTS))
    assert 64 < len(record) < 200
    assert record.size_bytes <= (1 << 20) + 64 * 7000


def test_record_of_equal_copies_of_a_roster_keeps_one() -> None:
    """A source that returns a copy with each snapshot costs time and no memory."""
    process = Process(threads={(tid, 1): (f"worker {tid}", 0) for tid in range(1, 101)})
    snapshots = []
    for _ in range(3 * SEGMENT_LENGTH):
        process.pass_time(SECOND_NS, [1_234_567] * 100)
        snapshots.append(process.snapshot())
    record, copied = record_of(snapshots), record_of([replace(each, roster=replace(each.roster)) for each in snapshots])
    assert len(copied.segments()) == 3
    assert len({id(segment.first.roster) for segment in copied.segments()}) == 1
    assert copied.size_bytes == record.size_bytes


@pytest.mark.parametrize("label", ["", "x" * 201, "two\nlines", "bell\a", "\x1b[31m", "\u202eevil"])
def test_label_empty_too_long_or_not_printable_is_refused(label: str) -> None:
    """A label is one line of 1 to 200 printable characters."""
    with pytest.raises(ValueError, match="a label"):
        record_of([]).add_mark(label)


def test_series_beyond_1000_marks_evicts_the_oldest() -> None:
    """At most 1000 marks are kept."""
    record = record_of([])
    for number in range(MAX_MARKS + 5):
        record.add_mark(f"mark {number}")
    assert len(record.marks) == MAX_MARKS
    assert record.marks[0].label == "mark 5"
