"""Waits are charged to the rows in which a thread waited, although the kernel books each one when it ends."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recording.test_series import record_of
from support.fake_process import SECOND_NS, Process
from vitalsd.recording.history import history
from vitalsd.recording.history_table import History
from vitalsd.recording.segment import WAIT_STEP_NS
from vitalsd.snapshot import Snapshot

QUARTER_NS = SECOND_NS // 4


def waited(table: History, tid: int) -> list[int | None]:
    (thread,) = (each for each in table.threads if each.tid == tid)
    assert thread.wait_ns is not None
    return list(thread.wait_ns)


def recorded(
    steps: Sequence[tuple[Sequence[int], Sequence[int]]], elapsed_ns: int = SECOND_NS, threads: int = 2
) -> list[Snapshot]:
    """The snapshots of a process of which the threads use so much CPU and are charged with such waits, step by step."""
    process = Process({(tid, 1): (f"worker {tid}", 0) for tid in range(1, threads + 1)}, waits={})
    found = [process.snapshot()]
    for used_ns, waited_ns in steps:
        process.pass_time(elapsed_ns, used_ns)
        for tid, ns in enumerate(waited_ns, 1):
            process.book_wait(tid, ns)
        found.append(process.snapshot())
    return found


@pytest.mark.parametrize("per_second", [1, 4])
def test_wait_of_two_seconds_booked_at_once_fills_the_rows_before(per_second: int) -> None:
    """Each row in which the thread waited reads 100 %, none more, and the row in which it ran the rest."""
    step_ns = SECOND_NS // per_second
    rows = 2 * per_second
    steps: list[tuple[list[int], list[int]]] = [([step_ns // 2, 0], [0, 0])]
    steps += [([0, step_ns // 3], [0, 0])] * (rows - 1)
    steps += [([step_ns // 2, 0], [2 * SECOND_NS, 0])]
    table = history(record_of(recorded(steps, step_ns)))
    assert waited(table, 1) == [step_ns // 2, *[step_ns] * (rows - 1), step_ns // 2]
    assert waited(table, 2) == [0] * (rows + 1)
    assert table.wait_ns == waited(table, 1)


def test_wait_longer_than_the_table_is_cut_at_its_start() -> None:
    """What a thread waited before the first row belongs to no row."""
    table = history(record_of(recorded([([0, 0], [0, 0]), ([0, 0], [100 * SECOND_NS, 0])])))
    assert waited(table, 1) == [SECOND_NS, SECOND_NS]
    assert table.wait_ns == [SECOND_NS, SECOND_NS]


def test_wait_is_spread_back_to_the_last_row_with_another_wait_only() -> None:
    """The thread had to stop waiting there; a source that says otherwise gets no more than that row has room for."""
    steps: list[tuple[list[int], list[int]]] = [
        ([0, 0], [0, 0]),
        ([0, 0], [QUARTER_NS, 0]),
        ([0, 0], [5 * SECOND_NS, 0]),
    ]
    table = history(record_of(recorded(steps)))
    assert waited(table, 1) == [0, SECOND_NS, SECOND_NS]


def test_wait_is_spread_over_segments_and_not_over_an_exec() -> None:
    """A thread that started ends a segment; after an exec the counters are those of other threads."""
    process = Process({(1, 1): ("main", 0)}, waits={})
    snapshots = [process.snapshot()]
    for second in range(6):
        if second in (1, 3):
            process.threads[10 + second, 7] = "new", 0
        if second == 2:
            process.image += 1
        process.pass_time(SECOND_NS)
        if second == 5:
            process.book_wait(1, 20 * SECOND_NS)
        snapshots.append(process.snapshot())
    table = history(record_of(snapshots))
    assert waited(table, 1) == [0, 0, None, SECOND_NS, SECOND_NS, SECOND_NS]


def test_wait_of_a_downsampled_row_is_the_sum_of_its_snapshots() -> None:
    """Spreading looks at snapshots, whatever the length of a row."""
    steps = [([0, 0], [0, 0])] * 5 + [([0, 0], [4 * SECOND_NS, 0])] + [([0, 0], [0, QUARTER_NS])] * 2
    table = history(record_of(recorded(steps)), step_ns=2 * SECOND_NS)
    assert waited(table, 1) == [0, 2 * SECOND_NS, 2 * SECOND_NS, 0]
    assert waited(table, 2) == [0, 0, 0, 2 * QUARTER_NS]


@st.composite
def schedules(draw: st.DrawFn) -> tuple[list[tuple[list[int], list[int]]], list[list[int]]]:
    """
    Draw what two threads did in each of up to 30 rows, as the kernel books it, and how long they waited in truth.

    A thread runs in part of a row or not at all, and waits for all of the rest, or not at all. The kernel books a wait
    in the row in which the thread runs again.
    """
    rows = draw(st.integers(1, 30))
    used, booked, truth = [], [], []
    for _ in range(2):
        runs = [draw(st.sampled_from([0, 0, 0, QUARTER_NS, SECOND_NS])) for _ in range(rows)]
        real, books, pending = [0] * rows, [0] * rows, 0
        waiting = False
        for row, used_ns in enumerate(runs):
            if used_ns:
                real[row] = SECOND_NS - used_ns if waiting else 0
                books[row] = pending + real[row]
                pending, waiting = 0, draw(st.booleans())
            elif waiting:
                real[row] = SECOND_NS
                pending += SECOND_NS
        if pending:  # in progress at the end, so it is not booked
            for row in range(rows - 1, -1, -1):
                if runs[row]:
                    break
                real[row] = 0
        used.append(runs)
        booked.append(books)
        truth.append(real)
    return list(zip(map(list, zip(*used, strict=True)), map(list, zip(*booked, strict=True)), strict=True)), truth


@given(schedules())
def test_spread_waits_are_those_that_happened(
    schedule: tuple[list[tuple[list[int], list[int]]], list[list[int]]],
) -> None:
    """With room for all, their sum is what was booked, each row has its own, and the process the sum of its threads."""
    steps, truth = schedule
    table = history(record_of(recorded(steps)))
    assert [waited(table, 1), waited(table, 2)] == truth
    assert table.wait_ns == [sum(row) for row in zip(*truth, strict=True)]


times = st.integers(0, 3 * SECOND_NS // WAIT_STEP_NS).map(WAIT_STEP_NS.__mul__)


@given(st.lists(st.tuples(st.tuples(times, times), st.tuples(times, times)), min_size=1, max_size=30), st.booleans())
def test_spread_waits_never_exceed_the_time_not_run(
    steps: list[tuple[tuple[int, int], tuple[int, int]]], coarse: bool
) -> None:
    """Whatever the kernel books: with its CPU time a thread has at most the row, and no more than was booked."""
    table = history(record_of(recorded(steps)), step_ns=3 * SECOND_NS if coarse else 0)
    for tid in (1, 2):
        found = waited(table, tid)
        (thread,) = (each for each in table.threads if each.tid == tid)
        assert sum(ns or 0 for ns in found) <= sum(waits[tid - 1] for _, waits in steps)
        if not coarse:
            for wait_ns, cpu_ns in zip(found, thread.cpu_ns, strict=True):
                assert cpu_ns is None or wait_ns is None or wait_ns == 0 or wait_ns + cpu_ns <= SECOND_NS
    if not coarse and not any(None in thread.cpu_ns for thread in table.threads):
        columns = (waited(table, tid) for tid in (1, 2))
        assert table.wait_ns == [sum(ns or 0 for ns in row) for row in zip(*columns, strict=True)]


def test_waits_of_a_source_without_those_of_threads_are_the_process_s_own() -> None:
    """As on macOS: threads have none, and the process has its counter; one that is missing is null."""
    process, snapshots = Process(), []
    for waited_ns in (None, 5, 7, 11, None, 3 * SECOND_NS, 9 * SECOND_NS):
        process.wait_ns = waited_ns
        snapshots.append(process.snapshot())
        process.pass_time(SECOND_NS)
    table = history(record_of(snapshots))
    assert table.wait_ns == [None, 2, 4, None, None, 6 * SECOND_NS]
    assert [thread.wait_ns for thread in table.threads] == [None]
    assert history(record_of([Process().snapshot()])).wait_ns is None
