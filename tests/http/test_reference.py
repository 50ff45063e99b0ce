"""The schema and the reference: every route is in them, what they say is so, and they cost nothing until asked for."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args

import fastjsonschema
import pytest

from support.paths import ROOT
from support.serving import Serving
from support.sidecars import eventually
from support.tools import program
from vitalsd.contract.metrics import FullMetrics, parse_runtime_metrics
from vitalsd.http import page
from vitalsd.http.access import token_proof
from vitalsd.http.openapi import shape_adapter
from vitalsd.http.operation import Operation
from vitalsd.http.responses import TITLES, ProblemJson, Reason
from vitalsd.http.routes import metrics, recordings, reference, report, signals, status
from vitalsd.recording.history_columns import HistoryJson

DOCS = ROOT / "docs"
DECLARED = {
    (value.method, value.path): value
    for module in (metrics, recordings, signals, report, status, page, reference, token_proof)
    for value in vars(module).values()
    if isinstance(value, Operation)
}
OPERATIONS = list(DECLARED.values())


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with Serving(tmp_path_factory.mktemp("served"), "--record-interval", "0.1") as serving:
        assert serving.client.post("/marks", json={"label": "here"}).status_code == 201
        yield serving


@pytest.fixture(scope="module")
def schema(served: Serving) -> Any:
    return served.get("/openapi.json")


def operations(schema: Any) -> Iterator[tuple[str, str, Any]]:
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def test_create_app_imports_no_schema_or_format_modules() -> None:
    """The application is made without schemas, models of answers, histories, archives and the formats of others."""
    code = (
        "import sys\n"
        "from vitalsd.http.app import create_app\n"
        "create_app(object(), list)\n"
        "print(*[name for name in ('vitalsd.contract.metrics', 'vitalsd.http.openapi', 'vitalsd.http.reference',"
        " 'vitalsd.recording.history_columns', 'vitalsd.report.builder', 'vitalsd.contract.report_archive',"
        " 'prometheus_client', 'opentelemetry.sdk', 'markdown_it',"
        " 'pydantic.v1') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == []


def test_schema_and_served_routes_are_equal(served: Serving, schema: Any) -> None:
    """
    The schema lists exactly the routes that the service serves, each with summary, units and refusals.

    HEAD is not listed for each route: the description of the API says that it goes with GET.
    """
    refusal = served.client.get("/nowhere").json()
    listed = set(refusal["detail"].partition("there are: ")[2].split(", "))
    assert listed == set(schema["paths"]) - {"/hello"}
    for path in listed:
        allowed = served.client.request("BREW", path.replace("{run_id}", "x")).headers["allow"]
        described = {method.upper() for method in schema["paths"][path]}
        assert set(allowed.split(", ")) == described | ({"HEAD"} if "GET" in described else set())
    assert "Each route that has GET answers HEAD" in schema["info"]["description"]
    ids = [operation["operationId"] for _, _, operation in operations(schema)]
    assert len(set(ids)) == len(ids)
    for _, path, operation in operations(schema):
        assert operation["summary"], path
        assert "422" in operation["responses"], path
        for parameter in operation["parameters"]:
            assert parameter["description"].endswith("."), (path, parameter)
            assert "example" in parameter, (path, parameter)
            unit = {"ms": "ms", "seconds": "s"}.get(parameter["name"].rpartition("_")[2])
            assert unit is None or re.search(rf"\b{unit}\b", parameter["description"]), parameter


def test_schema_has_an_example_of_each_problem_reason(schema: Any) -> None:
    """Each refusal of the closed set is an example at some route, under its status."""
    seen = {
        reason: status
        for _, _, operation in operations(schema)
        for status, answer in operation["responses"].items()
        for reason in answer.get("content", {}).get("application/problem+json", {}).get("examples", {})
    }
    assert {"guessing", "token", "full", "unread"} < set(schema["x-common-problems"])
    never = {"method_not_allowed"}  # of what is no route
    assert set(get_args(Reason)) == set(TITLES)
    assert seen == {reason: str(status) for reason, (status, _) in TITLES.items() if reason not in never}


def test_schema_references_resolve(schema: Any) -> None:
    """Every $ref names a shape that is there."""
    for name in re.findall(r'"\$ref": "#/components/schemas/(\w+)"', json.dumps(schema)):
        assert name in schema["components"]["schemas"]


def read(shape: Any, content: bytes) -> Any:
    """Return what the shape reads, which has every field and no other."""
    return shape_adapter([shape]).validate_json(b"[%b]" % content)[0]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: f"{operation.method} {operation.path}")
def test_schema_examples_match_their_models(operation: Operation) -> None:
    """An example is what its shape reads."""
    if not operation.shapes:
        assert operation.media_types or operation.status == 204, operation.path
        return
    example = operation.example if operation.is_list else [operation.example]
    assert shape_adapter(operation.shapes).validate_json(json.dumps(example), strict=True)


def test_every_operation_is_in_the_schema(schema: Any) -> None:
    """The document describes each operation that a module declares."""
    declared = sorted((operation.method.lower(), operation.path) for operation in OPERATIONS)
    assert declared == sorted((method, path) for method, path, _ in operations(schema))


def test_answers_have_exactly_the_fields_of_the_schema(served: Serving) -> None:
    """Real answers hold the fields of the schema, all of them and no other."""
    assert served.client.post("/heartbeats/ui", json={}).status_code == 204
    eventually(lambda: served.get("/heartbeats"))
    for operation in OPERATIONS:
        method, path = operation.method, operation.path
        if not operation.shapes or path in ("/hello", "/metrics"):
            continue
        if "{run_id}" in path:
            path = path.replace("{run_id}", served.get("/runs")[0]["id"])
        answer = served.client.request(method, path, json={"label": "there"} if path == "/marks" else None)
        if method == "GET" and path == "/marks":
            answer = served.client.get(path)
        assert answer.status_code == operation.status, (path, answer.text)
        assert answer.headers["content-type"] == "application/json"
        content = answer.content if operation.is_list else b"[%b]" % answer.content
        shape_adapter(operation.shapes).validate_json(content)
        given, known = answer.json(), operation.example
        if operation.is_list:
            given, known = given[0], known[0]
        assert set(given) == set(known), path
    full = parse_runtime_metrics(served.client.get("/metrics?window_ms=20&detail=full").content)
    assert isinstance(full, FullMetrics)
    refused = read(ProblemJson, served.client.get("/metrics?windw_ms=5").content)
    assert refused["reason"] == "bad_parameter"


def test_replay_info_matches_the_schema(served: Serving, tmp_path: Path) -> None:
    """/info of a replay is described by the same schema."""
    report = tmp_path / "report.zip"
    report.write_bytes(served.client.get("/report.zip", params={"window_ms": 20}).content)
    with Serving(tmp_path, str(report), command="replay") as replay:
        info = read(status.InfoJson, replay.client.get("/info").content)
        assert info["recorder"]["ended"] is not None
        read(HistoryJson, replay.client.get("/history").content)


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/metric", "did you mean /metrics? "),
        ("/Metrics", "did you mean /metrics? "),
        ("/metrics/", "did you mean /metrics? "),
        ("/report", "did you mean /report.zip? "),
        ("/docs/", "did you mean /docs? "),
        ("/qqqq", "served here; there are: /, /docs, "),
        ("/" + "metrics" * 200, "served here; "),
        ("/metrics?windowms=5", "did you mean window_ms? this route takes: window_ms, mode"),
        ("/metrics?PID=5", "did you mean pid? "),
        ("/metrics?qqqq=5", "unknown parameter; this route takes: window_ms"),
        ("/metrics?detail=fill", "must be 'basic' or 'full'; got 'fill'"),
        ("/healthz?x", "this route takes none"),
    ],
)
def test_error_for_a_wrong_path_or_parameter_suggests_the_nearest(served: Serving, path: str, meant: str) -> None:
    """A wrong path or parameter is answered with the nearest right one, and with all of them."""
    answer = served.client.get(path)
    assert answer.status_code in (404, 422)
    assert meant in answer.json()["detail"]
    assert len(answer.content) < 1024


@pytest.mark.parametrize(
    "content_type", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
def test_mark_sent_as_a_form_is_refused_with_the_missing_header(served: Serving, content_type: str | None) -> None:
    """A form of another site cannot set a mark; the refusal names the missing header."""
    before = served.get("/marks")
    headers = {"Content-Type": content_type} if content_type else {}
    answer = served.client.post("/marks", content=b'{"label": "x"}', headers=headers)
    assert (answer.status_code, answer.json()["reason"]) == (422, "bad_body")
    assert "Content-Type: application/json" in answer.json()["detail"]
    assert served.get("/marks") == before


# README, docs/


def test_commands_to_copy_name_127_0_0_1(schema: Any) -> None:
    """No URL says localhost, which may be ::1 first, where no sidecar listens."""
    root = DOCS.parent
    files = [root / "README.md", *DOCS.glob("*.md"), *(root / "clients" / "examples").glob("*.[ps][yh]")]
    texts = {file.name: file.read_text(encoding="utf-8") for file in files}
    help_text = subprocess.run([sys.executable, "-m", "vitalsd", "--help"], capture_output=True, text=True, check=True)
    texts |= {"--help": help_text.stdout, "/openapi.json": json.dumps(schema)}
    assert "127.0.0.1:9779" in texts["--help"]
    assert [name for name, text in texts.items() if re.search(r"\blocalhost[:/]|//localhost", text)] == []


def test_readme_first_curl_ignores_proxies() -> None:
    """It works where http_proxy is set, and the page says why."""
    text = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    first = next(line for line in text.splitlines() if "curl " in line)
    assert "--noproxy '*'" in first
    assert "http_proxy" in text


def test_reference_files_equal_the_generated_ones() -> None:
    """docs/api.md and the JSON Schema are what the program says of itself now."""
    made = subprocess.run(
        [sys.executable, DOCS / "make.py", "reference", "--check"], capture_output=True, text=True, check=False
    )
    assert (made.returncode, made.stderr) == (0, "")


def test_reference_has_one_section_per_route(schema: Any) -> None:
    """Each route has one, with the fixed parts."""
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    for method, path, operation in operations(schema):
        name = f"{method.upper()} {path}"
        assert text.count(f"\n## {name}\n") == 1
        for part in ("Parameters", "Answers", *(["Commands"] if operation["x-codeSamples"] else [])):
            assert len(re.findall(rf"^### {part} (of|for) {re.escape(name)}$", text, re.MULTILINE)) == 1


def commands() -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A sidecar with everything to ask for: a record, a mark, and an earlier run that was killed."""
    state = tmp_path_factory.mktemp("state")
    for ends in (True, False):
        with Serving(state, "--record-interval", "0.05") as serving:
            assert serving.client.post("/marks", json={"label": "here"}).status_code == 201
            while serving.get("/info")["recorder"]["snapshots"] < 3:
                pass
            if not ends:
                yield serving


