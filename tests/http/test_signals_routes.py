"""Heartbeats and gauges over HTTP, with a real sidecar: names, limits, refusals, and the hang of a posted heartbeat."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import vitalsd
from support.beating import BeatingClient
from support.serving import Serving
from support.sidecars import environment, eventually
from support.target import Target
from vitalsd.contract.signals_page import GAUGES, HEARTBEATS

pytestmark = pytest.mark.live

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    with Target("--idle", "1") as target:
        yield target


@pytest.fixture
def served(target: Target, tmp_path: Path) -> Iterator[Serving]:
    with Serving(tmp_path, "--pid", str(target.pid), "--record-interval", "0.25") as serving:
        yield serving


@pytest.fixture(scope="module")
def shared(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A sidecar for requests that change nothing."""
    with Serving(tmp_path_factory.mktemp("signals"), "--pid", str(target.pid)) as serving:
        yield serving


def post(serving: Serving, path: str, body: Any) -> httpx.Response:
    return serving.client.post(path, json=body)


def refusal(answer: httpx.Response) -> tuple[int, str]:
    """Status and reason of an answer, which has a sentence."""
    problem = answer.json()
    assert problem["detail"]
    return answer.status_code, problem["reason"]


def beat_of(serving: Serving, name: str = "ui") -> dict[str, Any]:
    """The heartbeat with this name; empty if there is none."""
    return next((each for each in serving.get("/heartbeats") if each["name"] == name), {})


def last_gauges(serving: Serving) -> dict[str, float | None]:
    """The gauges of the last row of /history."""
    return {gauge["name"]: gauge["value"][-1] for gauge in serving.get("/history")["gauges"]}


def hangs(serving: Serving) -> list[dict[str, Any]]:
    return [each for each in serving.get("/history")["events"] if each["kind"] == "hang"]


def test_posted_heartbeat_beats_pauses_and_closes(served: Serving) -> None:
    """Each state is seen in /heartbeats; a closed one is in it no more, and may be opened again."""
    assert served.get("/heartbeats") == []
    for _ in range(2):
        assert post(served, "/heartbeats/ui", {"limit_s": 3600}).status_code == 204
        beating = eventually(lambda: beat_of(served), 15)
        assert beating == beating | {"tid": None, "limit_ms": 3_600_000, "cause": None, "detail": ""}
        assert beating["state"] == "beating"
        assert post(served, "/heartbeats/ui", {"state": "pause"}).status_code == 204
        eventually(lambda: beat_of(served).get("state") == "paused", 15)
        assert post(served, "/heartbeats/ui", {"state": "beat", "limit_s": 60}).status_code == 204
        eventually(lambda: beat_of(served)["state"] == "beating" and beat_of(served)["limit_ms"] == 60_000, 15)
        assert post(served, "/heartbeats/ui", {"state": "close"}).status_code == 204
        eventually(lambda: served.get("/heartbeats") == [], 15)
    assert hangs(served) == []


def test_hang_of_a_posted_heartbeat_has_the_cause_unknown(served: Serving) -> None:
    """The thread is not known; while it lasts it is ongoing, and a beat ends it with its length."""
    assert post(served, "/heartbeats/net.io-1_x", {"limit_s": 0.5}).status_code == 204
    silent = eventually(lambda: (beat := beat_of(served, "net.io-1_x")).get("cause") and beat, 20)
    assert (silent["state"], silent["cause"], silent["tid"]) == ("silent", "unknown", None)
    assert silent["silent_ms"] >= 500
    (hang,) = eventually(lambda: hangs(served), 20)
    assert (hang["heartbeat"], hang["cause"], hang["ongoing"]) == ("net.io-1_x", "unknown", True)
    assert post(served, "/heartbeats/net.io-1_x", {"limit_s": 3600}).status_code == 204
    (over,) = eventually(lambda: [each for each in hangs(served) if not each["ongoing"]], 20)
    assert over["time_ms"] == hang["time_ms"]
    assert over["duration_ms"] >= hang["duration_ms"]


@pytest.mark.parametrize("name", ["1x", "-x", "x" * 33, "x%20y", "x%0a", "%C3%A4", "x%00", "x%3Cb%3E"])
def test_heartbeat_with_a_name_of_another_form_is_refused(shared: Serving, name: str) -> None:
    """A name is a letter and up to 31 of few characters."""
    answer = post(shared, f"/heartbeats/{name}", {})
    assert refusal(answer) == (422, "bad_parameter")
    assert shared.get("/heartbeats") == []


