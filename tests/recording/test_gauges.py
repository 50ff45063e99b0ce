"""Gauges beside the threads: in the record, in its table, and in the JSON of a report."""

import csv
import io
import json
import struct
from typing import Any

import pytest

from recording.test_series import record_of
from support.fake_process import SECOND_NS, VALUES, Process
from vitalsd.contract.limits import HISTORY_CELLS, HISTORY_GAUGES, HISTORY_ROWS
from vitalsd.recording.history import history
from vitalsd.recording.history_import import read_history
from vitalsd.snapshot import Snapshot


def recorded(*rows: dict[str, float], step_ns: int = SECOND_NS) -> list[Snapshot]:
    """Return a snapshot without gauges, and one with those of each row."""
    process, found = Process(), []
    for gauges in ({}, *rows):
        process.gauges = gauges
        found.append(process.snapshot())
        process.pass_time(step_ns, [1000])
    return found


def table_of(snapshots: list[Snapshot], **arguments: Any) -> dict[str, Any]:
    return json.loads(history(record_of(snapshots), **arguments).to_json())  # type: ignore[no-any-return]


ROWS: tuple[dict[str, float], ...] = (
    {"fps": 60.0},
    {"fps": 58.5, "queue": -3.0},
    {"fps": 0.0, "queue": -4.0},
    {"queue": -5.0},
    {},
)


def test_history_of_gauges_has_the_last_value_of_each_row() -> None:
    """Null where one was not set or not open."""
    table = table_of(recorded(*ROWS))
    assert table["gauges"] == [
        {"name": "fps", "value": [60.0, 58.5, 0.0, None, None]},
        {"name": "queue", "value": [None, -3.0, -4.0, -5.0, None]},
    ]
    assert "truncated" not in table
    merged = table_of(recorded(*ROWS), step_ns=2 * SECOND_NS)
    assert merged["elapsed_ms"] == [2000.0, 2000.0, 1000.0]
    assert merged["gauges"] == [
        {"name": "fps", "value": [58.5, 0.0, None]},
        {"name": "queue", "value": [-3.0, -5.0, None]},
    ]
    late = table_of(recorded(*ROWS), since_ns=recorded(*ROWS)[4].monotonic_ns)
    assert late["gauges"] == [{"name": "queue", "value": [-5.0, None]}]


def test_history_without_gauges_has_an_empty_list() -> None:
    """Its CSV has no such column."""
    table = history(record_of(recorded({}, {})))
    assert json.loads(table.to_json())["gauges"] == []
    assert b"gauge" not in table.to_csv()


def test_csv_of_gauges_has_a_column_each() -> None:
    """By the name; no name begins as a formula."""
    found = list(csv.DictReader(io.StringIO(history(record_of(recorded(*ROWS))).to_csv().decode())))
    assert [row["gauge fps"] for row in found] == ["60.0", "58.5", "0.0", "", ""]
    assert [row["gauge queue"] for row in found] == ["", "-3.0", "-4.0", "-5.0", ""]


def test_history_of_many_gauges_has_the_newest() -> None:
    """And says that others are left out."""
    rows = [{f"g{row}.{i}": float(i) for i in range(32)} for row in range(4)]
    table = table_of(recorded(*rows))
    assert [gauge["name"] for gauge in table["gauges"]] == sorted((*rows[2], *rows[3]))
    assert table["truncated"] is True


def test_history_of_gauges_and_threads_stays_within_its_cells() -> None:
    """In a long table gauges take half of the numbers at most."""
    threads = {(tid, 1): ("worker", 0) for tid in range(1, 101)}
    process, snapshots = Process(threads=threads, gauges={f"g{i}": 1.0 for i in range(64)}), []
    for _ in range(HISTORY_ROWS + 1):
        snapshots.append(process.snapshot())
        process.monotonic_ns += SECOND_NS
    table = history(record_of(snapshots), top=10_000)
    columns = HISTORY_CELLS // (HISTORY_ROWS + 1)
    assert (len(table.gauges), len(table.threads)) == (columns // 2, columns - columns // 2)
    assert table.truncated
    back = history(read_history(table.to_json()), top=10_000)
    assert back.gauges == table.gauges


def bits(values: list[float | None]) -> list[bytes | None]:
    return [None if value is None else struct.pack("d", value) for value in values]


def test_history_of_gauges_to_json_and_back_is_exact() -> None:
    """To the bit, the sign of zero included."""
    table = history(record_of(recorded(*({"g": value, "h": -value} for value in VALUES), {"h": 1 / 3})))
    back = history(read_history(table.to_json()))
    assert {name: bits(list(values)) for name, values in back.gauges.items()} == {
        "g": [*bits(list(VALUES)), None],
        "h": [*bits([-value for value in VALUES]), struct.pack("d", 1 / 3)],
    }


@pytest.mark.parametrize(
    "gauges",
    [
        [{"name": "=1+1", "value": [1, 2]}],
        [{"name": "a\n", "value": [1, 2]}],
        [{"name": 5, "value": [1, 2]}],
        [{"name": "a", "value": [1]}],
        [{"name": "a", "value": [1, "2"]}],
        [{"name": "a", "value": [1, True]}],
        [{"name": "a", "value": [1, float("nan")]}],
        [{"name": "a", "value": [1, float("inf")]}],
        [{"name": "a", "value": [1, 10**400]}],
        [{"name": "a", "value": [1, 2]}] * 2,
        [{"name": f"a{i}", "value": [1, 2]} for i in range(HISTORY_GAUGES + 1)],
        None,
        {"a": 1},
    ],
)
def test_read_history_of_damaged_gauges_is_refused(gauges: Any) -> None:
    """With a `ValueError` alone; only that of a gauge that cannot be one."""
    table = table_of(recorded({"a": 1.0}, {"a": 2.0}))
    assert read_history(table | {"gauges": [{"name": "a", "value": [1, None]}]}).last is not None
    with pytest.raises(ValueError, match="not a history of vitalsd"):
        read_history(table | {"gauges": gauges})


def test_read_history_of_a_report_without_gauges_has_none() -> None:
    """Reports of earlier versions."""
    table = table_of(recorded({"a": 1.0}))
    del table["gauges"]
    assert history(read_history(table)).gauges == {}


def test_record_of_a_new_gauge_begins_a_segment_and_of_a_closed_one_does_not() -> None:
    """The names are stored once in a segment."""
    record = record_of(recorded({}, {"a": 1.0}, {"a": 1.0}, {}, {"a": 2.0}, {"a": 2.0, "b": 3.0}, {"b": 3.0}))
    assert [(segment.gauge_names, len(segment)) for segment in record.segments()] == [
        ((), 2),
        (("a",), 4),
        (("a", "b"), 2),
    ]


def test_record_of_gauges_counts_their_memory() -> None:
    """So the record reaches less far back, also if a hostile client renames all of them each second."""
    rows = [{f"g{row % 7}.{i}": float(i) for i in range(32)} for row in range(500)]
    record = record_of(recorded(*rows), max_bytes=1 << 20)
    assert 100 < len(record) < 500
    assert record.size_bytes <= (1 << 20) + 5000
    steady = [{f"g{i}": float(i) for i in range(32)}] * 63
    without = record_of(recorded(*[{}] * 63)).size_bytes
    assert record_of(recorded(*steady)).size_bytes - without > 63 * 32 * 8
