"""Run ``vitalsd report``: make a bug report, and give it to the spool or write it to a file."""

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vitalsd.cli.options import (
    CommandFailed,
    UsageRefused,
    app_option,
    app_version_option,
    application_of,
    complain,
    runs_path,
)
from vitalsd.cli.spool import ca_file_option, open_spool, send_reports, utc_time
from vitalsd.contract.report_archive import MANIFEST, PREVIOUS_RUN
from vitalsd.text import one_line, printable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from vitalsd.contract.report_archive import Bundle
    from vitalsd_client.locate import RunningSidecar
    from vitalsd_client.report import BugReport
    from vitalsd_client.spool import Spool

__all__ = ["report"]

SHOWN_RUNS = 10
"""Number of runs or processes that a message lists; `vitalsd runs` lists all runs."""
REPLAY_S = 5.0
"""A sidecar that replays a file has this long to answer, s."""
MAX_REPORT_BYTES = 64 << 20
"""Limit of a report from a sidecar that replays it, bytes: that of `vitalsd.recording.replay_file`."""


@click.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Write the zip to this file or directory.  [.]",
)
@click.option("--upload", metavar="URL", help="Send the report to this URL, through the spool (see `vitalsd spool`).")
@ca_file_option
@click.option(
    "--attach",
    "files",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Add this file to the report.",
)
@click.option("--message", default="", metavar="TEXT", help="Describe what is wrong.")
@app_option
@app_version_option
@click.option(
    "--pid",
    type=click.IntRange(1, 2**31 - 1),
    metavar="N",
    help="Report this process.  [default: that of your newest sidecar]",
)
@click.option("--url", metavar="URL", help="Ask the sidecar at this URL, for example http://127.0.0.1:9779.")
@click.option("--run", "run_id", metavar="ID", help="Include this earlier run, from the list of `vitalsd runs`.")
@click.option("--children", is_flag=True, help="Let the report name the child processes of the process.")
@click.option("--preview", is_flag=True, help="Show what the report would contain, and write nothing.")
@click.option("--direct", is_flag=True, help="Measure vitalsd itself without a sidecar, to try it out.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def report(
    out: Path | None,
    upload: str | None,
    ca_file: Path | None,
    files: tuple[Path, ...],
    message: str,
    app: str | None,
    app_version: str | None,
    pid: int | None,
    url: str | None,
    run_id: str | None,
    children: bool,
    preview: bool,
    direct: bool,
    as_json: bool,
) -> None:
    """Make a bug report: metrics, history, marks and the run that crashed before, in one zip.

    It is written even if nothing is running; then it contains the newest crashed run of the application
    that no report contains yet. What is missing is listed on stderr and in manifest.json. With --upload it
    goes into the spool and from there to URL; what cannot be sent now stays there for `vitalsd spool send`.

    Status 0: the report is written. 1: it could not be written or sent. 2: wrong usage.
    """
    import json

    from vitalsd_client.report import BugReport

    application_of(app, app_version)
    if ca_file is not None and upload is None:
        raise click.UsageError("--ca-file does nothing without --upload")
    if url is not None and (found := _replayed(url)) is not None:
        added = message or files or app or app_version or run_id or children or upload or preview or as_json
        _save_original(*found, out, added=bool(added))
        return
    pid, direct, running = _subject(app, pid, url, direct)
    complaints: list[str] = []
    try:
        outbox = _outbox(upload, ca_file, complaints)
        made = BugReport(
            app,
            app_version=app_version,
            description=message,
            url=url,
            pid=pid,
            direct=direct,
            children=children,
            run_id=run_id,
            running=running,
        )
        for file in files:
            made.attach_file(file)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    with _waiting("asking the sidecar", quiet=as_json):
        bundle = made.bundle()
    manifest = json.loads(bundle.members[MANIFEST])
    if run_id is not None and (reason := _missing_run(manifest)):
        raise UsageRefused(reason)
    if preview:
        _preview(bundle, manifest, as_json=as_json)
        return
    delivered = _deliver(made, manifest, app, out, outbox, complaints, as_json=as_json)
    raise SystemExit(0 if delivered else 1)


