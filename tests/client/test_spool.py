"""Reports on their way: `vitalsd_client.spool`, `states` and `upload`, to the example receiver and to bad servers."""

import errno
import fcntl
import hashlib
import io
import json
import logging
import os
import random
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.misbehaving import Behaviour, Misbehaving, answer, drips, floods, hangs, resets, says
from support.paths import TESTS
from support.receivers import receiving, receiving_badly
from support.sidecars import VITALSD, environment
from support.stopwatch import Stopwatch
from vitalsd.contract.report_archive import new_report_id, seal
from vitalsd_client import Bundle, Spool, SpoolError, spool_sender
from vitalsd_client.spool_lock import locked
from vitalsd_client.spool_store import Entry
from vitalsd_client.upload import UploadFailure, UploadReceipt, retry_after_s
from vitalsd_client.upload_url import check_url

MOMENT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
PROMISE_S = 2.0
"""Beyond its deadline an attempt takes at most so long."""


def a_bundle(size: int = 1000) -> Bundle:
    return seal("ryll", new_report_id(), MOMENT, {"metadata.json": b"{}", "noise": os.urandom(size)}, [])


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[str]:
    with receiving(tmp_path / "store") as url:
        yield url


def stored(tmp_path: Path) -> list[str]:
    """Ids of the reports that the receiver keeps, each a whole zip with that id inside."""
    found = []
    for path in sorted((tmp_path / "store").iterdir()):
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
            assert json.loads(archive.read("manifest.json"))["report_id"] == path.stem
        found.append(path.stem)
    return found


def states(spool: Spool) -> dict[str, str]:
    return {entry.report_id: entry.state for entry in spool.entries()}


def only(spool: Spool) -> Entry:
    (entry,) = spool.entries()
    return entry


def spooling(directory: Path, url: str | None = None, **options: Any) -> Spool:
    return Spool(directory / "spool", url, **{"attempt_s": 5.0, "first_delay_s": 0.0, **options})


# Well


def test_spool_sent_report_has_a_receipt_and_is_removed(tmp_path: Path, receiver: str) -> None:
    """Stored once at the other end; the receipt is here, and the report is not any more."""
    spool = spooling(tmp_path, receiver)
    bundle = a_bundle(500_000)
    seen: list[tuple[int, int]] = []
    assert spool.add(bundle) == bundle.report_id
    assert spool.add(bundle) == bundle.report_id, "a second time changes nothing"
    assert only(spool).state == "pending"
    (outcome,) = spool.send(progress=lambda entry, sent, total: seen.append((sent, total)))
    assert outcome.attempt == UploadReceipt(f"R-{bundle.report_id[:12]}")
    assert stored(tmp_path) == [bundle.report_id]
    assert (tmp_path / "store" / f"{bundle.report_id}.zip").read_bytes() == bundle.zip()
    assert (only(spool).state, only(spool).note, only(spool).size) == ("done", f"R-{bundle.report_id[:12]}", 0)
    assert spool.send() == []
    size = len(bundle.zip())
    assert seen[-1] == (size, size)
    assert len(seen) > 3
    assert seen == sorted(seen)


def test_spool_files_are_private_under_every_umask(tmp_path: Path, receiver: str) -> None:
    """0700 and 0600 under every umask, in every state."""
    old = os.umask(0)
    try:
        spool = spooling(tmp_path, receiver)
        spool.add(a_bundle())
        spool.send()
        spool.add(a_bundle())
    finally:
        os.umask(old)
    for path in (tmp_path / "spool").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


@pytest.mark.parametrize("number", ["1e999", "-1e18", "1" + 400 * "0", "NaN", '"soon"'])
def test_spool_with_a_damaged_note_lists_and_sends_the_report(tmp_path: Path, receiver: str, number: str) -> None:
    """Numbers that are none: the report is listed, and sent."""
    spool = spooling(tmp_path, receiver)
    report_id = spool.add(a_bundle())
    note = f'{{"url": null, "added": {number}, "attempts": {number}, "not_before": {number}}}'
    (tmp_path / "spool" / "pending" / f"{report_id}.json").write_text(note)
    assert only(spool).attempts == 0
    assert datetime.fromtimestamp(only(spool).added, UTC).year >= 1970
    assert [outcome.report_id for outcome in spool.send()] == [report_id]


def test_spool_after_a_restart_keeps_reports_urls_and_attempts(tmp_path: Path, receiver: str) -> None:
    """Reports, their URL, and the number of attempts are there for the next process; it needs no URL of its own."""
    with Misbehaving(says(answer(b"", status="500 No"))) as bad:
        spooling(tmp_path, bad.url).add(a_bundle())
        spooling(tmp_path).send()
    later = spooling(tmp_path)
    assert (only(later).attempts, only(later).note) == (1, "the server answered 500")
    note = tmp_path / "spool" / "pending" / f"{only(later).report_id}.json"
    note.write_text("damaged")
    assert isinstance(later.send()[0].attempt, UploadFailure), "without its note the URL is not known"
    assert isinstance(spooling(tmp_path, receiver).send()[0].attempt, UploadReceipt)


def test_receiver_refuses_invalid_reports_and_stores_nothing(tmp_path: Path, receiver: str) -> None:
    """Contents other than in the manifest, too large, with bad names or another key, are refused and not stored."""

    def post(content: bytes, key: str = "0" * 32, sha256: str | None = None) -> int:
        headers = {"Idempotency-Key": key, "X-Content-SHA256": sha256 or hashlib.sha256(content).hexdigest()}
        return httpx.post(receiver, files={"report": content}, headers=headers, trust_env=False).status_code

    def zipped(method: int = zipfile.ZIP_DEFLATED, sizes: int | None = None, **members: bytes) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", method) as archive:
            for name, content in members.items():
                archive.writestr(name.replace("_json", ".json"), content)
            for info in archive.infolist():
                info.file_size = info.file_size if sizes is None else sizes
        return out.getvalue()

    manifest = json.dumps({"report_id": "0" * 32, "members": []}).encode()
    assert post(b"no zip") == 422
    assert post(zipped(a=b"")) == 422
    assert post(zipped(a=b"", manifest_json=manifest)) == 422
    assert post(zipped(manifest_json=b"[]")) == 422
    assert post(zipped(zipfile.ZIP_DEFLATED, None, **{"../a": b"", "manifest_json": manifest})) == 422
    assert post(zipped(a=b"\0" * 10_000_000, manifest_json=manifest)) == 422
    assert post(zipped(zipfile.ZIP_BZIP2, manifest_json=manifest)) == 422
    damaged = bytearray(zipped(manifest_json=manifest))
    damaged[30 + len("manifest.json")] = 0xFF  # the first byte after the local header
    assert post(bytes(damaged)) == 422
    bomb = zipped(a=b"\0" * 50_000_000, sizes=100)
    tracemalloc.start()
    assert post(bomb) == 422
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000, "no more is unpacked than the header says"
    good = a_bundle()
    assert post(good.zip(), "1" * 32) == 422
    assert post(good.zip(), "../../x") == 400
    assert post(good.zip(), good.report_id, "0" * 64) == 408
    assert stored(tmp_path) == []
    assert [post(good.zip(), good.report_id) for _ in range(2)] == [201, 201]
    other = seal("ryll", good.report_id, MOMENT, {"other": b""}, [])
    assert post(other.zip(), good.report_id) == 409
    assert stored(tmp_path) == [good.report_id]


