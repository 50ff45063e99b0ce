"""``vitalsd report`` and ``vitalsd spool``: bug reports, and sending them."""

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vitalsd.cli.options import (
    Failed,
    Number,
    Refused,
    app_option,
    app_version_option,
    application_of,
    complain,
    runs_path,
)
from vitalsd.contract.report_archive import MANIFEST, PREVIOUS_RUN
from vitalsd.text import one_line, printable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from vitalsd.contract.report_archive import Bundle
    from vitalsd_client.locate import Sidecar
    from vitalsd_client.report import BugReport
    from vitalsd_client.spool import Spool
    from vitalsd_client.spool_store import Entry

__all__ = ["report", "spool"]

SHOWN_RUNS = 10
REPLAY_S = 5.0
"""For the answer of a sidecar that replays a file."""
MAX_REPORT_BYTES = 64 << 20

ca_file_option = click.option(
    "--ca-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Trust these authorities (PEM) too for the upload.",
)


@click.command()
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), metavar="DIR", help="Write the zip there.  [.]"
)
@click.option("--upload", metavar="URL", help="Send it there, by way of the spool; see `vitalsd spool`.")
@ca_file_option
@click.option("--attach", "files", multiple=True, type=click.Path(path_type=Path), metavar="FILE", help="Add a file.")
@click.option("--message", default="", metavar="TEXT", help="What is wrong, in your words.")
@app_option
@app_version_option
@click.option("--pid", type=click.IntRange(1, 2**31 - 1), metavar="N", help="Process.  [that of your newest sidecar]")
@click.option("--url", metavar="URL", help="Ask this sidecar: http://127.0.0.1:9779")
@click.option("--run", "run_id", metavar="ID", help="Include this earlier run; `vitalsd runs` lists them.")
@click.option("--preview", is_flag=True, help="Show what would be in the report; nothing is written.")
@click.option("--direct", is_flag=True, help="Without a sidecar, measure vitalsd itself: to try it out.")
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

    from vitalsd_client.locate import NoSidecar, locate
    from vitalsd_client.report import BugReport

    application_of(app, app_version)
    if ca_file is not None and upload is None:
        raise click.UsageError("--ca-file does nothing without --upload")
    if url is not None:
        try:
            (sidecar,) = locate(url=url)
        except NoSidecar as error:
            raise Refused(str(error)) from None
        if (replayed := _replayed(sidecar)) is not None:
            added = message or files or app or app_version or run_id or upload or preview or as_json
            _save_original(sidecar, replayed, out, added=bool(added))
            return
    running = direct or pid is not None or url is not None
    if not running:
        pid = _running_target(app)
        running = pid is not None
    elif pid is not None and url is None:
        direct = True  # as `vitalsd sample --pid` does
    outbox, complaints = None, []
    try:
        try:
            outbox = _spool(upload, ca_file) if upload is not None else None
        except Failed as error:
            complaints.append(error.message)
        made = BugReport(
            app,
            app_version=app_version,
            description=message,
            url=url,
            pid=pid,
            direct=direct,
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
        raise Refused(reason)
    if preview:
        _preview(bundle, manifest, as_json=as_json)
        return
    written, taken, more = _deliver(made, out, outbox)
    complaints += more
    if written is not None and complaints and outbox is None and out is None:
        complaints.append("it was written to the current directory instead")
    if written is None and not taken:
        raise Failed("; ".join(complaints))
    if not as_json:
        _say_what_is_missing(manifest)
        if written:
            click.echo(str(written))
        if PREVIOUS_RUN not in bundle.members:
            _list_crashed_runs(app)
    for complaint in complaints:
        complain(complaint)
    result = {
        "report_id": bundle.report_id,
        "file": None if written is None else str(written),
        "members": manifest["members"],
        "failures": manifest["failures"],
        "upload": None,
    }
    failed = bool(complaints)
    if outbox is not None and taken:
        result["upload"], sent = _send(outbox, bundle.report_id, quiet=as_json)
        failed = failed or not sent
    if as_json:
        click.echo(json.dumps(result, indent=2))
    raise SystemExit(1 if failed else 0)


def _replayed(sidecar: "Sidecar") -> str | None:
    """Return the name of the file that a sidecar replays; ``None``: it watches a process, or does not answer."""
    import json
    import time

    from vitalsd.discovery.http_connection import ExchangeError

    try:
        info = json.loads(sidecar.get("/info", deadline=time.monotonic() + REPLAY_S).body)
        return None if info.get("replay") is None else str(info["replay"]["file"])
    except (ExchangeError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return None


def _save_original(sidecar: "Sidecar", name: str, out: Path | None, *, added: bool) -> None:
    """Write the report that is replayed, as it is: a new one would describe the machine of its reader."""
    import time

    from vitalsd.contract.report_archive import write_new
    from vitalsd.discovery.http_connection import ExchangeError

    if added:
        raise Refused(
            f"{name} is replayed there, and a replay hands out the original report: leave out"
            " all options but --url and --out"
        )
    try:
        answer = sidecar.get("/report.zip", deadline=time.monotonic() + REPLAY_S, max_bytes=MAX_REPORT_BYTES)
    except ExchangeError as error:
        raise Failed(str(error)) from None
    if answer.content_type != "application/zip":
        raise Failed(f"{name} is replayed there, which is not a report; nothing was written")
    directory = out or Path()
    try:
        directory.mkdir(exist_ok=True)
        stem = "".join(c if c.isalnum() or c in "._-" else "_" for c in name.removesuffix(".zip"))[:80].lstrip(".")
        click.echo(str(write_new(directory, stem or "report", ".zip", answer.body)))
    except OSError as error:
        raise Failed(f"cannot write the report to {directory}: {error.strerror}") from None


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
    """Say which crashed runs are on disk that no report contains; with `app`, none of another application."""
    from vitalsd.recording.run_directory import RunDirectory
    from vitalsd.report.previous_run import is_alive

    try:
        runs = [run for run in RunDirectory(runs_path()).runs() if run.state == "crashed" and not run.reported]
    except Failed:
        return
    alive = is_alive()
    runs = [run for run in runs if (app is None or run.application.app in (None, app)) and not alive(run.to_json())]
    if not runs:
        return
    complain("crashed runs on disk that no report contains; include one with --run ID:")
    for run in runs[:SHOWN_RUNS]:
        app = run.application.app or "no application id"
        seen = "" if run.last_wall_ns is None else f", last seen {_shown(run.last_wall_ns / 1e9)}"
        click.echo(one_line(f"  {run.id}  {app}, {run.identity.name}{seen}, {run.ended or 'end not seen'}"), err=True)
    if len(runs) > SHOWN_RUNS:
        click.echo(f"  and {len(runs) - SHOWN_RUNS} more; `vitalsd runs` lists them", err=True)


@click.group()
def spool() -> None:
    """Look at, send or drop the bug reports that wait for their upload."""


@spool.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def spool_list(as_json: bool) -> None:
    """List the reports: those that wait, those that were sent, those that were refused."""
    import json
    from dataclasses import asdict

    kept = _spool()
    entries = kept.entries()
    if as_json:
        click.echo(json.dumps([asdict(entry) for entry in entries], indent=2))
        return
    if not entries:
        click.echo(f"no reports in {kept.directory}")
        return
    for entry in entries:
        size = f"{entry.size:>9} B" if entry.size else " " * 11
        line = f"{entry.report_id}  {entry.state:7}  {_shown(entry.added)}  {size}  {entry.url or '-'}  {entry.note}"
        click.echo(one_line(line).rstrip())


@spool.command("send")
@click.argument("report_id", required=False)
@click.option("--url", metavar="URL", help="For reports without one; with REPORT_ID: instead of its own.")
@ca_file_option
@click.option("--wait", type=Number(0), default=0.0, metavar="SECONDS", help="Go on with what fails so long.")
@click.option("--retry-failed", is_flag=True, help="Also those that the server refused.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def spool_send(
    report_id: str | None, url: str | None, ca_file: Path | None, wait: float, retry_failed: bool, as_json: bool
) -> None:
    """Send the reports that wait, or the one with REPORT_ID. Status 1 if any of them could not be sent."""
    import json

    from vitalsd_client.spool_store import SpoolError

    kept = _spool(url, ca_file)
    try:
        entries = kept.entries()
        if report_id is not None and all(entry.report_id != report_id for entry in entries):
            raise Failed(f"no report {report_id}; `vitalsd spool list` shows them")
        for entry in entries:
            if entry.state == "failed" and entry.report_id == report_id and not retry_failed:
                raise Failed(f"{report_id} was refused: {entry.note}; --retry-failed sends it again")
        if retry_failed:
            for entry in entries:
                if entry.state == "failed" and report_id in (None, entry.report_id):
                    kept.retry(entry.report_id)
        if url is not None:
            _readdress(kept, url, report_id)
        results, sent = _send(kept, report_id, wait_s=wait, quiet=as_json)
    except SpoolError as error:
        raise Failed(str(error)) from None
    if as_json:
        click.echo(json.dumps(results, indent=2))
    raise SystemExit(0 if sent else 1)


@spool.command("drop")
@click.argument("report_ids", nargs=-1, metavar="REPORT_ID...")
@click.option("--all", "everything", is_flag=True, help="All of them.")
def spool_drop(report_ids: tuple[str, ...], everything: bool) -> None:
    """Forget reports, sent or not."""
    from vitalsd_client.spool_store import SpoolError

    if bool(report_ids) == everything:
        raise click.UsageError("give the ids of reports, or --all")
    kept = _spool()
    try:
        for report_id in [entry.report_id for entry in kept.entries()] if everything else report_ids:
            if not kept.drop(report_id):
                raise Failed(f"no report {report_id}; `vitalsd spool list` shows them")
    except SpoolError as error:
        raise Failed(str(error)) from None


def _spool(url: str | None = None, ca_file: Path | None = None) -> "Spool":
    from vitalsd.discovery.directories import EndpointError, state_directory
    from vitalsd_client.spool import Spool
    from vitalsd_client.spool_store import SpoolError

    try:
        return Spool(state_directory() / "spool", url, ca_file=ca_file)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    except (SpoolError, EndpointError) as error:
        raise Failed(str(error)) from None


def _deliver(made: "BugReport", out: Path | None, outbox: "Spool | None") -> tuple[Path | None, bool, list[str]]:
    """The file that was written, whether the spool has it too, and what went wrong: one must not cost the other."""
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


def _readdress(kept: "Spool", url: str, report_id: str | None) -> None:
    """Send one report to `url`, wherever it was to go; of all that have another URL only say how."""
    others = [entry for entry in kept.entries() if entry.state == "pending" and entry.url not in (None, url)]
    if report_id is None and others:
        complain(
            f"{len(others)} with a URL of their own go there and not to --url; "
            "to change that, one at a time: vitalsd spool send REPORT_ID --url URL"
        )
    if report_id is not None and any(entry.report_id == report_id for entry in others):
        # Only then: what its server asked for is not undone by naming that server again.
        kept.readdress(report_id)


def _shown(moment: float) -> str:
    from datetime import UTC, datetime

    return f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%d %H:%M:%SZ}"


def _send(
    kept: "Spool", report_id: str | None, *, wait_s: float = 0.0, quiet: bool = False
) -> "tuple[list[dict[str, Any]], bool]":
    """Send with a progress bar; what happened, and whether nothing is left to send."""
    import time

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from vitalsd_client.upload import Receipt

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def progress(entry: "Entry", sent: int, total: int) -> None:
            if entry.report_id not in tasks:
                tasks[entry.report_id] = bar.add_task(entry.report_id[:12], total=total)
            bar.update(tasks[entry.report_id], completed=sent)

        outcomes = kept.send(wait_s=wait_s, ignore_delays=True, progress=progress, report_id=report_id)
    results: list[dict[str, Any]] = []
    for outcome in outcomes:
        attempt = outcome.attempt
        sent = isinstance(attempt, Receipt)
        said = attempt.number if isinstance(attempt, Receipt) else attempt.reason
        results.append({"report_id": outcome.report_id, "sent": sent, "receipt" if sent else "reason": said})
        if not quiet:
            line = f"{outcome.report_id}: {'sent, receipt ' if sent else 'not sent: '}{said}"
            click.echo(one_line(line), err=not sent)
    left = [entry for entry in kept.entries() if entry.state == "pending" and report_id in (None, entry.report_id)]
    tried = {result["report_id"] for result in results}
    for entry in left:
        if entry.asked and entry.not_before > time.time() and entry.report_id not in tried:
            reason = f"the server asked to wait until {_shown(entry.not_before)}"
            results.append({"report_id": entry.report_id, "sent": False, "reason": reason})
            if not quiet:
                click.echo(f"{entry.report_id}: not sent: {reason}", err=True)
    refused = {result["report_id"] for result in results} - {
        result["report_id"] for result in results if result["sent"]
    }
    if left and not quiet:
        click.echo(f"{len(left)} left in {kept.directory}; try again with: vitalsd spool send", err=True)
    given_up = [entry for entry in kept.entries() if entry.state == "failed" and report_id in (None, entry.report_id)]
    if given_up and not quiet:
        which = given_up[0].report_id if len(given_up) == 1 else "REPORT_ID"
        how = f"vitalsd spool send {which} --retry-failed [--url URL]"
        click.echo(
            f"{len(given_up)} refused by the server, and kept in {kept.directory}; to try again: {how}", err=True
        )
    return results, not left and not refused


@contextmanager
def _waiting(what: str, *, quiet: bool) -> "Iterator[None]":
    """A spinner on a terminal, for what may take more than a second."""
    from rich.console import Console

    console = Console(stderr=True, quiet=quiet)
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        yield
