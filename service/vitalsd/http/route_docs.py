"""
What every route says of itself beyond its summary and parameters: answers, refusals, examples, commands to try.

Only to be read: it is loaded when somebody asks for the schema.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from vitalsd.contract.metrics import FullMetrics, Measured
from vitalsd.http import response_models as bodies
from vitalsd.http.responses import Reason
from vitalsd.sources.base import AccessDenied, KernelError, NoSuchProcess, SourceError, TargetGone, Unsupported

__all__ = ["DETAILS", "FAILURES", "JSON", "OPERATIONS", "RUN", "Operation", "Sample"]

JSON = "application/json"


@dataclass(frozen=True, slots=True)
class Sample:
    """A command to try, and what for. ``$URL`` is the sidecar."""

    title: str
    command: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """What a route says of itself beyond its summary and parameters."""

    description: str
    summary: str = ""
    """Of what is no route of the application."""
    answer: str
    """What is in a good answer."""
    models: tuple[type[BaseModel], ...] = ()
    """The JSON of a good answer is one of these."""
    listed: bool = False
    """... or rather a list of them."""
    example: Any = None
    other: Mapping[str, str] | None = None
    """Media types had by ``Accept``, or instead of JSON; an example of each."""
    status: int = 200
    reasons: tuple[Reason, ...] = ()
    """Refusals that only some routes know."""
    unavailable: bool = False
    """May answer that the numbers cannot be had."""
    samples: tuple[Sample, ...] = ()


MEASURED = {
    "sample_window_ms": 501,
    "process": {"cpu_percent": 25.55, "rss_kb": 9924, "vm_size_kb": 234256, "uptime_secs": 6.035},
    "threads": [
        {"tid": 2345, "name": "python", "cpu_percent": 0.0},
        {"tid": 2375, "name": "render", "cpu_percent": 17.621},
    ],
    "platform": "linux",
}
STREAMED = json.dumps(MEASURED, separators=(",", ":"))
TARGET = {
    "pid": 2345,
    "name": "python",
    "started_at": "2026-03-01T09:30:00.120Z",
    "start_id": "2345-142313-9bfa3fdd",
}
MARK = {"time": "2026-03-01T09:30:05.250Z", "time_ms": 1772357405250, "label": "F12 pressed"}
HISTORY = {
    "schema": 1,
    "platform": "linux",
    "target": TARGET,
    "interval_ms": 1000,
    "time_ms": [1772357404120, 1772357405121],
    "elapsed_ms": [1000.2, 1001.1],
    "cpu_percent": [24.1, 25.6],
    "rss_kb": [9920, 9924],
    "vm_size_kb": [234256, 234256],
    "thread_count": [2, 2],
    "threads": [{"tid": 2375, "name": "render", "cpu_percent": [17.4, 17.6]}],
    "marks": [{"time_ms": 1772357405250, "label": "F12 pressed"}],
    "events": [{"time_ms": 1772357405121, "kind": "missed", "detail": "2 snapshots are missing before this one"}],
}
CSV = (
    "time,elapsed_ms,cpu_percent,rss_kb,vm_size_kb,thread_count,2375 render cpu_percent,marks,events\n"
    "2026-03-01T09:30:05.121Z,1001.1,25.6,9924,234256,2,17.6,mark: F12 pressed,\n"
)
RUN = {
    "id": "2345-142313-9bfa3fdd-2300",
    "state": "crashed",
    "ended": None,
    "reported": False,
    "app": "viewer",
    "app_version": "3.1",
    "platform": "linux",
    "host": {
        "system": "Linux",
        "release": "6.12.0",
        "version": "6.12.0",
        "arch": "x86_64",
        "cpu_count": 8,
        "utc_offset_minutes": 60,
    },
    "pid": 2345,
    "name": "python",
    "program": "6e7a2b51c0d4f893",
    "started_at": "2026-03-01T09:30:00.120Z",
    "recorded_from": "2026-03-01T09:30:01.000Z",
    "recorded_to": "2026-03-01T09:44:58.004Z",
    "snapshots": 897,
    "size_bytes": 413696,
}
SCRAPED = (
    "# HELP process_cpu_seconds_total CPU time of the target, living and exited threads, user and system, in seconds.\n"
    "# TYPE process_cpu_seconds_total counter\n"
    "process_cpu_seconds_total 12.25\n"
)

OPERATIONS: dict[tuple[str, str], Operation] = {
    ("get", "/metrics"): Operation(
        description="CPU is in percent of one core, over the time that was really measured. By `Accept` a scraper"
        " gets cumulative counters and gauges of this instant instead, and the window parameters have no meaning.",
        answer="The basic answer, or with `detail=full` the full one; by `Accept` Prometheus text or OpenMetrics.",
        models=(FullMetrics, Measured),
        example=MEASURED,
        other={"text/plain": SCRAPED, "application/openmetrics-text": SCRAPED + "# EOF\n"},
        reasons=("busy", "not_acceptable"),
        unavailable=True,
        samples=(
            Sample("The three busiest threads", "curl -s \"$URL/metrics?sort=cpu&limit=3\" | jq '.threads'"),
            Sample(
                "Half a second, the process alone", 'curl -s "$URL/metrics?window_ms=500" | jq .process.cpu_percent'
            ),
            Sample("At once, from the record", 'curl -s "$URL/metrics?mode=trailing&window_ms=5000" | jq .process'),
            Sample("The books, which balance", 'curl -s "$URL/metrics?detail=full" | jq .accounting'),
            Sample(
                "As a scraper sees it", "curl -s -H 'Accept: text/plain' \"$URL/metrics\" | grep ^process_cpu_seconds"
            ),
        ),
    ),
    ("get", "/stream"): Operation(
        description="Each event is an answer of `/metrics` on one line. `id` counts the windows, those among them that"
        " a slow reader missed. When the numbers cannot be had any more, a last event `unavailable` says why.",
        answer="Server-Sent Events, until the client hangs up, for an hour at the most.",
        other={"text/event-stream": f"id: 1\ndata: {STREAMED}\n\n"},
        reasons=("busy",),
        unavailable=True,
        samples=(
            Sample(
                "CPU five times a second, for two seconds",
                'curl -sN -m 2 "$URL/stream?interval_ms=200"'
                " | jq --unbuffered -rR 'select(startswith(\"data: \")) | .[6:] | fromjson | .process.cpu_percent'",
            ),
        ),
    ),
    ("get", "/history"): Operation(
        description="The last `seconds` of the record, counted from its end.",
        answer="Columnar JSON; by `Accept: text/csv` CSV, a line per row.",
        models=(bodies.History,),
        example=HISTORY,
        other={"text/csv": CSV},
        reasons=("not_recording", "busy"),
        unavailable=True,
        samples=(
            Sample(
                "The worst second of the last minute", "curl -s \"$URL/history?seconds=60\" | jq '.cpu_percent | max'"
            ),
            Sample(
                "Who was busy, on average",
                "curl -s \"$URL/history?top=5\" | jq -r '.threads[] | [.name, (.cpu_percent | add / length)] | @tsv'",
            ),
            Sample("For a spreadsheet", "curl -s -H 'Accept: text/csv' \"$URL/history?step_ms=5000\" | head -3"),
        ),
    ),
    ("get", "/marks"): Operation(
        description="Labels that somebody put on the recorder's clock.",
        answer="The marks, oldest first.",
        models=(bodies.Mark,),
        listed=True,
        example=[MARK],
        samples=(Sample("The last one", 'curl -s "$URL/marks" | jq ".[-1].label"'),),
    ),
    ("post", "/marks"): Operation(
        description="The body is JSON. The mark stands in the history, on the page and in reports.",
        answer="The mark that was made.",
        models=(bodies.Mark,),
        example=MARK,
        status=201,
        reasons=("bad_body", "not_recording"),
        samples=(
            Sample(
                "Something happens now",
                'curl -s "$URL/marks" -H \'Content-Type: application/json\' -d \'{"label": "F12 pressed"}\' | jq .time',
            ),
        ),
    ),
    ("get", "/processes"): Operation(
        description="Any of them can be measured with `/metrics?pid=`.",
        answer="The processes this user may sample.",
        models=(bodies.Process,),
        listed=True,
        example=[
            {
                "pid": 2345,
                "name": "python",
                "started_at": "2026-03-01T09:30:00.120Z",
                "cpu_time_secs": 12.25,
                "rss_kb": 9924,
                "thread_count": 2,
            }
        ],
        unavailable=True,
        samples=(
            Sample(
                "The largest first",
                "curl -s \"$URL/processes\" | jq -c 'sort_by(-.rss_kb)[:3][] | {pid, name, rss_kb}'",
            ),
        ),
    ),
    ("get", "/runs"): Operation(
        description="Each run of a target is one file on disk. What crashed is first. In a replay: the other runs of"
        " the file.",
        answer="The runs, crashed ones first, then the newest first.",
        models=(bodies.Run,),
        listed=True,
        example=[RUN],
        reasons=("hung",),
        samples=(
            Sample("What crashed", 'curl -s "$URL/runs" | jq -c \'.[] | select(.state == "crashed") | {id, name}\''),
        ),
    ),
    ("get", "/runs/{run_id}/history"): Operation(
        description="The record of an earlier run, exact to the last snapshot on disk.",
        answer="As for `/history`.",
        models=(bodies.History,),
        example=HISTORY,
        other={"text/csv": CSV},
        reasons=("no_such_run", "unreadable_run", "hung", "busy"),
        samples=(
            Sample(
                "The end of a run",
                'RUN=$(curl -s "$URL/runs" | jq -r ".[0].id")\n'
                'curl -s "$URL/runs/$RUN/history?seconds=10" | jq ".cpu_percent[-1]"',
            ),
        ),
    ),
    ("post", "/runs/{run_id}/reported"): Operation(
        description="For a client that put a crashed run into a report of its own. There is no body.",
        answer="The run.",
        models=(bodies.Reported,),
        example={"id": RUN["id"], "reported": True},
        reasons=("no_such_run", "unreadable_run", "hung"),
        samples=(
            Sample(
                "This one is dealt with",
                'RUN=$(curl -s "$URL/runs" | jq -r ".[0].id")\n'
                'curl -s -X POST "$URL/runs/$RUN/reported" | jq .reported',
            ),
        ),
    ),
    ("post", "/report.zip"): Operation(
        description="runtime-metrics.json, runtime-history.json, marks.json, metadata.json, manifest.json and, if a run"
        " of this application crashed and no report contains it yet, previous-run.json. What is missing is in"
        " the `failures` of the manifest. The crashed run counts as reported once the client has read the last byte"
        " and closed the connection. The body is JSON, of at most 16 KiB; `{}` will do.",
        answer="The archive.",
        other={"application/zip": ""},
        reasons=("bad_body", "busy", "no_report", "no_such_run"),
        samples=(
            Sample(
                "Under the name it gives itself",
                "curl -s -OJ \"$URL/report.zip\" -H 'Content-Type: application/json'"
                ' -d \'{"app": "viewer", "message": "it stutters"}\' && ls *.zip | wc -l',
            ),
        ),
    ),
    ("get", "/report.zip"): Operation(
        description="The same archive to look at, without a message. Nothing counts as reported. In a replay of a"
        " report: the replayed file itself.",
        answer="The archive.",
        other={"application/zip": ""},
        reasons=("busy", "no_report", "no_such_run"),
        samples=(Sample("Its members", 'curl -s "$URL/report.zip" -o r.zip && python3 -m zipfile -l r.zip | wc -l'),),
    ),
    ("get", "/healthz"): Operation(
        description="Says nothing of the target, and needs no token. A read of the kernel that does not return, of"
        " whichever process, makes it 503: a thread is lost until it does, other processes are measured as before."
        " So does a disk that does not answer: then it is the directory of runs alone that cannot be had.",
        answer="It answers, and nothing hangs.",
        models=(bodies.Health,),
        example={"status": "ok"},
        reasons=("hung",),
        samples=(Sample("Is it alive", 'curl -s "$URL/healthz" | jq -r .status'),),
    ),
    ("get", "/info"): Operation(
        description="What one asks first.",
        answer="Version, target, recorder, and what the sidecar itself costs.",
        models=(bodies.Info,),
        example={
            "version": "0.1.0",
            "python": "3.13.1",
            "platform": "linux",
            "os_version": "6.12.0",
            "arch": "x86_64",
            "cpu_count": 8,
            "utc_offset_minutes": 60,
            "app": "viewer",
            "app_version": "3.1",
            "replay": None,
            "target": {**TARGET, "program": "6e7a2b51c0d4f893"},
            "capabilities": ["detail=full", "history", "marks", "mode=trailing", "pid", "processes", "runs", "stream"],
            "recorder": {
                "interval_ms": 1000,
                "retention_secs": 900,
                "max_bytes": 33554432,
                "size_bytes": 41496,
                "snapshots": 300,
                "missed": 0,
                "marks": 1,
                "ended": None,
                "state": "running",
                "black_box": {"run": "2345-142313-9bfa3fdd-2300", "error": None, "dropped": 0},
            },
            "self": {"pid": 2300, "cpu_secs": 1.52, "peak_rss_kb": 49600, "snapshots": 300},
        },
        samples=(Sample("The target, and the cost of the sidecar", 'curl -s "$URL/info" | jq "{target, self}"'),),
    ),
    ("get", "/hello"): Operation(
        summary="Prove that this is the sidecar of the runtime file",
        description="Only with `--auth token`. A client asks before it sends the token: another user may have taken the"
        " port of a sidecar that died.",
        answer="The proof.",
        reasons=("no_such_route",),
        models=(bodies.Hello,),
        example={"app": "vitalsd", "proof": "5f" * 32},
    ),
    ("get", "/"): Operation(
        description="CPU, memory and every thread over time, in a browser. It asks for nothing but this API.",
        answer="The page.",
        other={"text/html": ""},
        samples=(Sample("Whose policy is strict", 'curl -s -o /dev/null -D - "$URL/" | grep -i "^content-security"'),),
    ),
    ("get", "/docs"): Operation(
        description="This reference, from this server alone, without a script.",
        answer="The page.",
        other={"text/html": ""},
    ),
    ("get", "/openapi.json"): Operation(
        description="For code generators and for `/docs`.",
        answer="OpenAPI 3.1.",
        other={JSON: ""},
        samples=(Sample("Every route", "curl -s \"$URL/openapi.json\" | jq -r '.paths | keys[]'"),),
    ),
}

FAILURES: dict[type[SourceError], str] = {
    AccessDenied: "This user may not read the target.",
    NoSuchProcess: "No such process.",
    TargetGone: "The target has exited.",
    Unsupported: "Not on this platform.",
    KernelError: "The kernel refused, or the target does not answer.",
}

DETAILS: dict[Reason, str] = {
    "bad_parameter": "must be greater than or equal to 10; got '5'",
    "bad_body": "Field required; send a JSON object with label",
    "not_recording": "nothing is being recorded (--record-interval 0)",
    "busy": "8 streams are open already",
    "hung": "the directory of runs: a read has not returned for 5 s",
    "unread": "32 MiB of answers wait already for clients that take them",
    "token": "send the token of the runtime file as Authorization: Bearer; `vitalsd endpoints` says where it is",
}