# Bad servers


RECEIPT = b'{"receipt": "R", "report_id": "0", "sha256": "0"}'
ENDINGS: dict[str, tuple[Behaviour, str, bool]] = {
    "400": (says(answer(b"", status="400 No")), "answered 400", True),
    "401": (says(answer(b"", status="401 No")), "answered 401", True),
    "404": (says(answer(b"", status="404 No")), "answered 404", True),
    "413": (says(answer(b"", status="413 No")), "answered 413", True),
    "422": (says(answer(b"", status="422 No")), "answered 422", True),
    "408": (says(answer(b"", status="408 No")), "answered 408", False),
    "425": (says(answer(b"", status="425 No")), "answered 425", False),
    "429": (says(answer(b"", status="429 No")), "answered 429", False),
    "500": (says(answer(b"", status="500 No")), "answered 500", False),
    "503": (says(answer(b"", status="503 No")), "answered 503", False),
    "redirect": (says(answer(b"", status="307 Go", extra="Location: http://169.254.169.254/\r\n")), "redirects", True),
    "no receipt": (says(answer(b"{}")), "without a receipt", False),
    "portal": (says(answer(b"<html>", kind="text/html")), "without a receipt", False),
    "another's receipt": (says(answer(RECEIPT)), "for something else", False),
    "empty receipt": (says(answer(RECEIPT.replace(b'"R"', b'""'))), "has no number", False),
    "closed": (says(b""), "disconnected", False),
    "reset": (resets, "Error", False),
    "truncated": (says(answer(RECEIPT)[:-5]), "incomplete|closed", False),
    "half an answer": (says(b"HTTP/1.1 200 OK\r\n\r\n{"), "without a receipt", False),
    "garbage": (says(b"\0\xff\r\n\r\n"), "ProtocolError", False),
    "hangs": (hangs(), "no answer within 0.7 s", False),
    "hangs in the body": (hangs(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"), "no answer within 0.7 s", False),
    "drips head": (drips(b"HTTP/1.1 200 OK\r\n", b"A: b\r\n"), "no answer within 0.7 s", False),
    "drips body": (drips(b"HTTP/1.1 200 OK\r\n\r\n", b" "), "no answer within 0.7 s", False),
    "endless body": (floods(b"HTTP/1.1 200 OK\r\n\r\n", b" " * 4096), "does not end", False),
    "endless head": (floods(b"HTTP/1.1 200 OK\r\nA: ", b"b" * 4096), "ProtocolError", False),
    "gzip bomb": (
        floods(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n", b"\x1f\x8b\x08" + b"\0" * 4093),
        "does not end",
        False,
    ),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_spool_with_a_faulty_server_keeps_the_report_with_a_reason(tmp_path: Path, ending: str, receiver: str) -> None:
    """The attempt ends in time, is retried or final, and a good server gets the report later."""
    behaviour, expected, final = ENDINGS[ending]
    with Misbehaving(behaviour) as server:
        spool = spooling(tmp_path, server.url, attempt_s=0.7)
        report_id = spool.add(a_bundle())
        watch = Stopwatch()
        (outcome,) = spool.send()
        assert watch.elapsed_s < watch.allowed_s(0.7 + PROMISE_S)
        assert isinstance(outcome.attempt, UploadFailure)
        assert outcome.attempt.final == final, outcome.attempt.reason
        assert any(part in outcome.attempt.reason for part in expected.split("|")), outcome.attempt.reason
        assert states(spool) == {report_id: "failed" if final else "pending"}
        for request in server.requests:
            assert b"idempotency-key: " + report_id.encode() in request.lower()
        assert len(server.requests) == 1, "one attempt is one request"
        assert spool.retry(report_id) == final
    note = tmp_path / "spool" / "pending" / f"{report_id}.json"
    note.write_text(json.dumps({"url": receiver}))
    (outcome,) = spooling(tmp_path).send()
    assert isinstance(outcome.attempt, UploadReceipt)


def test_spool_retries_send_identical_bytes(tmp_path: Path) -> None:
    """Key, boundary and body are those of the first attempt."""
    with Misbehaving(says(answer(b"", status="503 No"))) as server:
        spool = spooling(tmp_path, server.url)
        spool.add(a_bundle())
        spool.send()
        spooling(tmp_path).send()
    assert len(server.requests) == 2
    assert len(set(server.requests)) == 1


def test_spool_retry_after_survives_a_restart_and_a_wrong_clock_is_ignored(tmp_path: Path) -> None:
    """The server's wish outlasts a restart and a user's impatience; a time that is far too far away is ignored."""
    now = [1_000_000.0]
    with Misbehaving(says(answer(b"", status="503 No", extra="Retry-After: 600\r\n"))) as server:

        def spool() -> Spool:
            return spooling(tmp_path, server.url, clock=lambda: now[0])

        spool().add(a_bundle())
        assert len(spool().send()) == 1
        assert spool().send() == []
        assert spool().send(ignore_delays=True) == []
        now[0] += 601
        assert len(spool().send()) == 1
        now[0] -= 10 * 86_400
        assert len(spool().send()) == 1


def test_spool_backoff_doubles_up_to_900_s_with_full_jitter(tmp_path: Path) -> None:
    """1, 2, 4 … 900 s times a number from 0 to 1; a user need not wait for them."""
    now, part = [0.0], [1.0]
    with Misbehaving(says(answer(b"", status="500 No"))) as server:
        spool = Spool(tmp_path / "spool", server.url, clock=lambda: now[0], jitter=lambda: part[0])
        spool.add(a_bundle())
        delays = []
        for _ in range(12):
            assert len(spool.send()) == 1
            delays.append(only(spool).not_before - now[0])
            assert spool.send() == []
            now[0] = only(spool).not_before
        assert delays == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 900, 900]
        assert len(spool.send()) == 1
        assert len(spool.send(ignore_delays=True)) == 1
        part[0] = 0.25
        now[0] = only(spool).not_before
        assert len(spool.send()) == 1
        assert only(spool).not_before - now[0] == 225


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, 0),
        ("", 0),
        ("120", 120),
        ("999999999999999999999", 86_400),
        ("-5", 0),
        ("1e9", 0),
        ("inf", 0),
        ("soon", 0),
        ("٣", 0),
        (format_datetime(datetime.fromtimestamp(1060, UTC), usegmt=True), 60),
        (format_datetime(datetime.fromtimestamp(0, UTC), usegmt=True), 0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 86_400),
    ],
)
def test_retry_after_seconds_dates_and_nonsense_are_parsed(header: str | None, seconds: float) -> None:
    """Seconds or a date, a day at most, and nonsense is nothing."""
    assert retry_after_s(header, now=1000) == seconds