@pytest.mark.parametrize(
    "body",
    [
        *({"limit_s": limit} for limit in (0, -1, 0.249, 3600.5, 1e9, True, "2", [2])),
        *({"state": state} for state in ("open", "", None, 1)),
        {"limit": 2},
        {"limit_s": 2, "name": "net"},
        [],
        "ui",
        None,
        2,
    ],
    ids=json.dumps,
)
def test_heartbeat_with_a_wrong_body_is_refused(shared: Serving, body: Any) -> None:
    """Limits outside of 0.25 to 3600 s, other states, fields and types."""
    assert refusal(post(shared, "/heartbeats/ui", body)) == (422, "bad_body")
    assert shared.get("/heartbeats") == []


@pytest.mark.parametrize("text", ['{"limit_s": NaN}', '{"limit_s": Infinity}', '{"limit_s": 1e999}', "{", "", "\xff"])
def test_heartbeat_with_a_body_that_is_no_number_or_no_json_is_refused(shared: Serving, text: str) -> None:
    """NaN and infinity are no JSON; a number that is too large for a double is none that counts."""
    answer = shared.client.post("/heartbeats/ui", content=text.encode("latin-1"), headers=JSON)
    assert refusal(answer) == (422, "bad_body")


@pytest.mark.parametrize(
    "text",
    [
        *('{"fps": "58"}', '{"fps": true}', '{"fps": [1]}', '{"fps": {}}', '{"fps": NaN}'),
        *('{"fps": 1e999}', '{"1x": 1}', '{"": 1}', '{"x y": 1}', '{"%s": 1}' % ("x" * 33), "[1]", "58", '{"a": 1'),
    ],
)
def test_gauges_with_a_wrong_name_or_value_are_refused(shared: Serving, text: str) -> None:
    """Names as those of heartbeats, finite numbers, an object."""
    answer = shared.client.post("/gauges", content=text, headers=JSON)
    assert refusal(answer) == (422, "bad_body")


def test_gauges_are_set_by_name(served: Serving) -> None:
    """Integers and fractions; no gauge at all is nothing to do."""
    for body in ({"fps": 58}, {"fps": -58.5, "queue.length": 0}, {}):
        assert post(served, "/gauges", body).status_code == 204


def test_posted_gauge_that_is_null_is_closed(served: Serving) -> None:
    """Its place is free, and its column ends; null for a gauge that is not open, and a later number, are accepted."""
    assert post(served, "/gauges", {"fps": 58, "queue": 3}).status_code == 204
    eventually(lambda: last_gauges(served) == {"fps": 58, "queue": 3}, 15)
    assert post(served, "/gauges", {"fps": None, "never": None}).status_code == 204
    eventually(lambda: last_gauges(served) == {"fps": None, "queue": 3}, 15)
    assert post(served, "/gauges", {f"g{i}": i for i in range(GAUGES - 1)}).status_code == 204
    assert post(served, "/gauges", {"g0": None, "fps": 1}).status_code == 204
    eventually(lambda: last_gauges(served)["fps"] == 1, 15)


@pytest.mark.parametrize("body", [{}, {"limit_s": None}], ids=json.dumps)
def test_heartbeat_posted_without_a_limit_keeps_the_last_one(served: Serving, body: dict[str, None]) -> None:
    """The first limit is 2 s; one that is posted holds until the heartbeat is closed."""
    for limit_s, expected_ms in ((None, 2000), (60, 60_000), (None, 60_000)):
        assert post(served, "/heartbeats/ui", body if limit_s is None else {"limit_s": limit_s}).status_code == 204
        eventually(lambda: beat_of(served).get("limit_ms") == expected_ms, 15)  # noqa: B023 - called at once
    assert post(served, "/heartbeats/ui", {**body, "state": "pause"}).status_code == 204
    assert eventually(lambda: (beat := beat_of(served))["state"] == "paused" and beat, 15)["limit_ms"] == 60_000
    assert post(served, "/heartbeats/ui", {"state": "close"}).status_code == 204
    assert post(served, "/heartbeats/ui", body).status_code == 204
    eventually(lambda: beat_of(served).get("limit_ms") == 2000, 15)


def test_signals_posted_to_a_sidecar_that_records_nothing_are_refused(target: Target, short_path: Path) -> None:
    """With an interval of 0 the sidecar looks at no page."""
    with Serving(short_path, "--pid", str(target.pid), "--record-interval", "0") as serving:
        for path, body in (("/heartbeats/ui", {}), ("/gauges", {"fps": 1})):
            assert refusal(post(serving, path, body)) == (409, "not_recording")


def test_heartbeat_is_watched_if_the_record_interval_is_longer_than_its_limit(target: Target, short_path: Path) -> None:
    """The sidecar looks once a second even so: the heartbeat is there long before the second snapshot."""
    with Serving(short_path, "--pid", str(target.pid), "--record-interval", "10") as serving:
        eventually(lambda: len(serving.get("/history")["time_ms"]) == 1, 15)
        assert post(serving, "/heartbeats/ui", {"limit_s": 0.5}).status_code == 204
        eventually(lambda: beat_of(serving).get("cause"), 15)
        assert len(serving.get("/history")["time_ms"]) == 1
        assert hangs(serving)


