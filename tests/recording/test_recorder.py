"""The recorder notes what a bare row of snapshots would hide."""

import asyncio
import gc
import json
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from support.fake_process import ALL_PARTS, IDENTITY, SECOND_NS, Process
from vitalsd.recording.hangs import Hang
from vitalsd.recording.history import history
from vitalsd.recording.history_import import read_history
from vitalsd.recording.recorder import Recorder, RecorderConfig
from vitalsd.recording.run_directory import RunDirectory
from vitalsd.recording.run_reader import read_run
from vitalsd.recording.run_writer import RunFile
from vitalsd.recording.series import Mark
from vitalsd.snapshot import Child, MachineFigures, ProcessFigures, ProcessTree
from vitalsd.sources.base import KernelError, TargetGoneError


def recorded(*steps: tuple[int, dict[str, object]]) -> list[tuple[str, str]]:
    """The events of a process that changes so after each elapsed time, ns."""
    process = Process()
    recorder = Recorder(IDENTITY, RecorderConfig())
    recorder.observe(process.snapshot())
    for elapsed_ns, changes in steps:
        process.pass_time(elapsed_ns)
        for name, value in changes.items():
            setattr(process, name, value)
        recorder.observe(process.snapshot())
    return [(event.kind, event.detail) for event in recorder.record.events]


