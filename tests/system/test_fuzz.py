"""
Parsers over untrusted content, mutated at random: each reads it, or refuses it with its own error.

A hundredth of it each time; ``make torture`` has a million.
"""

import json
import random
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError
from starlette.datastructures import QueryParams

from recording.test_black_box import write
from support.fake_process import Process
from support.paths import DATA
from system.test_abuse import mutated
from vitalsd.contract.encoding import encode
from vitalsd.discovery import runtime_file as endpoint
from vitalsd.discovery.directories import EndpointError
from vitalsd.http.parameters import _bad_parameter
from vitalsd.http.responses import ProblemError
from vitalsd.http.routes.metrics import MetricsQuery, StreamQuery
from vitalsd.http.routes.recordings import HistoryQuery
from vitalsd.http.routes.report import ReportQuery
from vitalsd.recording.history import history
from vitalsd.recording.history_import import read_history
from vitalsd.recording.run_reader import UnreadableRunError, read_run
from vitalsd.sources.linux.procfs import MalformedError, parse_schedstats, parse_stat, parse_statm, parse_status
from vitalsd.sources.names import decode_name

CAPTURE = DATA / "proc" / "4242"

SIZES = [
    pytest.param(1, id="quick"),
    pytest.param(100, id="torture", marks=[pytest.mark.torture, pytest.mark.timeout(900)]),
]


@pytest.fixture(autouse=True)
def tally(request: pytest.FixtureRequest) -> Iterator[Counter[str]]:
    """Prints how often which end was met, and how long it took."""
    begun, counts = time.monotonic(), Counter[str]()
    yield counts
    print(f"{counts.total()} in {time.monotonic() - begun:.0f} s: {dict(counts)}")


PARSERS: dict[str, tuple[Callable[[bytes], object], list[Path]]] = {
    "stat": (parse_stat, [CAPTURE / "stat", *sorted(DATA.glob("stat-*"))]),
    "statm": (parse_statm, [CAPTURE / "statm"]),
    "status": (parse_status, [CAPTURE / "status"]),
    "schedstat": (lambda content: parse_schedstats([content, content]), [CAPTURE / "task" / "4243" / "schedstat"]),
    "comm": (decode_name, [CAPTURE / "task" / "4243" / "comm"]),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("which", PARSERS)
def test_fuzzed_proc_content_is_parsed_or_malformed(which: str, size: int, tally: Counter[str]) -> None:
    """Counters, or `MalformedError`; whatever a name holds, it can be written as JSON and as UTF-8."""
    parse, files = PARSERS[which]
    originals, dice = [file.read_bytes() for file in files], random.Random(which)
    for _ in range(1600 * size):
        content = mutated(dice, dice.choice(originals))
        try:
            found = parse(content)
        except MalformedError:
            tally["refused"] += 1
        else:
            tally["read"] += 1
            json.dumps(found, allow_nan=False)
            str(found).encode()


@pytest.mark.parametrize("size", SIZES)
def test_fuzzed_queries_are_parsed_or_refused(size: int, tally: Counter[str]) -> None:
    """A model, or a refusal that is short and printable."""
    dice = random.Random("query")
    originals = [b"window_ms=500&detail=full&sort=cpu&limit=20&pid=4242&mode=trailing", b"seconds=60&top=5&step_ms=100"]
    models: list[type[BaseModel]] = [MetricsQuery, HistoryQuery, StreamQuery, ReportQuery]
    for _ in range(2000 * size):
        given = dict(QueryParams(mutated(dice, dice.choice(originals)).decode("latin-1")))
        model = dice.choice(models)
        try:
            model.model_validate(given)
        except ValidationError as error:
            refused = _bad_parameter(error, tuple(model.model_fields))
            assert isinstance(refused, ProblemError)
            assert refused.detail.isascii()
            assert refused.detail.isprintable()
            tally["refused"] += 1
        else:
            tally["read"] += 1


@pytest.mark.parametrize("size", SIZES)
def test_fuzzed_runtime_files_are_read_or_endpoint_error(tmp_path: Path, size: int, tally: Counter[str]) -> None:
    """An endpoint, or `EndpointError`."""
    dice, path = random.Random("runtime"), tmp_path / "sidecar-1.json"
    original = json.dumps(
        {
            **{"service": "vitalsd", "schema": endpoint.SCHEMA, "app": "viewer", "app_version": None},
            **{"version": "1", "pid": 1, "start": 1, "boot_id": "x"},
            **{"host_scope": "r", "uid": 0, "target": {"pid": 2, "start": 3}, "socket": "/s", "host": "127.0.0.1"},
            **{"port": 9779, "token": "t", "started_at": "2026-01-01T00:00:00Z"},
        }
    ).encode()
    path.touch(0o600)
    path.write_bytes(original)
    assert endpoint.read(path).port == 9779
    for _ in range(450 * size):
        path.write_bytes(mutated(dice, original))
        try:
            endpoint.read(path)
            tally["read"] += 1
        except EndpointError:
            tally["refused"] += 1


@pytest.mark.parametrize("size", SIZES)
def test_fuzzed_run_files_are_read_or_unreadable_run(tmp_path: Path, size: int, tally: Counter[str]) -> None:
    """A run with its history, or `UnreadableRunError`: pages flipped, cut and exchanged, and values of any kind."""
    process, snapshots = Process(threads={(tid, 1): (f"worker {tid}", 0) for tid in range(1, 5)}), []
    for number in range(20):
        process.pass_time(1_000_000_000, [number, 5, 0, 1])
        snapshots.append(process.snapshot())
    box, _ = write(tmp_path / "runs", snapshots)
    box.close("over")
    (whole,) = (tmp_path / "runs").glob("*.sqlite")
    original, dice, path = whole.read_bytes(), random.Random("run"), tmp_path / "damaged.sqlite"
    for number in range(25 * size):
        if number % 2:
            path.write_bytes(scribbled(dice, original))
        else:
            path.write_bytes(original)
            exchange_values(dice, path)
        try:
            _, record = read_run(path)
        except UnreadableRunError:
            tally["refused"] += 1
            continue
        tally["read"] += 1
        table = history(record)
        json.loads(table.to_json())
        table.to_csv().decode()
        read_history(table.to_json())
        last = record.window(1000)
        if last is not None:
            json.loads(encode(last, record.identity, requested_ms=1000))


def scribbled(dice: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(dice.randrange(1, 8)):
        at = dice.randrange(100, len(changed))
        changed[at : at + 4] = dice.randbytes(4)
    return bytes(changed[: dice.randrange(1, len(changed))] if dice.randrange(5) == 0 else changed)


def exchange_values(dice: random.Random, path: Path) -> None:
    values = [
        None,
        -1,
        0,
        2**63 - 1,
        1.5,
        float("inf"),
        "",
        "x",
        "{}",
        "[]",
        b"",
        b"\xff",
        dice.randbytes(80),
        "9" * 400,
    ]
    columns = {
        "meta": ["key", "value"],
        "thread": ["tid", "birth", "name"],
        "segment": ["threads", "cpu_ns", "constants"],
        "frame": ["segment", "numbers", "moved", "code"],
    }
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        for _ in range(dice.randrange(1, 3)):
            table = dice.choice(list(columns))
            value, column = dice.choice(values), dice.choice(columns[table])
            key = "key" if table == "meta" else "id"
            row = f"(SELECT {key} FROM {table} LIMIT 1 OFFSET {dice.randrange(4)})"
            with suppress(sqlite3.Error):  # some the schema forbids
                db.execute(f"UPDATE {table} SET {column} = ? WHERE {key} = {row}", (value,))