def test_posted_signals_find_no_place_if_the_client_has_taken_all(short_path: Path) -> None:
    """Clients that post share the page with the client that maps it: what has no place there is 409."""
    with BeatingClient(short_path) as client, httpx.Client(base_url=client.url, trust_env=False) as asking:
        for i in range(HEARTBEATS - 1):
            assert client.ask(f"open h{i}")
        assert refusal(asking.post("/heartbeats/more", json={"limit_s": 3600})) == (409, "too_many")
        assert client.ask("close h0")
        assert asking.post("/heartbeats/more", json={"limit_s": 3600}).status_code == 204
        eventually(lambda: "more" in client.heartbeats(), 15)


def test_heartbeat_and_gauge_beyond_those_of_the_page_are_refused(served: Serving) -> None:
    """The 33rd is 409; the others go on, and a place that is closed is free."""
    for i in range(HEARTBEATS):
        assert post(served, f"/heartbeats/h{i}", {"limit_s": 3600}).status_code == 204
    assert refusal(post(served, "/heartbeats/more", {})) == (409, "too_many")
    assert post(served, "/heartbeats/h0", {"limit_s": 3600}).status_code == 204
    eventually(lambda: len(served.get("/heartbeats")) == HEARTBEATS, 15)
    assert post(served, "/heartbeats/h31", {"state": "close"}).status_code == 204
    assert post(served, "/heartbeats/more", {"limit_s": 3600}).status_code == 204
    assert post(served, "/gauges", {f"g{i}": i for i in range(GAUGES)}).status_code == 204
    assert refusal(post(served, "/gauges", {"more": 1})) == (409, "too_many")
    assert post(served, "/gauges", {"g0": 1}).status_code == 204


@pytest.mark.parametrize("path", ["/heartbeats/ui", "/gauges"])
def test_page_of_another_site_posts_no_signal(shared: Serving, path: str) -> None:
    """A form has another content type, and a script another origin."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        answer = shared.client.post(path, content="{}", headers={"Content-Type": kind})
        assert refusal(answer) == (422, "bad_body")
    for headers in ({"Origin": "http://evil.test"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
        assert refusal(shared.client.post(path, content="{}", headers={**JSON, **headers})) == (403, "cross_site")
    assert shared.get("/heartbeats") == []


def test_signals_routes_answer_their_methods_only(shared: Serving) -> None:
    """HEAD goes with GET; any other method is 405 and names those that there are; queries are refused."""
    for path, allowed in (("/heartbeats", "GET, HEAD"), ("/heartbeats/ui", "POST"), ("/gauges", "POST")):
        for method in ("GET", "HEAD", "PUT", "DELETE", "PATCH", *(["POST"] if path == "/heartbeats" else [])):
            answer = shared.client.request(method, path)
            if method in allowed:
                assert answer.status_code == 200
                assert method == "GET" or answer.content == b""
            else:
                assert answer.status_code == 405, (method, path)
                assert sorted(answer.headers["allow"].split(", ")) == sorted(allowed.split(", "))
    for path in ("/heartbeats/ui?limit_s=3", "/gauges?fps=1"):
        assert refusal(post(shared, path, {})) == (422, "bad_parameter")
    assert refusal(shared.client.get("/heartbeats?pid=1")) == (422, "bad_parameter")


def test_sidecar_without_shared_memory_refuses_signals(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It serves all else, notes the reason, and answers 503; heartbeats of the client beat without effect."""

    def refused(*_: object) -> int:
        raise OSError(38, "Function not implemented")

    for name in ("VITALSD_RUNTIME_DIR", "VITALSD_STATE_DIR"):
        monkeypatch.setenv(name, environment(short_path)[name])
    monkeypatch.setattr(os, "memfd_create", refused)
    with vitalsd.start(port=0) as sidecar:
        assert any("no shared memory for heartbeats" in note for note in sidecar.notes)
        heartbeat = sidecar.heartbeat("ui", 0.25)
        try:
            heartbeat.beat()
            assert httpx.get(f"{sidecar.url}/heartbeats", trust_env=False).json() == []
            for path in ("/heartbeats/ui", "/gauges"):
                answer = httpx.post(f"{sidecar.url}{path}", json={}, trust_env=False)
                assert refusal(answer) == (503, "no_signals")
            assert httpx.get(f"{sidecar.url}/metrics?window_ms=10", trust_env=False).status_code == 200
        finally:
            heartbeat.close()
