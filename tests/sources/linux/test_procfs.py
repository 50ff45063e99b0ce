"""Parsers of /proc text, over what kernels wrote and over anything at all."""

from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.paths import DATA
from vitalsd.sources.linux.procfs import (
    MalformedError,
    Stat,
    parse_schedstats,
    parse_stat,
    parse_statm,
    parse_status,
    parse_tgid,
)
from vitalsd.sources.names import decode_name

CAPTURE = DATA / "proc" / "4242"

counters = st.integers(0, 2**63 - 1)
comms = st.binary(max_size=15).filter(lambda raw: b"\0" not in raw)


def render_stat(stat: Stat, comm: bytes) -> bytes:
    """The line that fs/proc/array.c do_task_stat writes for these fields."""
    image, reaped = stat.image or (1, 1, 0), stat.reaped_ticks
    before = f"7 ({{}}) {stat.state} {stat.parent} 1 1 0 -1 {stat.flags} {stat.minor_faults} 0 {stat.major_faults} 0"
    after = (
        f" {stat.utime_ticks} {stat.stime_ticks} {reaped // 3} {reaped - reaped // 3} {stat.priority} 0"
        f" {stat.thread_count} 0 {stat.start_ticks} {stat.vm_bytes} 430 18446744073709551615"
        f" {image[0]} {image[1]} {image[2]}"
        f" 0 0 0 0 0 0 0 0 0 17 0 0 0 0 0 0 0 0 0 0 0 0 0 0\n"
    )
    head, tail = before.split("{}")
    return head.encode() + comm + (tail + after).encode()


stats = st.builds(
    Stat,
    name=st.just(""),
    state=st.sampled_from("RSDTtZXIP"),
    parent=st.integers(0, 2**31 - 1),
    flags=st.integers(0, 2**32 - 1),
    minor_faults=counters,
    major_faults=counters,
    utime_ticks=counters,
    stime_ticks=counters,
    reaped_ticks=counters,
    priority=st.integers(-100, 39),
    thread_count=counters,
    start_ticks=counters,
    vm_bytes=counters,
    image=st.just(()) | st.tuples(st.integers(2, 2**64 - 1), counters, counters),
)


@given(stats, comms)
def test_parse_stat_of_any_name_returns_the_written_fields(stat: Stat, comm: bytes) -> None:
    """Every stat line parses to the fields it was written from, whatever the thread is called."""
    assert parse_stat(render_stat(stat, comm)) == stat._replace(name=decode_name(comm))


def test_parse_stat_of_a_capture_returns_its_figures() -> None:
    """The capture of a running interpreter gives the figures that stand in it."""
    stat = parse_stat((CAPTURE / "stat").read_bytes())
    assert (stat.name, stat.state, stat.thread_count) == ("python3", "S", 4)
    assert (stat.utime_ticks, stat.stime_ticks, stat.reaped_ticks, stat.priority) == (14, 20, 0, 20)
    assert (stat.start_ticks, stat.vm_bytes) == (217667, 243703808)
    assert stat.image == (94461613871104, 94461613871445, 140728842644016)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("stat-parentheses", "(a b ) ( c d) "),
        ("stat-looks-like-fields", "a) R 1 ("),
        ("stat-newline", "x\ny\x1b[31m"),
        ("stat-invalid-utf8", "caf\u00e9\\xff\\xfe"),
        ("stat-empty-name", ""),
        ("stat-zombie", "sleep"),
        ("stat-another-user", "cat"),
        ("stat-kernel-thread", "kthreadd"),
    ],
)
def test_parse_stat_name_ends_at_the_last_parenthesis(file: str, name: str) -> None:
    r"""A name ends at the last parenthesis, and a byte that is no UTF-8 shows as \xNN."""
    stat = parse_stat((DATA / file).read_bytes())
    assert stat.name == name
    assert stat.state in "RSZI"
    assert stat.start_ticks >= 0


