"""Figures that are read once a second: their columns, in the record, on disk, and in the JSON of a report."""

import csv
import io
import json
from typing import Any, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recording.test_series import record_of
from support.fake_process import ALL_PARTS, SECOND_NS, Process, lives
from vitalsd.recording.history import history
from vitalsd.recording.history_columns import (
    APPLICATION,
    MACHINE,
    PROCESS,
    ApplicationColumnsJson,
    HistoryJson,
    MachineColumnsJson,
)
from vitalsd.recording.history_import import read_history
from vitalsd.recording.scalars import SCALARS
from vitalsd.snapshot import Child, MachineFigures, Part, ProcessFigures, ProcessTree, Snapshot


def table_of(snapshots: list[Snapshot], **arguments: Any) -> dict[str, Any]:
    return json.loads(history(record_of(snapshots), **arguments).to_json())  # type: ignore[no-any-return]


def figured(second: int, **more: Any) -> Process:
    """A process with figures that grow by the second."""
    return Process(
        monotonic_ns=(100 + second) * SECOND_NS,
        figures=ProcessFigures(
            anonymous_bytes=second << 20,
            open_fds=10 + second,
            major_faults=second**2,
            reaped_ns=second * SECOND_NS // 2,
        ),
        machine=MachineFigures(
            busy_ns=2 * second * SECOND_NS,
            load_milli=1500 + second,
            memory_available_bytes=4 << 30,
            cpu_pressure_ns=second * SECOND_NS // 4,
            memory_pressure_level=1,
            thermal_level=5,
        ),
        **more,
    )


def test_history_of_figures_has_levels_and_rates() -> None:
    """A level is that at the end of the row, a counter its growth, a time a percentage, and the unknown is null."""
    table = table_of([figured(second).snapshot(parts=ALL_PARTS) for second in range(4)])
    assert table["schema"] == 2
    assert table["anonymous_kb"] == [1024, 2048, 3072]
    assert table["open_fds"] == [11, 12, 13]
    assert table["major_faults"] == [1, 3, 5]
    assert table["children_percent"] == [50.0] * 3
    assert table["swap_kb"] is table["energy_nj"] is table["wait_percent"] is table["application"] is None
    assert table["machine"] == {
        "scope": "host",
        "cpu_percent": [200.0] * 3,
        "other_percent": [200.0] * 3,
        "load_1m": [1.501, 1.502, 1.503],
        "memory_available_kb": [4 << 20] * 3,
        "swap_used_kb": None,
        "cpu_pressure_percent": [25.0] * 3,
        "memory_pressure_percent": None,
        "io_pressure_percent": None,
        "memory_pressure": ["warning"] * 3,
        "quota_throttled_percent": None,
        "thermal_state": ["throttled"] * 3,
    }


def test_history_of_snapshots_without_figures_has_null_columns() -> None:
    """Nothing is made up for them."""
    process = Process()
    snapshots = [process.snapshot()]
    process.pass_time(SECOND_NS)
    table = table_of([*snapshots, process.snapshot()])
    assert all(table[column.name] is None for column in PROCESS)
    assert (table["children_percent"], table["machine"], table["application"], table["children"]) == (None,) * 3 + ([],)