def test_spool_send_with_wait_retries_until_all_are_sent(tmp_path: Path) -> None:
    """send(wait_s=) tries again at the due times, and ends as soon as nothing is left."""
    with receiving_badly(tmp_path / "store", seed=3, fraction=0.8) as url:
        spool = spooling(tmp_path, url, attempt_s=0.5, longest_delay_s=0.05, first_delay_s=0.01)
        ids = sorted(spool.add(a_bundle()) for _ in range(4))
        spool.send(wait_s=30)
        assert set(states(spool).values()) == {"done"}
        assert stored(tmp_path) == ids


@pytest.mark.parametrize(
    "url",
    [
        "",
        "x",
        "ftp://127.0.0.1/",
        "http://example.com/r",
        "http://10.0.0.1/",
        "https://u:p@example.com/",
        "file:///etc",
        "http://",
    ],
)
def test_spool_url_must_be_https_or_this_machine(tmp_path: Path, url: str) -> None:
    """https, or http on this machine, and no password in the URL; not even if a note says so."""
    with pytest.raises(ValueError, match=r"https|password"):
        check_url(url)
    with pytest.raises(ValueError, match=r"https|password"):
        Spool(tmp_path / "spool", url)
    spool = spooling(tmp_path, "https://example.com/r")
    report_id = spool.add(a_bundle())
    (tmp_path / "spool" / "pending" / f"{report_id}.json").write_text(json.dumps({"url": url}))
    (outcome,) = spool.send()
    assert isinstance(outcome.attempt, UploadFailure)
    assert states(spool) == {report_id: "pending"}