def test_reference_commands_print_an_answer(crashed: Serving, tmp_path: Path) -> None:
    """Each line of curl and jq prints something and complains of nothing, against a real sidecar."""
    program("jq", package="jq")
    program("curl", package="curl")
    found = commands()
    assert len(found) >= 15
    for command in found:
        ran = subprocess.run(
            ["sh", "-ec", command],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "URL": crashed.url, "NO_PROXY": "*"},
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert (ran.returncode, ran.stderr) == (0, ""), command
        assert ran.stdout.strip() not in ("", "null"), command


def test_answers_validate_against_the_published_schema(crashed: Serving) -> None:
    """A validator that knows nothing of our models takes every variant that is served, and no broken one."""
    validate = fastjsonschema.compile(
        json.loads((DOCS / "runtime-metrics.schema.json").read_text(encoding="utf-8")), use_default=False
    )
    answers = [
        crashed.get("/metrics", window_ms=20),
        crashed.get("/metrics", window_ms=20, detail="full"),
        crashed.client.get("/metrics", params={"pid": 2**31 - 1}).json(),
    ]
    assert [answer.get("available", "measured") for answer in answers] == ["measured", "measured", False]
    for answer in answers:
        validate(answer)
        for key in answer:
            if key in ("process", "threads", "reason"):
                with pytest.raises(fastjsonschema.JsonSchemaException):
                    validate({name: value for name, value in answer.items() if name != key})
    with pytest.raises(fastjsonschema.JsonSchemaException):
        validate(answers[0] | {"sample_window_ms": -1})


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                assert value not in self.ids
                self.ids.add(value or "")
            elif name in ("href", "src"):
                self.links.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_docs_page_is_complete_without_network_or_script(served: Serving, schema: Any) -> None:
    """/docs is well-formed, has no script, leads only to this server, and names every route and parameter."""
    answer = served.client.get("/docs")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "script-src" not in answer.headers["content-security-policy"]
    reader = _Reader()
    reader.feed(answer.text)
    reader.close()
    assert reader.open == []
    assert "script" not in reader.tags
    for link in reader.links:
        assert link in ("/", "/openapi.json", "data:,") or link.removeprefix("#") in reader.ids, link
    for _, path, operation in operations(schema):
        assert path in answer.text
        for parameter in operation["parameters"]:
            assert f"<code>{parameter['name']}</code>" in answer.text