def test_parse_stat_hidden_addresses_are_empty() -> None:
    """The kernel writes 1 for addresses this user may not see, which is not taken for an address."""
    assert parse_stat((DATA / "stat-another-user").read_bytes()).image == ()


@pytest.mark.parametrize("length", range(0, 150, 7))
def test_parse_stat_truncated_is_malformed(length: int) -> None:
    """A line cut anywhere before the fields in use is refused, not read as smaller numbers."""
    content = (DATA / "stat-parentheses").read_bytes()
    with pytest.raises(MalformedError, match="stat"):
        parse_stat(content[: min(length, content.index(b" 3582 "))])


def test_malformed_names_the_file_and_quotes_its_start() -> None:
    """The error carries the file's name and the start of the content, and no more of it."""
    with pytest.raises(MalformedError) as caught:
        parse_statm(b"x" * 5000)
    assert str(caught.value) == f"unreadable content in statm: {b'x' * 64!r}"


def test_parse_statm_status_and_schedstat_of_captures_return_their_figures() -> None:
    """The other captures give the figures that stand in them, sizes in bytes."""
    assert parse_statm((CAPTURE / "statm").read_bytes()) == (59498, 3461, 1, 1686)
    sizes = parse_status((CAPTURE / "status").read_bytes())
    assert sizes["VmHWM"] == 13844 * 1024
    assert sizes["VmSwap"] == 0
    assert parse_status(b"Name:\ta\nRssAnon:\t     420 kB\n") == {"RssAnon": 420 * 1024}
    assert parse_schedstats([(CAPTURE / "task" / "4242" / "schedstat").read_bytes()]) == ([346466470], [159250])


@given(st.lists(st.tuples(counters, counters, counters)))
def test_parse_schedstats_returns_each_run_time_in_order(threads: list[tuple[int, int, int]]) -> None:
    """The first two numbers of each schedstat are that thread's run time and wait, in order, however many there are."""
    contents = [f"{run} {wait} {slices}\n".encode() for run, wait, slices in threads]
    assert parse_schedstats(contents) == ([run for run, _, _ in threads], [wait for _, wait, _ in threads])


@pytest.mark.parametrize(
    "contents",
    [
        [b""],
        [b"1 2"],
        [b"1 2 3", b""],
        [b"1 2 3 4"],
        [b"1 2", b"3 4 5 6"],
        [b"-1 2 3"],
        [b"x 2 3"],
        [b"1.5 2 3"],
        [b"1 -2 3"],
        [b"1 x 3"],
    ],
)
def test_parse_schedstats_of_another_shape_is_malformed(contents: list[bytes]) -> None:
    """A thread's missing or surplus numbers are never made up by a neighbour's."""
    with pytest.raises(MalformedError, match="schedstat"):
        parse_schedstats(contents)


@given(comms)
def test_decode_name_of_any_bytes_has_no_surrogates(raw: bytes) -> None:
    """Any name can be written as UTF-8, and one that was UTF-8 comes back byte for byte."""
    written = decode_name(raw).encode("utf-8")
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        assert b"\\x" in written
    else:
        assert written == raw


@pytest.mark.parametrize(
    "parse",
    [parse_stat, parse_statm, parse_status, lambda content: parse_schedstats([content, content]), parse_tgid],
    ids=["stat", "statm", "status", "schedstat", "tgid"],
)
@given(
    content=st.binary()
    | st.binary(max_size=8).map(lambda number: b"Name:\ta\nTgid:\t" + number)
    | st.text("0123456789-+_. ()RSZ\n\tVmkB:e", max_size=400).map(str.encode)
    | st.lists(st.integers().map(str) | st.sampled_from(["7", "(a)", "S", "9" * 5000])).map(
        lambda words: " ".join(words).encode()
    )
)
def test_parsers_of_any_bytes_raise_only_malformed(parse: Callable[[bytes], object], content: bytes) -> None:
    """No content makes a parser raise anything but MalformedError."""
    with suppress(MalformedError):
        parse(content)
