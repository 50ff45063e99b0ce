"""The bytes of an answer against the declared contract."""

import json
import math
import platform
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from support.snapshots import IDENTITY, SECOND, pairs, roster, snapshot, with_extras
from vitalsd.contract.encoding import Detail, Labels, Sort, encode, unavailable
from vitalsd.contract.host import RecordedHost, os_version
from vitalsd.contract.limits import ANSWER_BYTES, ANSWER_THREADS
from vitalsd.contract.metrics import FullMetrics, Measured, Unavailable, parse_runtime_metrics
from vitalsd.snapshot import Measurement, ProcessFigures, Snapshot, measure
from vitalsd.sources.base import AccessDeniedError, TargetGoneError
from vitalsd.text import iso

details = st.sampled_from(["basic", "full"])
sorts = st.sampled_from(["tid", "cpu", "name"])
limits = st.none() | st.integers(0, 10)

BASIC = {
    "sample_window_ms": int,
    "process": {"cpu_percent": float, "rss_kb": int, "vm_size_kb": int, "uptime_secs": float},
    "threads": [{"tid": int, "name": str, "cpu_percent": float}],
    "platform": str,
}
FULL = {
    "sample_window_ms": int,
    "process": {
        "cpu_percent": float,
        "rss_kb": int,
        "vm_size_kb": int,
        "uptime_secs": float,
        "user_percent": float,
        "system_percent": float,
        "cpu_percent_error": float,
        "wait_percent": float,
        "wait_percent_error": float,
        "children_percent": float,
        "footprint_kb": int,
        "anonymous_kb": int,
        "peak_rss_kb": int,
        "swap_kb": int,
        "thread_count": int,
        "open_fds": int,
        "minor_faults": int,
        "major_faults": int,
        "idle_wakeups": int,
        "interrupt_wakeups": int,
        "energy_nj": int,
        "p_core_percent": float,
        "qos_percent": {"utility": float},
    },
    "threads": [
        {
            "tid": int,
            "name": str,
            "cpu_percent": float,
            "user_percent": float,
            "system_percent": float,
            "cpu_percent_error": float,
            "wait_percent": float,
            "cpu_time_ns": int,
            "state": str,
            "priority": int,
            "born_in_window": bool,
        }
    ],
    "platform": str,
    "schema": int,
    "target": {"pid": int, "name": str, "started_at": str, "start_id": str},
    "window": {
        "requested_ms": int,
        "measured_ms": float,
        "mode": str,
        "started_at": str,
        "ended_at": str,
        "suspended": bool,
    },
    "accounting": {
        "process_percent": float,
        "living_percent": float,
        "exited_percent": float,
        "unattributed_percent": float,
    },
    "resolution": {"cpu_ns": int, "lag_ns": int, "source": str},
    "host": {"cpu_count": int, "os": str, "os_version": str, "arch": str},
    "machine": {
        "scope": str,
        "cpu_percent": float,
        "other_percent": float,
        "load_1m": float,
        "memory_available_kb": int,
        "swap_used_kb": int,
        "pressure_percent": {"cpu": float, "memory": float, "io": float},
        "memory_pressure": str,
        "quota_throttled_percent": float,
        "thermal_state": str,
    },
    "truncated": bool,
    "warnings": [str],
}