def test_spool_ignores_proxies_of_the_environment(
    tmp_path: Path, receiver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report never reaches them; one that is given is used."""
    with Misbehaving(says(b"")) as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        spooling(tmp_path, receiver).add(a_bundle())
        assert isinstance(spooling(tmp_path).send()[0].attempt, UploadReceipt)
        assert proxy.requests == []
        spooling(tmp_path, receiver).add(a_bundle())
        assert isinstance(spooling(tmp_path, proxy=proxy.url).send()[0].attempt, UploadFailure)
        assert len(proxy.requests) == 1


@pytest.mark.parametrize("proxy", ["", "foo", "user:secret@proxy:3128", "ftp://127.0.0.1/", "http://", "http://h:x"])
def test_spool_with_a_bad_proxy_is_refused_at_once(tmp_path: Path, proxy: str) -> None:
    """The constructor refuses it, and not a later upload; the error does not contain a password."""
    with pytest.raises(ValueError, match="proxy is not the URL of one") as raised:
        spooling(tmp_path, proxy=proxy)
    assert "secret" not in str(raised.value)


def test_spool_progress_that_raises_is_logged_once_and_sending_continues(
    tmp_path: Path, receiver: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The exception affects no report; it is logged once, and the function is not called again."""
    spool = spooling(tmp_path, receiver)
    ids = [spool.add(a_bundle(500_000)) for _ in range(2)]
    calls: list[int] = []

    def progress(entry: Entry, sent: int, total: int) -> None:
        calls.append(sent)
        raise RuntimeError("the window is closed")

    assert all(isinstance(outcome.attempt, UploadReceipt) for outcome in spool.send(progress=progress))
    assert states(spool) == dict.fromkeys(ids, "done")
    assert [record.getMessage() for record in caplog.records if record.name == "vitalsd_client"] == [
        "progress raised RuntimeError and is not called again"
    ]
    assert len(calls) == 1


def test_send_logs_no_request_of_its_own(tmp_path: Path, receiver: str, caplog: pytest.LogCaptureFixture) -> None:
    """
    Write no line of httpx into the log of the host program, which would name the URL.

    The lines of another user of httpx stay, on other threads, in the progress function and afterwards.
    """
    caplog.set_level(logging.INFO)
    ends, threads = threading.Event(), []

    def ask(count: int = 1) -> None:
        with httpx.Client(trust_env=False) as client:
            for _ in range(count):
                client.get(receiver)

    def asks_all_the_time() -> None:
        while not ends.is_set():
            ask()
            threads.append(threading.get_ident())

    spool = spooling(tmp_path, receiver)
    ids = [spool.add(a_bundle()) for _ in range(5)]
    asking = threading.Thread(target=asks_all_the_time)
    asking.start()
    asked_here = 0

    def progress(entry: Entry, sent: int, total: int) -> None:
        nonlocal asked_here
        ask()
        asked_here += 1

    spool.send(progress=progress)
    ends.set()
    asking.join()
    ask()
    assert states(spool) == dict.fromkeys(ids, "done")
    lines = [record for record in caplog.records if record.name.partition(".")[0] in ("httpx", "httpcore")]
    assert asked_here >= 5
    assert len(lines) == len(threads) + asked_here + 1
    assert all("GET" in line.getMessage() for line in lines)
    assert logging.getLogger("httpx").filters == []


def test_spool_wait_of_nan_is_refused(tmp_path: Path) -> None:
    """A wait of nan would never end."""
    spool = spooling(tmp_path, "https://example.com/")
    with pytest.raises(ValueError, match="wait_s"):
        spool.send(wait_s=float("nan"))


# Bounds


def test_spool_at_its_limits_evicts_the_oldest(tmp_path: Path, receiver: str, caplog: pytest.LogCaptureFixture) -> None:
    """The limits are a number and bytes; receipts are evicted first, and an unsent report with a warning."""
    now = [1000.0]
    spool = spooling(tmp_path, receiver, max_reports=3, max_bytes=9000, clock=lambda: now[0])
    sent = spool.add(a_bundle())
    spool.send()
    ids = []
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            now[0] += 1
            ids.append(spool.add(a_bundle()))
        assert sent not in states(spool)
        assert not caplog.records
        now[0] += 1
        ids.append(spool.add(a_bundle()))
        assert list(states(spool)) == ids[1:]
        assert caplog.messages == [f"dropped the pending report {ids[0]}: the spool is full"]
        now[0] += 1
        large = spool.add(a_bundle(6000))
        assert list(states(spool)) == [ids[3], large]
        with pytest.raises(SpoolError, match="the spool holds 9000"):
            spool.add(a_bundle(10_000))
        assert list(states(spool)) == [ids[3], large]


DAY_S = 86_400.0
YEAR_S = 365 * DAY_S


@pytest.fixture
def refusing() -> Iterator[str]:
    """Run a server that has no time now, on every attempt; give its URL."""
    with Misbehaving(says(answer(b"", status="503 No"))) as server:
        yield server.url


def test_spool_report_tried_and_too_old_is_dropped(
    tmp_path: Path, refusing: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Drop a report 30 days after its first attempt, pending or refused, and say so; a receipt goes without a word."""
    now = [1.7e9]

    def spool(url: str | None = None) -> Spool:
        return spooling(tmp_path, url, clock=lambda: now[0])

    with Misbehaving(says(answer(b"", status="400 No"))) as server:
        failed = spool(server.url).add(a_bundle())
        spool().send()
    pending = spool(refusing).add(a_bundle())
    spool().send()
    with receiving(tmp_path / "store") as url:
        spool().send(report_id=spool(url).add(a_bundle()))
    assert sorted(states(spool()).values()) == ["done", "failed", "pending"]
    for _ in range(4):
        now[0] += 7 * DAY_S
        spool().send(ignore_delays=True)
        assert spool().prune() == []
    now[0] += 3 * DAY_S
    caplog.clear()
    assert len(spool().prune()) == 3
    assert sorted(caplog.messages) == [
        f"dropped the failed report {failed}: it is too old",
        f"dropped the pending report {pending}: it is too old",
    ]
    assert states(spool()) == {}


@pytest.mark.parametrize("step_s", [3 * YEAR_S, -3 * YEAR_S, 56 * YEAR_S, 31 * DAY_S], ids=str)
def test_spool_clock_set_before_the_first_attempt_keeps_the_report(
    tmp_path: Path, receiver: str, step_s: float
) -> None:
    """Keep a report that was never tried, whatever the clock was when it was added, and send it."""
    now = [1.7e9]

    def spool() -> Spool:
        return spooling(tmp_path, receiver, clock=lambda: now[0])

    first = spool().add(a_bundle())
    now[0] += step_s
    second = spool().add(a_bundle())
    assert states(spool()) == {first: "pending", second: "pending"}
    now[0] += 400 * DAY_S
    assert spool().prune() == [], "nor does waiting alone make it too old"
    assert len(spool().send()) == 2
    assert set(states(spool()).values()) == {"done"}


@pytest.mark.parametrize("step_s", [3 * YEAR_S, -3 * YEAR_S, 56 * YEAR_S, 31 * DAY_S, 400_000 * YEAR_S, 1e300], ids=str)
@pytest.mark.parametrize("status", ["503 No", "400 No"])
def test_spool_clock_set_after_an_attempt_keeps_the_report(
    tmp_path: Path, receiver: str, step_s: float, status: str
) -> None:
    """Keep a report that was tried or refused at a wrong clock, for days, and when the clock goes wrong again."""
    now = [1.7e9]

    def spool() -> Spool:
        return spooling(tmp_path, clock=lambda: now[0])

    with Misbehaving(says(answer(b"", status=status))) as server:
        report_id = spooling(tmp_path, server.url, clock=lambda: now[0]).add(a_bundle())
        for _ in range(4):
            for step in step_s, -step_s:
                spool().send(ignore_delays=True)
                now[0] += step
                assert spool().prune() == []
                now[0] += DAY_S
                spool().add(a_bundle())
    assert states(spool())[report_id] == ("failed" if status == "400 No" else "pending")
    assert datetime.fromtimestamp(only_of(spool(), report_id).added, UTC).year >= 1970
    if status == "503 No":
        spooling(tmp_path, receiver, clock=lambda: now[0]).readdress(report_id)
        (outcome,) = spooling(tmp_path, receiver).send(report_id=report_id)
        assert isinstance(outcome.attempt, UploadReceipt)


def only_of(spool: Spool, report_id: str) -> Entry:
    (entry,) = (entry for entry in spool.entries() if entry.report_id == report_id)
    return entry


@pytest.mark.parametrize("now", [-1e9, 0.0, 1e15, 1e300, float("inf"), float("nan")], ids=str)
def test_spool_clock_impossible_sends(tmp_path: Path, receiver: str, now: float) -> None:
    """Add, list, send and prune at a clock before 1970 and beyond the year 9999."""
    spool = spooling(tmp_path, receiver, clock=lambda: now)
    report_id = spool.add(a_bundle())
    assert datetime.fromtimestamp(only(spool).added, UTC).year >= 1970
    assert len(spool.send()) == 1
    spool.add(a_bundle())
    assert spool.prune() == []
    assert states(spooling(tmp_path))[report_id] == "done"


def test_spool_file_times_impossible_lists(tmp_path: Path) -> None:
    """List a report without a note with a valid date, if its file is older than 1970 or newer than the year 9999."""
    spool = spooling(tmp_path, "https://example.com/")
    report_id = spool.add(a_bundle())
    (tmp_path / "spool" / "pending" / f"{report_id}.json").unlink()
    for seconds in -1e6, 2.0**40:
        os.utime(tmp_path / "spool" / "pending" / f"{report_id}.zip", (seconds, seconds))
        assert 1970 <= datetime.fromtimestamp(only(spool).added, UTC).year <= 9999


def test_spool_clock_file_damaged_or_lost_keeps_the_report(tmp_path: Path, refusing: str) -> None:
    """Go on with the clock as it is when the file with its steps is no such file, or is gone."""
    now = [1.7e9]

    def spool() -> Spool:
        return spooling(tmp_path, refusing, clock=lambda: now[0])

    report_id = spool().add(a_bundle())
    spool().send()
    file = tmp_path / "spool" / "clock"
    for damaged in "", "[]", '{"used": null}', '{"used": NaN, "steps": 0}', '{"used": 1e999, "steps": 1}', "[" * 9999:
        file.write_text(damaged)
        now[0] += DAY_S
        spool().send()
        assert spool().prune() == []
        file.unlink()
    os.mkfifo(file)
    assert spool().prune() == []
    file.unlink()
    now[0] -= 3 * YEAR_S
    spool().send(ignore_delays=True)
    now[0] += 3 * YEAR_S
    assert spool().prune() == []
    assert states(spool()) == {report_id: "pending"}


def test_sweep_clock_set_spares_a_file_being_written(tmp_path: Path) -> None:
    """Keep a file that a writer began before the clock was set; remove one that was old already."""
    now = time.time() - 3 * YEAR_S
    spooling(tmp_path, clock=lambda: now).prune()
    begun, left = (f"{digit * 32}.zip.{digit * 16}" for digit in "12")
    for name, age_s in (begun, 1.0), (left, 2 * 3600.0):
        path = tmp_path / "spool" / "new" / name
        path.touch()
        os.utime(path, (now - age_s, now - age_s))
    spooling(tmp_path).prune()
    assert [path.name for path in (tmp_path / "spool" / "new").iterdir()] == [begun]


def test_sweep_removes_old_unfinished_files_of_dead_writers(tmp_path: Path) -> None:
    """Unfinished files and notes without a report, once they are old; what others put there is no report."""
    spool = spooling(tmp_path, "https://example.com/")
    folder = tmp_path / "spool"
    left = [folder / "new" / f"{'1' * 32}.zip.{'1' * 16}", folder / "new" / f"clock.{'1' * 16}"]
    left.append(folder / "pending" / f"{'1' * 32}.json")
    for path in left:
        path.write_text('{"url": null, "added": 1.0, "attempts": 0}')
    spool.prune()
    assert all(path.exists() for path in left)
    for path in left:
        os.utime(path, (1, 1))
    spool.prune()
    assert not any(path.exists() for path in left)
    os.mkfifo(folder / "pending" / f"{'2' * 32}.zip")
    (folder / "pending" / f"{'3' * 32}.zip").symlink_to("/etc/passwd")
    (folder / "pending" / "passwd.zip").write_text("x")
    assert spool.entries() == []
    assert spool.send() == []


def test_spool_drop_and_retry_by_id_leave_a_report_being_sent(tmp_path: Path) -> None:
    """An id never becomes a path; a report that is being sent is left alone."""
    with Misbehaving(says(answer(b"", status="400 No"))) as server:
        spool = spooling(tmp_path, server.url)
        report_id = spool.add(a_bundle())
        spool.send()
        assert states(spool) == {report_id: "failed"}
        assert spool.send() == []
        assert spool.retry(report_id)
        assert not spool.retry(report_id)
        assert len(spool.send()) == 1
        assert spool.drop(report_id)
        assert not spool.drop(report_id)
        assert not spool.drop("../../../etc/passwd")
        assert list((tmp_path / "spool").rglob("*.*")) == []
    with Misbehaving(hangs()) as server:
        spool = spooling(tmp_path, server.url, attempt_s=1.0)
        report_id = spool.add(a_bundle())
        sending = threading.Thread(target=spool.send)
        sending.start()
        while not server.requests:
            time.sleep(0.01)
        with pytest.raises(SpoolError, match="being sent right now"):
            spool.drop(report_id)
        with pytest.raises(SpoolError, match="being sent right now"):
            spool.readdress(report_id)
        assert spool.send() == [], "a second sender leaves it alone"
        sending.join()
        assert spool.drop(report_id)


NO_LOCKS = ["ENOLCK", "ENOSYS", "EOPNOTSUPP", "ENOTSUP", "EINVAL"]


def without_locks(monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """Have flock(2) fail, as on NFS without lockd and on some file systems in user space."""

    def flock(fd: int, operation: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("name", NO_LOCKS)
def test_spool_without_locks_works(tmp_path: Path, receiver: str, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Add, send, retry, readdress and drop reports; nothing is left that was not there with locks."""
    without_locks(monkeypatch, getattr(errno, name))
    with Misbehaving(says(answer(b"", status="400 No"))) as server:
        spool = spooling(tmp_path, server.url)
        failed = spool.add(a_bundle())
        assert len(spool.send()) == 1
        assert states(spool) == {failed: "failed"}
        assert spool.retry(failed)
        assert spooling(tmp_path, receiver).readdress(failed)
    assert len(spooling(tmp_path, receiver).send()) == 1
    assert stored(tmp_path) == [failed]
    dropped = spool.add(a_bundle())
    assert spool.drop(dropped)
    assert not spool.drop(dropped)
    assert states(spool) == {failed: "done"}
    files = [path.relative_to(tmp_path / "spool") for path in (tmp_path / "spool").rglob("*") if path.is_file()]
    # The note of a refused report that was made pending again is swept later, as with locks.
    assert sorted(map(str, files)) == ["clock", f"done/{failed}.json", f"failed/{failed}.json"]


def test_send_without_locks_sends_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a report to the thread that is sending it, from the same spool or another object of it; drop says so."""
    without_locks(monkeypatch, errno.ENOLCK)
    with Misbehaving(hangs()) as server:
        spool, same = (spooling(tmp_path, server.url, attempt_s=1.0) for _ in range(2))
        report_id = spool.add(a_bundle())
        sending = threading.Thread(target=spool.send)
        sending.start()
        while not server.requests:
            time.sleep(0.01)
        assert spool.send() == []
        assert same.send() == []
        for refused in same.drop, same.readdress:
            with pytest.raises(SpoolError, match="being sent right now"):
                refused(report_id)
        sending.join()
        assert len(server.requests) == 1
        assert same.drop(report_id)


def test_locked_forked_child_inherits_no_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a child use a report again: the thread that has it in the parent is not there to give it back."""
    without_locks(monkeypatch, errno.ENOLCK)
    report_id = spooling(tmp_path, "https://example.com/").add(a_bundle())
    path = tmp_path / "spool" / "pending" / f"{report_id}.zip"
    with locked(path) as file, warnings.catch_warnings():
        assert file is not None
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork in a process with threads; the child uses none
        child = os.fork()
        if child == 0:
            status = 1
            try:
                with locked(path) as mine:
                    status = 0 if mine is not None else 2
            finally:
                os._exit(status)
        with locked(path) as again:
            assert again is None
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_send_with_eacces_or_eagain_for_the_lock_leaves_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Take EACCES and EAGAIN for the lock of another process, and any other error for a reason."""
    spool = spooling(tmp_path, "https://example.com/")
    report_id = spool.add(a_bundle())
    for error in errno.EACCES, errno.EAGAIN:
        without_locks(monkeypatch, error)
        assert spool.send() == []
        with pytest.raises(SpoolError, match="being sent right now"):
            spool.drop(report_id)
    without_locks(monkeypatch, errno.EIO)
    for call in spool.send, lambda: spool.drop(report_id), lambda: spool.readdress(report_id):
        with pytest.raises(
            SpoolError, match=r"cannot lock .*\.zip: Input/output error; keep the spool on a file system"
        ):
            call()
    assert states(spool) == {report_id: "pending"}


def test_send_locks_a_file_open_for_writing(tmp_path: Path, receiver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Open the report so that NFS grants an exclusive lock, and for reading where it cannot be written."""
    modes = []

    def flock(fd: int, operation: int) -> None:
        modes.append(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE)

    monkeypatch.setattr(fcntl, "flock", flock)
    spool = spooling(tmp_path, receiver)
    ids = [spool.add(a_bundle()) for _ in range(2)]
    spool.send(report_id=ids[0])
    original = os.open

    def read_only(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_RDWR and str(path).endswith(".zip"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return original(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", read_only)
    spool.send(report_id=ids[1])
    assert modes == [os.O_RDWR, os.O_RDONLY]
    assert states(spool) == dict.fromkeys(ids, "done")


def test_send_report_unreadable_has_a_reason(tmp_path: Path, receiver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a report that cannot be read now, and send the others."""
    spool = spooling(tmp_path, receiver)
    bad, good = spool.add(a_bundle()), spool.add(a_bundle())
    original = spool_sender._upload_request

    def upload_request(report_id: str, file: Any) -> Any:
        if report_id == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(report_id, file)

    monkeypatch.setattr(spool_sender, "_upload_request", upload_request)
    attempts = {outcome.report_id: outcome.attempt for outcome in spool.send()}
    assert attempts[bad] == UploadFailure("the report cannot be read: Input/output error", final=False)
    assert isinstance(attempts[good], UploadReceipt)
    assert states(spool) == {bad: "pending", good: "done"}


# Bad disks


def test_spool_directory_that_is_no_private_directory_is_refused(tmp_path: Path) -> None:
    """A link, a file, one that others may write or that is another user's."""
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").touch()
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    os.mkfifo(tmp_path / "pipe")
    cases = {"link": "symbolic link", "file": "not a directory", "open": "written by other", "pipe": "not a directory"}
    if os.geteuid() == 0:
        (tmp_path / "theirs").mkdir()
        os.chown(tmp_path / "theirs", 65534, 65534)
        cases["theirs"] = "belongs to user 65534"
    for name, expected in cases.items():
        with pytest.raises(SpoolError, match=expected):
            Spool(tmp_path / name)


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used by an older vitalsd"])
def test_spool_in_a_maildir_is_refused_and_its_mail_stays(tmp_path: Path, used: bool) -> None:
    """Its ``new/`` is not ours: the error names the directory and what to do."""
    mailbox = tmp_path / "Maildir"
    for name in ("cur", "new", "tmp", *(("pending", "done", "failed") if used else ())):
        (mailbox / name).mkdir(mode=0o700, parents=True)
    mailbox.chmod(0o700)
    mail = mailbox / "new" / "1700000000.M1P2.host"
    mail.write_text("Subject: hello")
    os.utime(mail, (1, 1))
    with pytest.raises(SpoolError, match=r"Maildir is a Maildir.*name a directory that is empty"):
        Spool(mailbox).prune()
    assert mail.read_text() == "Subject: hello"


def test_spool_where_another_program_has_a_queue_is_refused(tmp_path: Path) -> None:
    """It has a ``new/`` with files, and is no spool; the same names without files are."""
    queue = tmp_path / "queue"
    (queue / "new").mkdir(mode=0o700, parents=True)
    queue.chmod(0o700)
    Spool(queue)
    shutil.rmtree(queue / "done")
    (queue / "new" / "job-1").write_text("work")
    os.utime(queue / "new" / "job-1", (1, 1))
    with pytest.raises(SpoolError, match="new has files of another program"):
        Spool(queue).prune()
    assert (queue / "new" / "job-1").exists()


def test_spool_removes_and_sends_no_file_of_another_program(tmp_path: Path, receiver: str) -> None:
    """However old, and if it is named by 32 hexadecimal digits: what vitalsd wrote is known by its content."""
    spool = spooling(tmp_path, receiver, max_bytes=1 << 20, max_reports=1, max_age_s=1.0)
    report_id = spool.add(a_bundle())
    folder = tmp_path / "spool"
    digest = "d41d8cd98f00b204e9800998ecf8427e"
    foreign = {
        "new/notes.txt": b"notes",
        f"new/{digest}.zip": b"PK\3\4",
        "pending/backup.json": b"{}",
        f"pending/{'1' * 32}.json": b'{"key": 1}',
        f"pending/{digest}.zip": bytes(2 << 20),
        f"failed/{'2' * 32}.zip": zipped(digest),
        f"done/{digest}.json": b"[1, 2]",
        "README": b"about",
    }
    for name, content in foreign.items():
        (folder / name).write_bytes(content)
        os.utime(folder / name, (1, 1))
    assert set(states(spool)) == {report_id}
    assert [outcome.report_id for outcome in spool.send()] == [report_id]
    spool.prune()
    assert {name: (folder / name).read_bytes() for name in foreign} == foreign


def zipped(report_id: str) -> bytes:
    """A zip with this id in its manifest."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("manifest.json", json.dumps({"report_id": report_id}))
    return out.getvalue()


def with_file_limit(size: int, call: Callable[[], object]) -> object:
    """Return what `call` returns while no file can be written beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        return call()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)


def test_spool_on_a_full_disk_loses_no_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Add says so and leaves nothing half done; what is there already is sent even though nothing can be noted."""
    stack = ExitStack()
    receiver = stack.enter_context(receiving_badly(tmp_path / "store", 0, 0.0))
    spool = spooling(tmp_path, receiver)
    kept = spool.add(a_bundle())

    def full() -> None:
        with pytest.raises(SpoolError, match="cannot keep the report"):
            spool.add(a_bundle(5000))

    with_file_limit(2000, full)
    assert states(spool) == {kept: "pending"}
    assert len(list((tmp_path / "spool").rglob("*.*"))) == 2
    with Misbehaving(says(answer(b"", status="500 No"))) as bad:
        slow = Spool(tmp_path / "spool", bad.url, first_delay_s=600, jitter=lambda: 1.0)
        (tmp_path / "spool" / "pending" / f"{kept}.json").write_text(json.dumps({"url": bad.url}))
        assert len(with_file_limit(0, slow.send)) == 1  # type: ignore[arg-type]
        assert slow.send() == [], "what could not be written down is remembered"
    assert "cannot write into the spool" in caplog.text
    (tmp_path / "spool" / "pending" / f"{kept}.json").write_text(json.dumps({"url": receiver}))
    with stack:
        with_file_limit(0, spool.send)
    assert states(spool) == {kept: "done"}
    assert stored(tmp_path) == [kept]


READ_ONLY = """
import os, sys
sys.path.insert(0, sys.argv.pop())
if os.geteuid() == 0:
    from support.stranger import become_nobody
    become_nobody(keep_reading_files=True)
os.umask(0o077)
from vitalsd.contract.report_archive import Bundle, seal
from vitalsd_client import Spool, SpoolError
from datetime import datetime, UTC
directory, url = sys.argv[1:]
spool = Spool(directory, url)
bundle = seal("ryll", "1" * 32, datetime.now(UTC), {"a": b""}, [])
print(spool.add(bundle))
for name in ("new", "pending", "done", "failed"):
    os.chmod(f"{directory}/{name}", 0o500)
another = seal("ryll", "2" * 32, datetime.now(UTC), {}, [])
for call in (lambda: spool.add(another), spool.send, lambda: spool.drop("1" * 32)):
    try:
        print("done", call())
    except SpoolError as error:
        print("refused:", error)
print(len(spool.entries()))
for name in ("new", "pending", "done", "failed"):
    os.chmod(f"{directory}/{name}", 0o700)
print(len(spool.send()))
"""


def test_spool_read_only_fails_with_a_reason_and_loses_no_report(short_path: Path) -> None:
    """A report is not added, dropped, or sent without a record of it; all work again once the spool is writable."""
    short_path.chmod(0o777)
    with receiving(short_path / "store") as url:
        argv = [sys.executable, "-c", READ_ONLY, str(short_path / "spool"), url, str(TESTS)]
        env = os.environ | {"HOME": str(short_path)}
        out = subprocess.run(argv, capture_output=True, text=True, timeout=30, env=env)
    lines = out.stdout.splitlines()
    assert lines[0] == "1" * 32, out.stderr
    assert lines[1].startswith("refused: cannot keep the report in")
    assert "cannot be written; nothing was sent" in lines[2]
    assert lines[3].startswith("refused: cannot remove")
    assert lines[4:] == ["1", "1"]
    assert [path.stem for path in (short_path / "store").iterdir()] == ["1" * 32]


def test_spool_sender_killed_after_the_receipt_does_not_send_again(tmp_path: Path) -> None:
    """Between the note in done/ and the removal of the report there is nothing left to do but that."""
    with Misbehaving(says(b"")) as server:
        spool = spooling(tmp_path, server.url)
        report_id = spool.add(a_bundle())
        folder = tmp_path / "spool"
        (folder / "done" / f"{report_id}.json").write_text('{"receipt": "R"}')
        assert spool.send() == []
        assert server.requests == []
        assert states(spool) == {report_id: "done"}


# Many senders, a bad server, and kill -9


SENDER = """
import sys
from vitalsd_client import Spool
spool = Spool(sys.argv[1], first_delay_s=0.005, longest_delay_s=0.05, attempt_s=0.5)
while any(entry.state == "pending" for entry in spool.entries()):
    spool.send(wait_s=1)
"""


def torture(tmp_path: Path, count: int, senders: int, seed: int) -> int:
    """
    `count` reports through the bad receiver by `senders` processes, one of which is killed every moment.

    Returns how many were killed.
    """
    chance = random.Random(seed)
    options = {"max_reports": 10 * count, "max_bytes": 1 << 40}
    killed = 0
    with receiving_badly(tmp_path / "store", seed, 0.6) as url, ExitStack() as stack:
        spool = Spool(tmp_path / "spool", url, **options)  # type: ignore[arg-type]
        ids = sorted(spool.add(a_bundle(chance.randrange(10, 20_000))) for _ in range(count))

        def sender() -> "subprocess.Popen[bytes]":
            return stack.enter_context(
                subprocess.Popen([sys.executable, "-W", "error", "-c", SENDER, str(tmp_path / "spool")])
            )

        running = [sender() for _ in range(senders)]
        deadline = time.monotonic() + 60 + count
        while any(state == "pending" for state in states(spool).values()):
            assert time.monotonic() < deadline, states(spool)
            # Long enough for a few uploads after the start of an interpreter.
            time.sleep(chance.uniform(0.2, 1.2))
            victim = chance.randrange(senders)
            if running[victim].poll() is None:
                running[victim].kill()
                killed += 1
            running[victim] = sender()
        for process in running:
            process.wait(30)
        assert set(states(spool).values()) == {"done"}
        assert sorted(states(spool)) == ids
        assert stored(tmp_path) == ids
        assert list((tmp_path / "spool" / "pending").iterdir()) == []
    return killed


def test_spool_with_killed_senders_and_faulty_server_stores_each_report_once(tmp_path: Path) -> None:
    """30 reports, 2 senders, a server that fails, drops, stalls and lies, and kill -9: one stored copy each."""
    assert torture(tmp_path, count=30, senders=2, seed=7) > 0


@pytest.mark.torture
@pytest.mark.timeout(3600)
def test_spool_of_a_thousand_reports_stores_each_once(tmp_path: Path) -> None:
    """The same with 1000 reports (VITALSD_TORTURE: another number) and 3 senders."""
    count = int(os.environ.get("VITALSD_TORTURE", "1000"))
    killed = torture(tmp_path, count=count, senders=3, seed=int(time.time()))
    print(f"{count} reports, {killed} senders killed")
    assert killed > count / 50


# The command


def vitalsd(home: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*VITALSD, *arguments], capture_output=True, text=True, timeout=40, env=environment(home), cwd=home
    )


def test_spool_commands_list_send_and_drop_with_statuses(tmp_path: Path, receiver: str) -> None:
    """`report --upload` stores and sends; `spool` lists, sends the rest and drops; each has its exit status."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        unreachable = f"http://127.0.0.1:{free.getsockname()[1]}/"
    assert vitalsd(tmp_path, "spool", "list").stdout.startswith("no reports in ")
    out = vitalsd(tmp_path, "report", "--upload", unreachable, "--direct")
    assert out.returncode == 1
    assert "1 left in" in out.stderr
    assert list(tmp_path.glob("*.zip")) == []
    (listed,) = json.loads(vitalsd(tmp_path, "spool", "list", "--json").stdout)
    assert (listed["state"], listed["attempts"], listed["url"]) == ("pending", 1, unreachable)
    report_id = listed["report_id"]
    assert report_id in vitalsd(tmp_path, "spool", "list").stdout
    assert vitalsd(tmp_path, "spool", "send").returncode == 1
    assert vitalsd(tmp_path, "spool", "drop").returncode == 2
    assert vitalsd(tmp_path, "spool", "drop", report_id).returncode == 0
    assert vitalsd(tmp_path, "spool", "drop", report_id).returncode == 1
    out = vitalsd(tmp_path, "report", "--upload", receiver, "--json", "--direct")
    assert out.returncode == 0, out.stderr
    report = json.loads(out.stdout)
    assert report["upload"][0]["receipt"].startswith("R-")
    assert stored(tmp_path) == [report["report_id"]]
    out = vitalsd(tmp_path, "spool", "send")
    assert (out.returncode, out.stdout) == (0, "")


def test_report_upload_with_a_bad_out_or_spool_still_sends_or_writes(tmp_path: Path, receiver: str) -> None:
    """A bad --out does not cost the upload, nor a bad spool the file; both are complained of."""
    out = vitalsd(tmp_path, "report", "--upload", receiver, "--direct", "--out", "/nowhere/at/all")
    assert (out.returncode, "sent, receipt R-" in out.stdout) == (1, True)
    assert "vitalsd: cannot write the report to /nowhere/at/all: No such file or directory\n" in out.stderr
    assert len(stored(tmp_path)) == 1

    def breaks_the_spool(connection: socket.socket, _: threading.Event) -> None:
        shutil.rmtree(tmp_path / "state" / "spool" / "new", ignore_errors=True)

    with Misbehaving(breaks_the_spool) as sidecar:
        upload = ("report", "--upload", receiver, "--url", sidecar.url)
        for more, folder in (("--out", "saved"), "saved"), ((), "."), (("--out", "/nowhere/at/all"), "."):
            out = vitalsd(tmp_path, *upload, *more)
            assert out.returncode == 1
            assert (tmp_path / out.stdout.strip()).parent == tmp_path / folder
            assert zipfile.is_zipfile(tmp_path / out.stdout.strip())
            assert "vitalsd: cannot keep the report in" in out.stderr
            assert ("the current directory instead" in out.stderr) == (folder == ".")
    assert len(stored(tmp_path)) == 1


def test_report_upload_without_a_spool_writes_a_file(tmp_path: Path) -> None:
    """If there can be no state directory, the report for the upload is written to a file."""
    (tmp_path / "state").touch()
    out = vitalsd(tmp_path, "report", "--upload", "http://127.0.0.1:1/", "--direct")
    assert out.returncode == 1
    assert f"vitalsd: {tmp_path / 'state'} is not a directory" in out.stderr
    assert "vitalsd: it was written to the current directory instead\n" in out.stderr
    assert zipfile.is_zipfile(tmp_path / out.stdout.strip())
    assert vitalsd(tmp_path, "spool", "list").returncode == 1


def test_spool_send_prints_a_reason_for_each_unsent_report(tmp_path: Path) -> None:
    """Refused before, or the server asked for time: a line each, status 1, and no request."""
    with Misbehaving(says(answer(b"", status="503 No", extra="Retry-After: 600\r\n"))) as busy:
        vitalsd(tmp_path, "report", "--upload", busy.url, "--direct")
        (listed,) = json.loads(vitalsd(tmp_path, "spool", "list", "--json").stdout)
        until = f"the server asked to wait until {datetime.fromtimestamp(listed['not_before'], UTC):%Y-%m-%d %H:%M:%SZ}"
        out = vitalsd(tmp_path, "spool", "send")
        assert (out.returncode, out.stdout) == (1, "")
        assert out.stderr.startswith(f"{listed['report_id']}: not sent: {until}\n")
        out = vitalsd(tmp_path, "spool", "send", listed["report_id"], "--json")
        expected = [{"report_id": listed["report_id"], "sent": False, "reason": until}]
        assert (out.returncode, json.loads(out.stdout)) == (1, expected)
        assert len(busy.requests) == 1
    with Misbehaving(says(answer(b"", status="400 No"))) as server:
        refused = json.loads(vitalsd(tmp_path, "report", "--upload", server.url, "--direct", "--json").stdout)
        out = vitalsd(tmp_path, "spool", "send", "--url", server.url)
        assert f"to try again: vitalsd spool send {refused['report_id']} --retry-failed [--url URL]" in out.stderr
        out = vitalsd(tmp_path, "spool", "send", refused["report_id"])
        why = f"{refused['report_id']} was refused: the server answered 400; --retry-failed sends it again"
        assert (out.returncode, out.stdout, out.stderr) == (1, "", f"vitalsd: {why}\n")
        assert vitalsd(tmp_path, "spool", "send", refused["report_id"], "--retry-failed").returncode == 1
        assert len(server.requests) == 2


def test_spool_send_with_url_and_id_corrects_the_url(tmp_path: Path, receiver: str) -> None:
    """`--url` with the id of a refused or waiting report replaces its URL; without an id a message says it did not."""
    with Misbehaving(says(answer(b"", status="503 No", extra="Retry-After: 600\r\n"))) as busy:
        vitalsd(tmp_path, "report", "--upload", busy.url, "--direct")
        (waits,) = json.loads(vitalsd(tmp_path, "spool", "list", "--json").stdout)
        out = vitalsd(tmp_path, "spool", "send", "--url", receiver)
        assert (out.returncode, out.stdout) == (1, "")
        assert out.stderr.startswith("vitalsd: 1 with a URL of their own go there and not to --url; to change that")
        out = vitalsd(tmp_path, "spool", "send", waits["report_id"], "--url", busy.url)
        assert "asked to wait" in out.stderr, "the same server is no other one"
        assert stored(tmp_path) == []
        out = vitalsd(tmp_path, "spool", "send", waits["report_id"], "--url", receiver)
        assert (out.returncode, out.stderr) == (0, "")
        assert stored(tmp_path) == [waits["report_id"]]
        assert len(busy.requests) == 1
    with Misbehaving(says(answer(b"", status="404 No"))) as server:
        typo = json.loads(vitalsd(tmp_path, "report", "--upload", server.url, "--direct", "--json").stdout)
        out = vitalsd(tmp_path, "spool", "send", typo["report_id"], "--url", receiver, "--retry-failed")
        assert (out.returncode, out.stderr) == (0, "")
        assert sorted(stored(tmp_path)) == sorted([waits["report_id"], typo["report_id"]])
    assert not spooling(tmp_path / "state").readdress(typo["report_id"]), "none is pending"