def test_recorder_at_a_regular_interval_notes_no_event() -> None:
    """Nothing is noted while nothing happens, give or take a late beat."""
    assert recorded((SECOND_NS, {}), (SECOND_NS * 14 // 10, {}), (SECOND_NS * 7 // 10, {})) == []


def test_recorder_gap_is_an_event_with_a_count() -> None:
    """A gap is an event, with the number of snapshots that are not there."""
    assert recorded((5 * SECOND_NS, {})) == [("missed", "4 snapshots are missing before this one")]


def test_recorder_after_machine_sleep_notes_no_gap() -> None:
    """The two clocks show the time that the machine slept, which is no missed snapshot."""
    assert recorded((SECOND_NS, {"asleep_ns": 3600 * SECOND_NS})) == [("suspended", "the machine slept 3600.0 s")]


def test_recorder_notes_stop_and_continue_of_the_target() -> None:
    """A target stopped and continued is noted both times."""
    events = recorded((SECOND_NS, {"state": "stopped"}), (SECOND_NS, {}), (SECOND_NS, {"state": "sleeping"}))
    assert [kind for kind, _ in events] == ["stopped", "continued"]


def test_recorder_of_a_traced_running_target_notes_no_stop() -> None:
    """As below strace, which stops it for a moment at each system call; one that a debugger stopped does not run."""
    process = Process(state="traced")
    recorder = Recorder(IDENTITY, RecorderConfig())
    for burnt_ns in (1000, 1000, 0, 0):
        process.pass_time(SECOND_NS, [burnt_ns])
        recorder.observe(process.snapshot())
    (event,) = recorder.record.events
    assert (event.kind, event.detail) == ("stopped", "the target is stopped by a debugger")
    assert event.monotonic_ns == process.monotonic_ns - SECOND_NS


@pytest.mark.parametrize(("seconds", "words"), [(86400, "forward by 86400.0 s"), (-172800, "back by 172800.0 s")])
def test_recorder_notes_a_clock_step_once_at_its_time(seconds: int, words: str) -> None:
    """Once, at the first snapshot after it."""
    process = Process()
    recorder = Recorder(IDENTITY, RecorderConfig())
    for second in range(6):
        process.pass_time(SECOND_NS)
        process.set_ns = seconds * SECOND_NS if second > 2 else 0
        recorder.observe(process.snapshot())
    (event,) = recorder.record.events
    assert (event.kind, event.detail) == ("clock_set", f"the wall clock was set {words}")
    assert event.monotonic_ns == process.monotonic_ns - 2 * SECOND_NS


def test_recorder_of_a_late_or_slewed_clock_notes_no_step() -> None:
    """One snapshot was interrupted between its clocks; and a slewed clock moves by less than a step at a time."""
    process = Process()
    recorder = Recorder(IDENTITY, RecorderConfig())
    for second in range(20):
        process.pass_time(SECOND_NS)
        process.set_ns = 3 * SECOND_NS if second == 4 else second * SECOND_NS // 10
        recorder.observe(process.snapshot())
    assert not recorder.record.events


def test_recorder_notes_an_exec_with_the_new_name() -> None:
    """Another program in the same process is noted, and what it is."""
    assert recorded((SECOND_NS, {"image": 2})) == [
        ("executed", f"the target executed another program: {IDENTITY.name}")
    ]


def test_recorder_notes_a_failure_once_and_the_exit() -> None:
    """A failure is noted once while it lasts, and does not end the record; the target's end does."""
    recorder = Recorder(IDENTITY, RecorderConfig())
    assert recorder.failed(KernelError("too many open files"))
    assert recorder.failed(KernelError("too many open files"))
    assert not recorder.failed(TargetGoneError("target 4242 has exited"))
    assert [event.kind for event in recorder.record.events] == ["failed", "exited"]
    assert recorder.ended == "target 4242 has exited"


def test_recorder_keeps_a_shared_snapshot_once() -> None:
    """The same snapshot again is not another row."""
    recorder = Recorder(IDENTITY, RecorderConfig())
    snapshot = Process().snapshot()
    recorder.observe(snapshot)
    recorder.observe(snapshot)
    assert len(recorder.record) == 1


def test_mark_after_the_writer_ended_raises_nothing(tmp_path: Path) -> None:
    """It is on the clock; that its writer has ended raises no exception that is never retrieved."""
    recorder = Recorder(IDENTITY, RecorderConfig(runs=RunDirectory(tmp_path)))
    recorder.close()
    unseen: list[dict[str, Any]] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unseen.append(context))
        assert (await recorder.mark_async("late")).label == "late"
        gc.collect()

    asyncio.run(main())
    assert unseen == []


def test_mark_on_a_slow_disk_does_not_block_the_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller that sets a mark waits until it is on disk; other callers are served meanwhile."""
    runs = RunDirectory(tmp_path)
    recorder = Recorder(IDENTITY, RecorderConfig(runs=runs))
    fast = RunFile.insert_mark

    def slow(file: RunFile, mark: Mark) -> None:
        time.sleep(0.02)
        fast(file, mark)

    async def main() -> int:
        turns = 0

        async def another() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        served = asyncio.create_task(another())
        await recorder.mark_async("one")
        assert [mark.label for mark in read_run(next(tmp_path.glob("*.sqlite")))[1].marks] == ["one"]
        turns = 0
        await recorder.mark_async("another")
        served.cancel()
        return turns

    monkeypatch.setattr(RunFile, "insert_mark", slow)
    assert asyncio.run(main()) > 10
    recorder.close()


def test_recorder_notes_children_reaped_with_earlier_cpu_time() -> None:
    """Once for each, with the time; not what fits between two readings, nor of children that it watches."""
    process = Process(cpu_count=4, figures=ProcessFigures(reaped_ns=0))
    recorder = Recorder(IDENTITY, RecorderConfig())
    for second, reaped_s in enumerate((3, 6, 36, 36, 37)):
        process.pass_time(SECOND_NS)
        process.figures = ProcessFigures(reaped_ns=reaped_s * SECOND_NS)
        recorder.observe(process.snapshot(parts=recorder.next_parts(process.monotonic_ns)))
        process.tree = None if second < 4 else ProcessTree(0, 0, 0, 1, 0)
    (event,) = recorder.record.events
    assert event.kind == "child_reaped"
    assert "30.0 s of CPU time" in event.detail
    process.figures = ProcessFigures(reaped_ns=99 * SECOND_NS)
    recorder.observe(process.snapshot(parts=ALL_PARTS))
    assert len(recorder.record.events) == 1


@pytest.mark.parametrize("children", [False, True])
def test_recorder_stores_names_of_children_only_on_request(children: bool, tmp_path: Path) -> None:
    """Neither memory nor disk nor JSON has them otherwise."""
    child = Child(50, 7, "secret helper", 5, 0, 4096, 1)
    process = Process(tree=ProcessTree(5, 0, 8192, 2, 0, (child,)))
    runs = RunDirectory(tmp_path)
    recorder = Recorder(IDENTITY, RecorderConfig(runs=runs, children=children))
    for _ in range(3):
        process.pass_time(SECOND_NS)
        recorder.observe(process.snapshot(parts=recorder.next_parts(process.monotonic_ns)))
    recorder.close()
    (path,) = tmp_path.glob("*.sqlite")
    assert (b"secret helper" in path.read_bytes()) is children
    for record in (recorder.record, read_run(path)[1]):
        body = history(record).to_json()
        assert (b"secret helper" in body) is (b'"application":{' in body) is children


def test_record_window_has_the_figures_of_its_ends() -> None:
    """What `mode=trailing` measures: waits, children and machine of the record as of two snapshots of the kernel."""
    child = Child(50, 7, "cc", 0, 0, 4096, 1)
    process = Process(waits={}, figures=ProcessFigures(reaped_ns=0, open_fds=5))
    recorder = Recorder(IDENTITY, RecorderConfig(children=True))
    for second in range(4):
        process.tree = ProcessTree(second * SECOND_NS, 0, 8192, 2, 0, (child._replace(cpu_ns=second * SECOND_NS),))
        process.machine = MachineFigures(busy_ns=2 * second * SECOND_NS)
        recorder.observe(process.snapshot(parts=recorder.next_parts(process.monotonic_ns)))
        process.pass_time(SECOND_NS)
        process.book_wait(1, SECOND_NS // 2)
    window = recorder.record.window(2000)
    assert window is not None
    assert (window.wait_ns, list(window.thread_wait_ns or ())) == (SECOND_NS, [SECOND_NS])
    assert window.machine is not None
    assert window.machine.busy_ns == 4 * SECOND_NS
    assert window.tree is not None
    assert [(found.name, ns) for found, ns in window.tree.children] == [("cc", 2 * SECOND_NS)]
    assert window.tree.cpu_ns == 2 * SECOND_NS


def hang_of(seconds: float, *, ongoing: bool, start_ns: int = 100 * SECOND_NS) -> Hang:
    """A report of a hang."""
    return Hang(1_700_000_000 * SECOND_NS, start_ns, round(seconds * SECOND_NS), "ui", "blocked", "futex", ongoing)


def test_recorder_keeps_one_event_for_a_hang_and_its_last_report() -> None:
    """While it lasts the event has the length so far; another hang is another event."""
    recorder = Recorder(IDENTITY, RecorderConfig())
    for number in range(20):
        recorder.note_hang(hang_of(1 + number / 4, ongoing=True))
    (event,) = recorder.record.events
    assert (event.kind, event.duration_ns, event.ongoing) == ("hang", 5_750_000_000, True)
    recorder.note_hang(hang_of(6.1, ongoing=False))
    recorder.note_hang(hang_of(2, ongoing=False, start_ns=200 * SECOND_NS))
    assert [(event.duration_ns, event.ongoing) for event in recorder.record.events] == [
        (6_100_000_000, False),
        (2_000_000_000, False),
    ]


def test_recorder_of_a_target_that_is_killed_in_a_hang_has_it_on_disk(tmp_path: Path) -> None:
    """With the length as of the last 5 s; a hang that is over has its true length there."""
    recorder = Recorder(IDENTITY, RecorderConfig(runs=RunDirectory(tmp_path)))
    recorder.observe(Process().snapshot())
    recorder.note_hang(hang_of(1.1, ongoing=True))
    recorder.note_hang(hang_of(2.2, ongoing=False))
    for number in range(100):
        recorder.note_hang(hang_of(1 + number / 4, ongoing=True, start_ns=200 * SECOND_NS))
    recorder.close()
    (path,) = tmp_path.glob("*.sqlite")
    _, record = read_run(path)
    kept = list(recorder.record.events)
    assert list(record.events) == [kept[0], kept[1]._replace(duration_ns=25 * SECOND_NS)]
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT count(*) FROM event").fetchone() == (8,)


def test_history_of_a_hang_names_heartbeat_length_and_cause_and_is_read_back() -> None:
    """A hang that began before the period that is asked for, and lasts into it, belongs to it."""
    process, recorder = Process(), Recorder(IDENTITY, RecorderConfig())
    recorder.observe(process.snapshot())
    start_ns = process.monotonic_ns
    for _ in range(20):
        process.pass_time(SECOND_NS)
        recorder.observe(process.snapshot())
    last = process.snapshot()
    wall_ns = last.wall_ns - (last.monotonic_ns - start_ns)
    recorder.note_hang(hang_of(18.5, ongoing=True, start_ns=start_ns)._replace(wall_ns=wall_ns))
    table = history(recorder.record, since_ns=last.monotonic_ns - 5 * SECOND_NS)
    assert json.loads(table.to_json())["events"] == [
        {
            "time_ms": wall_ns // 1_000_000,
            "kind": "hang",
            "detail": "futex",
            "duration_ms": 18_500,
            "heartbeat": "ui",
            "cause": "blocked",
            "ongoing": True,
        }
    ]
    assert b"hang: ui silent for 18.5 s: blocked, futex" in table.to_csv()
    (event,) = read_history(history(recorder.record).to_json()).events
    (noted,) = recorder.record.events
    assert event[2:] == noted[2:]
