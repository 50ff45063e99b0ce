"""``vitalsd report`` and ``vitalsd spool``: bug reports, and sending them."""

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vitalsd.cli.options import Failed, Number, Refused, runs_path

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from vitalsd_client.report import BugReport
    from vitalsd_client.spool import Spool
    from vitalsd_client.states import Entry

__all__ = ["report", "spool"]


@click.command()
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), metavar="DIR", help="Write the zip there.  [.]"
)
@click.option("--upload", metavar="URL", help="Send it there, by way of the spool; see `vitalsd spool`.")
@click.option("--attach", "files", multiple=True, type=click.Path(path_type=Path), metavar="FILE", help="Add a file.")
@click.option("--message", default="", metavar="TEXT", help="What is wrong, in your words.")
@click.option("--app", default="vitalsd", show_default=True, metavar="NAME", help="Begins the name of the zip.")
@click.option("--pid", type=click.IntRange(1, 2**31 - 1), metavar="N", help="Process.  [that of your newest sidecar]")
@click.option("--url", metavar="URL", help="Ask this sidecar: http://127.0.0.1:9779")
@click.option("--direct", is_flag=True, help="Without a sidecar, measure vitalsd itself: to try it out.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def report(
    out: Path | None,
    upload: str | None,
    files: tuple[Path, ...],
    message: str,
    app: str,
    pid: int | None,
    url: str | None,
    direct: bool,
    as_json: bool,
) -> None:
    """Make a bug report: metrics, history, marks and the run that crashed before, in one zip.

    It is written even if no sidecar answers, and then says why. With --upload it goes into the spool and
    from there to URL; what cannot be sent now stays there for `vitalsd spool send`.
    """
    import json

    from vitalsd.endpoint import discover
    from vitalsd_client.archive import HISTORY, METRICS, PREVIOUS_RUN
    from vitalsd_client.places import NoSidecar, locate
    from vitalsd_client.report import BugReport

    if url is not None:
        try:
            locate(url=url)
        except NoSidecar as error:
            raise Refused(str(error)) from None
    if pid is None and url is None:
        pid = next((each.target.pid for each in discover() if each.target is not None), None)
    outbox, complaints = None, []
    try:
        try:
            outbox = _spool(upload) if upload is not None else None
        except Failed as error:
            complaints.append(error.message)
        made = BugReport(app, description=message, url=url, pid=pid, direct=direct)
        for file in files:
            made.attach(file.name, file)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    with _waiting("asking the sidecar", quiet=as_json):
        bundle = made.bundle()
    metrics = json.loads(bundle.members.get(METRICS, b"{}"))
    manifest = json.loads(bundle.members["manifest.json"])
    result = {
        "report_id": bundle.report_id,
        "file": None,
        "members": manifest["members"],
        "failures": manifest["failures"],
        "upload": None,
    }
    written, taken, more = _deliver(made, out, outbox)
    complaints += more
    if written is not None and complaints and outbox is None and out is None:
        complaints.append("it was written to the current directory instead")
    if written is None and not taken:
        raise Failed("; ".join(complaints))
    result["file"] = None if written is None else str(written)
    failed = metrics.get("available") is False or bool(complaints)
    if not as_json:
        for failure in manifest["failures"]:
            click.echo(f"vitalsd: {failure['member']}: {failure['reason']}", err=True)
        if result["file"]:
            click.echo(result["file"])
        if not {HISTORY, PREVIOUS_RUN} & set(bundle.members) and (crashed := _crashed_runs()):
            click.echo(
                f"vitalsd: crashed runs on disk: {crashed}; `vitalsd runs` lists them, `vitalsd replay` shows one",
                err=True,
            )
    for complaint in complaints:
        click.echo(f"vitalsd: {complaint}", err=True)
    if outbox is not None and taken:
        result["upload"], sent = _send(outbox, bundle.report_id, quiet=as_json)
        failed = failed or not sent
    if as_json:
        click.echo(json.dumps(result, indent=2))
    raise SystemExit(1 if failed else 0)


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
        click.echo("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line).rstrip())


@spool.command("send")
@click.argument("report_id", required=False)
@click.option("--url", metavar="URL", help="For reports without one; with REPORT_ID: instead of its own.")
@click.option("--wait", type=Number(0), default=0.0, metavar="SECONDS", help="Go on with what fails so long.")
@click.option("--retry-failed", is_flag=True, help="Also those that the server refused.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def spool_send(report_id: str | None, url: str | None, wait: float, retry_failed: bool, as_json: bool) -> None:
    """Send the reports that wait, or the one with REPORT_ID. Status 1 if any of them could not be sent."""
    import json

    from vitalsd_client.states import SpoolError

    kept = _spool(url)
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
    from vitalsd_client.states import SpoolError

    if bool(report_ids) == everything:
        raise click.UsageError("give the ids of reports, or --all")
    kept = _spool()
    try:
        for report_id in [entry.report_id for entry in kept.entries()] if everything else report_ids:
            if not kept.drop(report_id):
                raise Failed(f"no report {report_id}; `vitalsd spool list` shows them")
    except SpoolError as error:
        raise Failed(str(error)) from None


def _spool(url: str | None = None) -> "Spool":
    from vitalsd.directories import EndpointError, state_directory
    from vitalsd_client.spool import Spool
    from vitalsd_client.states import SpoolError

    try:
        return Spool(state_directory() / "spool", url)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    except (SpoolError, EndpointError) as error:
        raise Failed(str(error)) from None


def _crashed_runs() -> int:
    """Of how many runs that crashed no report tells yet."""
    from vitalsd.runs import RunDirectory

    try:
        return sum(run.state == "crashed" and not run.reported for run in RunDirectory(runs_path()).runs())
    except Failed:
        return 0


def _deliver(made: "BugReport", out: Path | None, outbox: "Spool | None") -> tuple[Path | None, bool, list[str]]:
    """The file that was written, whether the spool has it too, and what went wrong: one must not cost the other."""
    from vitalsd_client.states import SpoolError

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
        click.echo(
            f"vitalsd: {len(others)} with a URL of their own go there and not to --url; "
            "to change that, one at a time: vitalsd spool send REPORT_ID --url URL",
            err=True,
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
            click.echo(f"{outcome.report_id}: {'sent, receipt ' if sent else 'not sent: '}{said}", err=not sent)
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