def _subject(app: str | None, pid: int | None, url: str | None, direct: bool) -> tuple[int | None, bool, bool]:
    """Return the process to report, whether to measure it directly, and whether it runs."""
    if not (direct or pid is not None or url is not None):
        pid = _running_target(app)
        return pid, direct, pid is not None
    # With --pid alone the process is measured as by `vitalsd sample --pid`.
    return pid, direct or (pid is not None and url is None), True


def _outbox(upload: str | None, ca_file: Path | None, complaints: list[str]) -> "Spool | None":
    """Return the spool to send from; if it cannot be used, ``None``, with the reason in `complaints`."""
    try:
        return open_spool(upload, ca_file) if upload is not None else None
    except CommandFailed as error:
        complaints.append(error.message)
        return None


def _replayed(url: str) -> "tuple[RunningSidecar, str] | None":
    """
    Return the sidecar at `url` and the name of the file that it replays.

    ``None``: it watches a process, or does not answer.
    """
    import json
    import time

    from vitalsd.discovery.http_connection import ExchangeError
    from vitalsd_client.locate import NoSidecarError, locate

    try:
        (sidecar,) = locate(url=url)
    except NoSidecarError as error:
        raise UsageRefused(str(error)) from None
    try:
        info = json.loads(sidecar.get("/info", deadline=time.monotonic() + REPLAY_S).body)
        return None if info.get("replay") is None else (sidecar, str(info["replay"]["file"]))
    except (ExchangeError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return None


def _save_original(sidecar: "RunningSidecar", name: str, out: Path | None, *, added: bool) -> None:
    """Write the report that is replayed, as it is: a new one would describe the machine of its reader."""
    import time

    from vitalsd.contract.report_archive import write_new
    from vitalsd.discovery.http_connection import ExchangeError

    if added:
        raise UsageRefused(
            f"{name} is replayed there, and a replay hands out the original report: leave out"
            " all options but --url and --out"
        )
    try:
        answer = sidecar.get("/report.zip", deadline=time.monotonic() + REPLAY_S, max_bytes=MAX_REPORT_BYTES)
    except ExchangeError as error:
        raise CommandFailed(str(error)) from None
    if answer.content_type != "application/zip":
        raise CommandFailed(f"{name} is replayed there, which is not a report; nothing was written")
    directory = out or Path()
    try:
        directory.mkdir(exist_ok=True)
        stem = "".join(c if c.isalnum() or c in "._-" else "_" for c in name.removesuffix(".zip"))[:80].lstrip(".")
        click.echo(str(write_new(directory, stem or "report", ".zip", answer.body)))
    except OSError as error:
        raise CommandFailed(f"cannot write the report to {directory}: {error.strerror}") from None


def _running_target(app: str | None) -> int | None:
    """Return the target of the newest sidecar, if `app` is given that of this application."""
    from vitalsd.discovery.runtime_file import discover

    found = [(each.app, each.target.pid) for each in discover() if each.target is not None]
    fitting = [pid for its_app, pid in found if app in (None, its_app)]
    if fitting:
        return fitting[0]
    if anonymous := [pid for its_app, pid in found if its_app is None]:
        pids = ", ".join(map(str, anonymous[:SHOWN_RUNS]))
        complain(
            f"no sidecar of {app} is running; those of the processes {pids} have no application id and are"
            " left out; to make the report of one of them: --pid N"
        )
    return None


def _missing_run(manifest: "dict[str, Any]") -> str | None:
    """Return why ``previous-run.json`` is missing; ``None`` if a redact hook took it out."""
    return next((each["reason"] for each in manifest["failures"] if each["member"] == PREVIOUS_RUN), None)


def _preview(bundle: "Bundle", manifest: "dict[str, Any]", *, as_json: bool) -> None:
    """Print every member as it would be written; bytes that are no text by their number."""
    import json

    texts: dict[str, str | None] = {}
    for name, content in bundle.members.items():
        try:
            texts[name] = content.decode()
        except UnicodeDecodeError:
            texts[name] = None
    if as_json:
        members = [{"name": name, "size": len(bundle.members[name]), "text": text} for name, text in texts.items()]
        click.echo(json.dumps({"members": members, "failures": manifest["failures"]}, indent=2))
        return
    for name, text in texts.items():
        click.echo(f"--- {name}: {len(bundle.members[name])} bytes")
        if text is None:
            click.echo("(no text)")
        else:
            click.echo("\n".join(map(printable, text.rstrip("\n").split("\n"))))
    _say_what_is_missing(manifest)


def _say_what_is_missing(manifest: "dict[str, Any]") -> None:
    for failure in manifest["failures"]:
        complain(f"{failure['member']}: {failure['reason']}")


def _list_crashed_runs(app: str | None) -> None:
    """List the crashed runs on disk that no report contains; with `app`, only those of this application."""
    from vitalsd.recording.run_directory import RunDirectory
    from vitalsd.report.previous_run import is_alive

    try:
        runs = [run for run in RunDirectory(runs_path()).runs() if run.state == "crashed" and not run.reported]
    except CommandFailed:
        return
    alive = is_alive()
    runs = [run for run in runs if (app is None or run.application.app in (None, app)) and not alive(run.to_json())]
    if not runs:
        return
    complain("crashed runs on disk that no report contains; include one with --run ID:")
    for run in runs[:SHOWN_RUNS]:
        app = run.application.app or "no application id"
        seen = "" if run.last_wall_ns is None else f", last seen {utc_time(run.last_wall_ns / 1e9)}"
        click.echo(one_line(f"  {run.id}  {app}, {run.identity.name}{seen}, {run.ended or 'end not seen'}"), err=True)
    if len(runs) > SHOWN_RUNS:
        click.echo(f"  and {len(runs) - SHOWN_RUNS} more; `vitalsd runs` lists them", err=True)


def _deliver(
    made: "BugReport",
    manifest: "dict[str, Any]",
    app: str | None,
    out: Path | None,
    outbox: "Spool | None",
    complaints: list[str],
    *,
    as_json: bool,
) -> bool:
    """Write the report, or spool and send it; print the result, and return whether all of that worked."""
    import json

    bundle = made.bundle()
    written, taken, more = _keep(made, out, outbox)
    complaints += more
    if written is not None and complaints and outbox is None and out is None:
        complaints.append("it was written to the current directory instead")
    if written is None and not taken:
        raise CommandFailed("; ".join(complaints))
    if not as_json:
        _say_what_is_missing(manifest)
        if written:
            click.echo(str(written))
        if PREVIOUS_RUN not in bundle.members:
            _list_crashed_runs(app)
    for complaint in complaints:
        complain(complaint)
    uploaded, sent = send_reports(outbox, bundle.report_id, quiet=as_json) if outbox and taken else (None, True)
    if as_json:
        result = {
            "report_id": bundle.report_id,
            "file": None if written is None else str(written),
            "members": manifest["members"],
            "failures": manifest["failures"],
            "upload": uploaded,
        }
        click.echo(json.dumps(result, indent=2))
    return not complaints and sent


def _keep(made: "BugReport", out: Path | None, outbox: "Spool | None") -> tuple[Path | None, bool, list[str]]:
    """Return the file, whether the spool has the report too, and what failed: if one fails, try the other still."""
    from vitalsd_client.spool_store import SpoolError

    file, taken = None, False
    complaints: list[str] = []

    def save(directory: Path) -> Path | None:
        try:
            return made.save(directory)
        except OSError as error:
            complaints.append(f"cannot write the report to {directory}: {error.strerror}")
            return None

    if outbox is None or out is not None:
        file = save(out or Path())
    if outbox is not None:
        try:
            made.submit(outbox)
            taken = True
        except SpoolError as error:
            complaints.append(str(error))
            if file is None:
                file = save(Path())
                complaints += [] if file is None else ["it was written to the current directory instead"]
    return file, taken, complaints


@contextmanager
def _waiting(what: str, *, quiet: bool) -> "Iterator[None]":
    """Show a spinner on a terminal, for what may take more than a second."""
    from rich.console import Console

    console = Console(stderr=True, quiet=quiet)
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        yield