def test_history_at_4_hz_has_the_figures_of_one_row_in_four() -> None:
    """A rate is over the time between two readings; rows without one have no figure."""
    snapshots = []
    for quarter in range(13):
        process = figured(quarter // 4)
        process.monotonic_ns = 100 * SECOND_NS + quarter * SECOND_NS // 4
        snapshots.append(process.snapshot(parts=Part.FIGURES if quarter % 4 == 0 else Part.NONE))
    rows = [None, None, None]
    table = table_of(snapshots)
    assert table["machine"]["cpu_percent"] == [*rows, 200.0] * 3
    assert table["major_faults"] == [*rows, 1, *rows, 3, *rows, 5]
    assert table["open_fds"] == [*rows, 11, *rows, 12, *rows, 13]
    merged = table_of(snapshots, step_ns=3 * SECOND_NS // 2)
    assert merged["elapsed_ms"] == [1500.0, 1500.0]
    assert merged["machine"]["cpu_percent"] == [200.0, 200.0]
    assert merged["major_faults"] == [1, 8]
    late = table_of(snapshots, since_ns=snapshots[10].monotonic_ns)
    assert late["machine"]["cpu_percent"] == [None, None, 200.0]


def test_history_of_a_target_that_changes_the_scope_of_its_machine_has_no_rate_there() -> None:
    """The counters of a host and of a container are not compared."""
    snapshots = []
    for second in range(5):
        process = figured(second)
        assert process.machine is not None
        process.machine = process.machine._replace(in_container=second > 2)
        snapshots.append(process.snapshot(parts=Part.FIGURES))
    machine = table_of(snapshots)["machine"]
    assert machine["scope"] == "container"
    assert machine["cpu_percent"] == machine["other_percent"] == [200.0, 200.0, None, 200.0]
    assert machine["load_1m"] == [1.501, 1.502, 1.503, 1.504]


def test_history_of_children_reaped_with_earlier_cpu_time_is_null_there() -> None:
    """More than all cores could have used between two readings was used before, also within a longer row."""
    snapshots = []
    for second, reaped_s in enumerate((0, 3, 33, 34, 35)):
        process = figured(second, cpu_count=4)
        process.figures = ProcessFigures(reaped_ns=reaped_s * SECOND_NS)
        snapshots.append(process.snapshot(parts=Part.FIGURES))
    assert table_of(snapshots)["children_percent"] == [300.0, None, 100.0, 100.0]
    assert table_of(snapshots, step_ns=2 * SECOND_NS)["children_percent"] == [None, 100.0]


def family(second: int, *children: tuple[int, int]) -> Process:
    """A process with children, each given by its pid and the CPU time it has used, s."""
    process = figured(second)
    process.tree = ProcessTree(
        cpu_ns=3 * second * SECOND_NS // 2,
        reaped_ns=second * SECOND_NS // 10,
        rss_bytes=30 << 20,
        process_count=1 + len(children),
        gaps=int(second > 2),
        children=tuple(Child(pid, 7, f"child {pid}", s * SECOND_NS, 0, pid << 10, 2) for pid, s in children),
    )
    return process


def test_history_of_children_has_the_application_and_the_busiest() -> None:
    """A child is there from its start to its end; what the target reaped is what it had not been seen to use."""
    processes = [
        family(0, (50, 40)),
        family(1, (50, 41), (60, 2)),
        family(2, (60, 2), (70, 0)),
        family(3, (60, 2), (70, 0)),
    ]
    snapshots = [process.snapshot(parts=ALL_PARTS) for process in processes]
    table = table_of(snapshots, top=2)
    assert table["application"] == {
        "cpu_percent": [150.0] * 3,
        "rss_kb": [30 << 10] * 3,
        "process_count": [3, 3, 3],
        "complete": [True, True, False],
    }
    assert table["children_percent"] == [10.0] * 3
    assert table["machine"]["other_percent"] == [50.0] * 3
    assert table["children"] == [
        {"pid": 60, "name": "child 60", "cpu_percent": [200.0, 0.0, 0.0], "rss_kb": [60, 60, 60]},
        {"pid": 50, "name": "child 50", "cpu_percent": [100.0, None, None], "rss_kb": [50, None, None]},
    ]
    back = list(record_of(snapshots).snapshots())
    assert [each.tree for each in back] == [each.tree for each in snapshots]


def test_csv_has_all_columns_by_flat_names() -> None:
    """Those without a figure are empty, and the order of the columns does not depend on the platform."""
    snapshots = [family(second, (50, second)).snapshot(parts=ALL_PARTS) for second in range(3)]
    head, *rows = csv.reader(io.StringIO(history(record_of(snapshots)).to_csv().decode()))
    first = dict(zip(head, rows[0], strict=True))
    assert first["machine_cpu_percent"] == "200.0"
    assert (first["machine_scope"], first["machine_swap_used_kb"]) == ("host", "")
    assert (first["application_process_count"], first["application_complete"]) == ("2", "True")
    assert (first["child 50 child 50 cpu_percent"], first["child 50 child 50 rss_kb"]) == ("100.0", "50")
    bare = csv.reader(io.StringIO(history(record_of([Process().snapshot()])).to_csv().decode()))
    assert next(bare)[: len(head) - 5] == head[: len(head) - 5]


def test_columns_are_the_members_of_the_json() -> None:
    """Each row of the tables is in the schema, and made from a figure that is recorded."""
    assert {column.scalar for column in (*PROCESS, *MACHINE, *APPLICATION)} <= set(SCALARS)
    assert {column.name for column in PROCESS} <= set(get_type_hints(HistoryJson))
    assert {"scope", "other_percent"} | {column.name for column in MACHINE} == set(get_type_hints(MachineColumnsJson))
    assert {column.name for column in APPLICATION} == set(get_type_hints(ApplicationColumnsJson))


def alike(found: Any, expected: Any) -> bool:
    """Whether two columns are equal to the digits of the JSON."""
    if isinstance(expected, dict):
        return isinstance(found, dict) and all(alike(found[name], expected[name]) for name in expected)
    if expected is None or found is None or isinstance(expected, str):
        return bool(found == expected)
    return len(found) == len(expected) and all(
        a == b or (None not in (a, b) and not isinstance(b, str) and a == pytest.approx(b, abs=0.003, rel=1e-4))
        for a, b in zip(found, expected, strict=True)
    )


@settings(max_examples=40, deadline=None)
@given(lives(max_steps=15, figures=True), st.integers(0, 20 * SECOND_NS))
def test_history_json_with_figures_read_back_is_equal(snapshots: list[Snapshot], step_ns: int) -> None:
    """A record rebuilt from the JSON gives the same columns of process, machine, application and children."""
    table = table_of(snapshots, top=10_000, step_ns=step_ns)
    again = json.loads(history(read_history(json.dumps(table).encode()), top=10_000).to_json())
    for name in ("wait_percent", "children_percent", "application", *(column.name for column in PROCESS)):
        assert alike(again[name], table[name]), name
    machine, expected = again["machine"], table["machine"]
    if expected is None:
        assert machine is None
    else:
        expected.pop("other_percent")  # it depends on where in a longer row the reading was
        assert alike(machine, expected)
    assert {(child["pid"], child["name"]) for child in again["children"]} == {
        (child["pid"], child["name"]) for child in table["children"]
    }
    assert sum(sum(cell is not None for cell in child["cpu_percent"]) for child in again["children"]) == sum(
        sum(cell is not None for cell in child["cpu_percent"]) for child in table["children"]
    )


def test_history_json_with_waits_and_children_read_back_is_equal() -> None:
    """Threads and children come back with their rows; figures of one row in two, too."""
    snapshots = []
    for second in range(9):
        process = family(second, (50, second), *(((60, 2 * second),) if second > 3 else ()))
        process.threads = {(1, 1): ("main", second * SECOND_NS // 2), (2, 1): ("worker", second * SECOND_NS // 10)}
        process.waits = {(1, 1): second * SECOND_NS // 4, (2, 1): second**2 * SECOND_NS // 100}
        snapshots.append(process.snapshot(parts=ALL_PARTS if second % 2 else Part.NONE))
    table = table_of(snapshots)
    assert [thread["wait_percent"][:2] for thread in table["threads"]] == [[25.0, 25.0], [1.0, 3.0]]
    assert json.loads(history(read_history(table)).to_json()) == table


@pytest.mark.parametrize(
    "change",
    [
        {"open_fds": [1]},
        {"open_fds": "12"},
        {"open_fds": [1, "2"]},
        {"open_fds": [1, True]},
        {"open_fds": [1, -2]},
        {"open_fds": [1, 2**70]},
        {"open_fds": [1, float("nan")]},
        {"energy_nj": [2**62, 2**62]},
        {"wait_percent": [[], []]},
        {"children_percent": {"0": 1}},
        {"machine": []},
        {"machine": {"scope": "galaxy", "load_1m": [1, 1]}},
        {"machine": {"scope": "host", "thermal_state": ["nominal", "molten"]}},
        {"machine": {"scope": "host", "thermal_state": "nominal"}},
        {"machine": {"scope": "host", "cpu_percent": [float("inf"), 0]}},
        {"application": [1]},
        {"application": {"cpu_percent": [0, 0], "rss_kb": [1, 1], "complete": [True, "no"]}},
        {"children": [{"pid": 1, "name": "x", "cpu_percent": [1], "rss_kb": [1, 1]}]},
        {"children": [{"pid": -1, "name": "x", "cpu_percent": [1, 1], "rss_kb": [1, 1]}]},
        {"children": {"pid": 1}},
        {"children": 7},
        {"threads": [{"tid": 1, "name": "main", "cpu_percent": [0, 0], "wait_percent": [0]}]},
        {"threads": [{"tid": 1, "name": "main", "cpu_percent": [0, 0], "wait_percent": ["0", "0"]}]},
    ],
)
def test_read_history_of_damaged_figures_is_refused(change: dict[str, Any]) -> None:
    """Columns have one length and numbers from 0; names are those of the schema."""
    table = table_of([family(second, (50, second)).snapshot(parts=ALL_PARTS) for second in range(3)])
    read_history(table)
    with pytest.raises(ValueError, match="not a history of vitalsd"):
        read_history(json.dumps(table | change).encode())


def test_read_history_of_schema_1_has_no_figures() -> None:
    """A report of an earlier version is read as far as it goes."""
    table = table_of([figured(second).snapshot(parts=ALL_PARTS) for second in range(3)])
    kept = ("platform", "target", "interval_ms", "time_ms", "elapsed_ms", "cpu_percent", "rss_kb", "vm_size_kb")
    old = {name: table[name] for name in (*kept, "thread_count", "marks", "events")} | {"schema": 1}
    old["threads"] = [{name: thread[name] for name in ("tid", "name", "cpu_percent")} for thread in table["threads"]]
    again = json.loads(history(read_history(old)).to_json())
    assert {name: again[name] for name in kept} == {name: table[name] for name in kept}
    assert (again["machine"], again["open_fds"], again["threads"][0]["wait_percent"]) == (None, None, None)