def shape(value: Any) -> Any:
    """The keys in their order and the types of a JSON value; of a list, its first element's."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(value[0])]
    return type(value)


def ordered(value: Any) -> Any:
    """Dicts as lists of pairs, so that == minds the order of keys."""
    if isinstance(value, dict):
        return [(key, ordered(item)) for key, item in value.items()]
    return [ordered(item) for item in value] if isinstance(value, list) else value


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for item in value.values():
            yield from numbers(item)
    elif isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, (int, float)):
        yield value


def full_measurement() -> Measurement:
    everything: dict[str, Any] = {name: 4096 * SECOND for name in ProcessFigures._fields if name != "qos_ns"}
    everything["qos_ns"] = {"utility": SECOND}
    first = with_extras(snapshot(SECOND, [(1, 1, 0), (2, 1, 0), (3, 1, 0)]), **everything)
    cpu_ns = 350_000_000
    last = snapshot(2 * SECOND, [(1, 1, 0), (2, 1, 200_000_000), (3, 1, 50_000_000), (9, 2, 100_000_000)])
    assert last.cpu_ns == cpu_ns
    return measure(first, with_extras(last, **{**everything, "user_ns": 4097 * SECOND}))


def read(measurement: Measurement, **options: Any) -> Any:
    return json.loads(encode(measurement, IDENTITY, requested_ms=1000, **options))


@pytest.mark.parametrize(("detail", "expected"), [("basic", BASIC), ("full", FULL)])
def test_basic_answer_has_the_keys_order_and_types_of_the_contract(detail: Detail, expected: Any) -> None:
    """Each key stands where existing readers know it, with the type they know."""
    measurement = full_measurement()
    answer = read(measurement, detail=detail)
    if detail == "full":
        answer["warnings"] = ["text"]
    assert ordered(shape(answer)) == ordered(expected)


def test_full_answer_begins_with_the_basic_keys() -> None:
    """detail=full adds keys after those of the basic answer and takes none away."""
    basic, full = read(full_measurement()), read(full_measurement(), detail="full")
    assert list(full)[:4] == list(basic)
    assert list(full["process"])[:4] == list(basic["process"])
    assert list(full["threads"][0])[:3] == list(basic["threads"][0])


@given(st.integers(10_000_000, 60_000_000_000), st.integers(0, 10_000_000), st.integers(0, 1000))
def test_error_bar_contains_the_rounded_figure(elapsed_ns: int, cpu_ns: int, skew_ns: int) -> None:
    """The exact figure lies within the bar around the rounded one, so the bar includes the rounding."""
    first = with_extras(snapshot(SECOND, [(1, 1, 0)], skew_ns=skew_ns))
    last = with_extras(snapshot(SECOND + elapsed_ns, [(1, 1, cpu_ns)]))
    measurement = measure(first, last)
    body = json.loads(encode(measurement, IDENTITY, requested_ms=1000, detail="full"))
    for stated, error_ns in (
        (body["process"], measurement.cpu_error_ns),
        (body["threads"][0], measurement.thread_error_ns(0)),
    ):
        counted, bar = 100 * cpu_ns / elapsed_ns, 100 * error_ns / elapsed_ns
        assert abs(stated["cpu_percent"] - counted) + bar <= stated["cpu_percent_error"] + 1e-9
        assert stated["cpu_percent_error"] <= bar + 0.002


def test_basic_answer_of_a_known_window_has_the_expected_figures() -> None:
    """Percent of one core over the measured time, KiB, seconds; a newborn reads 0 in the basic answer only."""
    basic = read(full_measurement())
    assert basic == {
        "sample_window_ms": 1000,
        "process": {"cpu_percent": 35.0, "rss_kb": 65536, "vm_size_kb": 131072, "uptime_secs": 2.0},
        "threads": [
            {"tid": 1, "name": "thread-1", "cpu_percent": 0.0},
            {"tid": 2, "name": "thread-2", "cpu_percent": 20.0},
            {"tid": 3, "name": "thread-3", "cpu_percent": 5.0},
            {"tid": 9, "name": "thread-9", "cpu_percent": 0.0},
        ],
        "platform": "linux",
    }
    full = read(full_measurement(), detail="full")
    assert [t["cpu_percent"] for t in full["threads"]] == [0.0, 20.0, 5.0, 10.0]
    assert [t["born_in_window"] for t in full["threads"]] == [False, False, False, True]
    assert full["accounting"] == {
        "process_percent": 35.0,
        "living_percent": 35.0,
        "exited_percent": 0.0,
        "unattributed_percent": 0.0,
    }


def test_unknown_figure_is_null_in_the_full_answer() -> None:
    """Unknown are the CPU of threads before an exec, and the machine of a replay."""
    first = with_extras(snapshot(SECOND, [(1, 1, 5)], image=("a",)))
    executed = measure(first, with_extras(snapshot(2 * SECOND, [(1, 1, 7)], image=("b",))))
    (thread,) = read(executed, detail="full")["threads"]
    nulls = ("cpu_percent", "user_percent", "system_percent", "cpu_percent_error")
    assert (thread["cpu_time_ns"], *map(thread.get, nulls)) == (7, None, None, None, None)
    assert read(executed)["threads"][0]["cpu_percent"] == 0.0
    replayed = read(executed, detail="full", host=RecordedHost())
    assert replayed["host"] == {"cpu_count": None, "os": "linux", "os_version": None, "arch": None}
    recorded = read(executed, detail="full", host=RecordedHost(version="14.5", arch="arm64", cpu_count=10))
    assert recorded["host"] == {"cpu_count": 10, "os": "linux", "os_version": "14.5", "arch": "arm64"}
    assert isinstance(parse_runtime_metrics(json.dumps(replayed).encode()), FullMetrics)


@given(pairs(), details, sorts, limits)
def test_answers_read_back_through_the_model_are_equal(
    pair: tuple[Snapshot, Snapshot], detail: Detail, sort: Sort, limit: int | None
) -> None:
    """The hand-written bytes and the declared model agree in every value, for any snapshots."""
    body = encode(measure(*pair), IDENTITY, requested_ms=1000, detail=detail, sort=sort, limit=limit)
    answer = parse_runtime_metrics(body)
    assert type(answer) is (FullMetrics if detail == "full" else Measured)
    written = json.loads(body)
    dumped = json.loads(answer.model_dump_json(by_alias=True, exclude_unset=True))
    if detail == "full":
        for part, key in (("target", "started_at"), ("window", "started_at"), ("window", "ended_at")):
            dumped[part][key] = written[part][key]
    assert dumped == written


@given(pairs(extras=True), details)
def test_answers_with_any_names_are_finite_ascii_json(pair: tuple[Snapshot, Snapshot], detail: Detail) -> None:
    """No NaN, no infinity, and no control or bidirectional character unescaped, whatever threads are called."""
    body = encode(measure(*pair), IDENTITY, requested_ms=1000, detail=detail)
    assert all(0x20 <= byte < 0x7F for byte in body)
    assert all(math.isfinite(number) for number in numbers(json.loads(body)))
    assert [t["name"] for t in json.loads(body)["threads"]] == list(pair[1].roster.names)


@given(pairs(extras=True))
def test_basic_answer_has_no_null(pair: tuple[Snapshot, Snapshot]) -> None:
    """A strict reader that knows no null can read every basic answer."""
    answer = read(measure(*pair))
    values = [answer, answer["process"], *answer["threads"]]
    assert all(value is not None for part in values for value in part.values())


@given(pairs(extras=True), sorts, limits)
def test_sort_before_limit_sets_truncated(pair: tuple[Snapshot, Snapshot], sort: Sort, limit: int | None) -> None:
    """Sort orders the whole list, limit cuts it afterwards, and `truncated` tells."""
    m = measure(*pair)
    everything = read(m, detail="full")["threads"]
    keys: dict[str, Callable[[Any], Any]] = {
        "tid": lambda t: t["tid"],
        "cpu": lambda t: -(t["cpu_percent"] or 0),
        "name": lambda t: t["name"],
    }
    key = keys[sort]
    answer = read(m, detail="full", sort=sort, limit=limit)
    assert [key(t) for t in answer["threads"]] == sorted(map(key, everything))[:limit]
    assert answer["truncated"] == (len(answer["threads"]) < len(everything))
    assert answer["process"] == read(m, detail="full")["process"]


def test_threads_with_equal_cpu_are_sorted_by_tid() -> None:
    """Busiest first, and among equals the lower tid first."""
    answer = read(full_measurement(), sort="cpu", detail="full")
    assert [t["tid"] for t in answer["threads"]] == [2, 9, 3, 1]
    idle = measure(snapshot(0, [(t, 1, 0) for t in (3, 5, 9)]), snapshot(1, [(t, 1, 0) for t in (3, 5, 9)]))
    assert [t["tid"] for t in read(idle, sort="cpu")["threads"]] == [3, 5, 9]


def test_answer_to_the_same_question_is_the_same_object() -> None:
    """The second caller with the same question gets the same object, not another rendering."""
    m = full_measurement()
    assert encode(m, IDENTITY, requested_ms=1000) is encode(m, IDENTITY, requested_ms=1000)
    assert encode(m, IDENTITY, requested_ms=1000, limit=1) != encode(m, IDENTITY, requested_ms=1000)


def test_labels_of_an_equal_copy_of_a_roster_are_made_once() -> None:
    """They are found by what the roster says; those of the last few rosters are kept."""
    labels = Labels()
    rosters = [roster([(tid, 1, 0)], ["main"]) for tid in range(Labels.KEPT + 1)]
    made = [labels.of(each) for each in rosters]
    assert made[3] == ['{"tid":3,"name":"main","cpu_percent":']
    assert all(labels.of(replace(each)) is kept for each, kept in zip(rosters[1:], made[1:], strict=True))
    assert labels.of(rosters[0]) is not made[0]


def of_many_threads(count: int, name: str) -> Measurement:
    """The thread with the highest tid burnt the most."""
    tids = range(1, count + 1)
    first = with_extras(snapshot(SECOND, (idle := [(tid, 1, 0) for tid in tids]), roster=roster(idle, [name] * count)))
    return measure(first, with_extras(snapshot(2 * SECOND, [(tid, 1, tid) for tid in tids], roster=first.roster)))


@pytest.mark.parametrize("detail", ["basic", "full"])
@pytest.mark.parametrize(("name", "least"), [("x", ANSWER_THREADS), ("\u202e" * 64, 7000)])
def test_answer_beyond_20000_threads_or_8_mib_is_truncated(detail: Detail, name: str, least: int) -> None:
    """Beyond 20 000 threads or 8 MiB the idlest are left out; the answer says so, and stays what readers know."""
    m = of_many_threads(ANSWER_THREADS + 1000, name)
    body = encode(m, IDENTITY, requested_ms=1000, detail=detail)
    assert len(body) <= ANSWER_BYTES
    answer = parse_runtime_metrics(body)
    assert isinstance(answer, Measured)
    assert answer.truncated
    assert least <= len(answer.threads) <= ANSWER_THREADS
    tids = [thread.tid for thread in answer.threads]
    assert tids == list(range(ANSWER_THREADS + 1001 - len(tids), ANSWER_THREADS + 1001))
    if isinstance(answer, FullMetrics):
        assert f"only the busiest {len(tids)} of 21000 threads are shown" in answer.warnings
    else:
        assert list(json.loads(body)) == [*BASIC, "truncated"]


def test_basic_answer_within_its_size_has_four_keys() -> None:
    """A client that sets a limit knows that threads are missing, so a reader of four keys gets four."""
    m = of_many_threads(ANSWER_THREADS, "x")
    for limit in (None, 1, 0):
        assert list(read(m, limit=limit)) == list(BASIC)
    assert read(m, limit=1, detail="full")["truncated"] is True


def test_unavailable_answer_has_three_keys_and_the_reason() -> None:
    """A failure has exactly the three keys, in order, with the source's own sentence as reason."""
    body = unavailable(TargetGoneError("target 4242 has exited"), platform="macos")
    assert body == b'{"platform":"macos","available":false,"reason":"target 4242 has exited"}'
    answer = parse_runtime_metrics(body)
    assert isinstance(answer, Unavailable)
    assert answer.reason == "target 4242 has exited"
    assert unavailable(AccessDeniedError("\u202e"), "linux").isascii()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"{}",
        b"[]",
        b'{"platform":"linux","available":true,"reason":"x"}',
        b'{"sample_window_ms":1,"process":{"cpu_percent":null,"rss_kb":1,"vm_size_kb":1,"uptime_secs":1.0},'
        b'"threads":[],"platform":"linux"}',
        b'{"sample_window_ms":1,"process":{"cpu_percent":NaN,"rss_kb":1,"vm_size_kb":1,"uptime_secs":1.0},'
        b'"threads":[],"platform":"linux"}',
    ],
)
def test_model_refuses_null_nan_and_a_third_variant(body: bytes) -> None:
    """The model accepts neither null nor NaN nor a third variant."""
    with pytest.raises(ValidationError):
        parse_runtime_metrics(body)


def test_times_are_iso_8601_utc_with_milliseconds() -> None:
    """ISO 8601 that sorts as text."""
    assert iso(1_790_000_000_123_456_789) == "2026-09-21T14:13:20.123Z"
    assert iso(0) == "1970-01-01T00:00:00.000Z"


@pytest.mark.parametrize(
    ("mac_version", "release", "shown"),
    [
        ("15.4", "24.4.0", "15.4"),
        ("16.0", "25.1.0", "26.1"),
        ("10.16", "20.6.0", "11.6"),
        ("26.2", "25.2.0", "26.2"),
        ("16.0", "unknown", "16.0"),
        ("", "6.1.0-amd64", "6.1.0-amd64"),
    ],
)
def test_os_version_of_a_python_with_an_older_sdk_is_the_real_one(
    monkeypatch: pytest.MonkeyPatch, mac_version: str, release: str, shown: str
) -> None:
    """MacOS 26 says 16 to it (python/cpython#135675); Darwin's release tells the truth."""
    monkeypatch.setattr(platform, "mac_ver", lambda: (mac_version, ("", "", ""), "arm64"))
    monkeypatch.setattr(platform, "release", lambda: release)
    assert os_version() == shown
