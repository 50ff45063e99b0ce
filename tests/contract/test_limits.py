"""The limits of requests and answers are what docs/reliability.md says: `vitalsd.contract.limits`."""

import re

import pytest

from support.paths import ROOT
from vitalsd.contract import limits


def kib(size: int) -> str:
    return f"{size >> 10} KiB"


def mib(size: int) -> str:
    return f"{size >> 20} MiB"


def number(value: int) -> str:
    """Format a number as the table does: groups of three, from five digits on."""
    return f"{value:,}".replace(",", " ") if value >= 10_000 else str(value)


KINDS = "of each kind of client"
ROWS = {
    "path and query": [kib(limits.TARGET_BYTES)],
    "head of a request": [kib(limits.HEAD_BYTES), f"{limits.HEADERS} headers"],
    "label of a mark": [f"{limits.LABEL_CHARACTERS} characters"],
    "body": [kib(limits.BODY_BYTES), f"`POST /report.zip`: {kib(limits.REPORT_BODY_BYTES)}"],
    "connections kept open until the client has read a report": [
        f"{limits.CLOSING_CONNECTIONS} of each kind",
        f"{limits.CLOSE_S:g} s each",
    ],
    "time for a request to arrive": [f"{limits.REQUEST_S:g} s"],
    "time for an answer to be read": [
        f"{limits.WRITE_S:g} s, or {kib(limits.WRITE_BYTES)} in each {limits.WRITE_S:g} s",
        f"{kib(limits.SEND_BYTES_PER_S)}/s",
    ],
    "connections": [
        f"{limits.CONNECTIONS} over TCP",
        f"{limits.OTHER_USERS_CONNECTIONS} of other users, {limits.OTHER_USERS_CONNECTIONS // 2} of one other user",
    ],
    "concurrent windows of one process that cannot share snapshots": [f"{limits.WINDOWS} {KINDS}"],
    "other processes sampled at once": [f"{limits.OTHER_PROCESSES} {KINDS}"],
    "streams": [f"{limits.STREAMS} {KINDS}", f"{limits.STREAM_QUEUE} answers are queued"],
    "threads and bytes of an answer": [number(limits.ANSWER_THREADS), mib(limits.ANSWER_BYTES)],
    "rows, numbers of threads, children and gauges, and gauges of `/history`": [
        number(limits.HISTORY_ROWS),
        number(limits.HISTORY_CELLS),
        number(limits.HISTORY_GAUGES),
    ],
    "wrong tokens": [f"{limits.BAD_TOKENS_PER_S} a second"],
    "large answers that clients have not yet read": [f"{mib(limits.SEND_BUDGET_BYTES)} {KINDS}"],
    "queued large answers, lists of runs and of processes, and scrapes": [f"{limits.WAITING_ANSWERS} {KINDS}"],
}
OF_NO_CONSTANT = {
    "snapshots of one process",
    "log lines of one kind",
    "error bodies",
}


def table() -> dict[str, str]:
    """Return name and value of each row of the limits."""
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    section = text.partition("## Limits")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|[^|]+\|$", section, re.MULTILINE)[1:])


def test_table_of_limits_has_a_row_for_each() -> None:
    """No bound of the table is without a constant, but for those that are no number of one place."""
    assert set(table()) == set(ROWS) | OF_NO_CONSTANT


@pytest.mark.parametrize(("bound", "values"), ROWS.items(), ids=ROWS)
def test_limit_is_what_the_documentation_says(bound: str, values: list[str]) -> None:
    """The row quotes the value of the constant."""
    for value in values:
        assert value in table()[bound]


def test_times_are_what_the_documentation_says_in_words() -> None:
    """An hour of a stream, a second and a minute of the log, a quarter of the descriptors."""
    assert (limits.STREAM_S, limits.LOG_LINE_S, limits.LOG_TRACEBACK_S, limits.DESCRIPTOR_SHARE) == (3600, 1, 60, 4)
    assert "for an hour each" in table()["streams"]
    assert table()["log lines of one kind"] == "1 a second, with a traceback 1 a minute (throttled)"
    assert "a quarter of the descriptors each" in table()["connections"]
