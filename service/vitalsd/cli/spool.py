"""Run ``vitalsd spool``: list, send and drop the bug reports that wait for their upload."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from vitalsd.cli.options import CommandFailed, Number, complain
from vitalsd.text import one_line

if TYPE_CHECKING:
    from typing import Any

    from vitalsd_client.spool import Spool
    from vitalsd_client.spool_sender import Outcome
    from vitalsd_client.spool_store import Entry

__all__ = ["ca_file_option", "open_spool", "send_reports", "spool", "utc_time"]

ca_file_option = click.option(
    "--ca-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Also trust these certificate authorities (PEM) for the upload.",
)


@click.group()
def spool() -> None:
    """List, send or drop the bug reports that wait for their upload."""


@spool.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def spool_list(as_json: bool) -> None:
    """List the reports: those that wait, those that were sent, those that were refused."""
    import json
    from dataclasses import asdict

    kept = open_spool()
    entries = kept.entries()
    if as_json:
        click.echo(json.dumps([asdict(entry) for entry in entries], indent=2))
        return
    if not entries:
        click.echo(f"no reports in {kept.directory}")
        return
    for entry in entries:
        size = f"{entry.size:>9} B" if entry.size else " " * 11
        line = f"{entry.report_id}  {entry.state:7}  {utc_time(entry.added)}  {size}  {entry.url or '-'}  {entry.note}"
        click.echo(one_line(line).rstrip())


@spool.command("send")
@click.argument("report_id", required=False)
@click.option("--url", metavar="URL", help="Use this URL for reports without one; with REPORT_ID, instead of its own.")
@ca_file_option
@click.option(
    "--wait", type=Number(0), default=0.0, metavar="SECONDS", help="Keep retrying failed uploads for this long."
)
@click.option("--retry-failed", is_flag=True, help="Also send reports that the server refused.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def spool_send(
    report_id: str | None, url: str | None, ca_file: Path | None, wait: float, retry_failed: bool, as_json: bool
) -> None:
    """Send the reports that wait, or the one with REPORT_ID. Status 1 if any of them could not be sent."""
    import json

    from vitalsd_client.spool_store import SpoolError

    kept = open_spool(url, ca_file)
    try:
        entries = kept.entries()
        if report_id is not None and all(entry.report_id != report_id for entry in entries):
            raise CommandFailed(f"no report {report_id}; `vitalsd spool list` shows them")
        for entry in entries:
            if entry.state == "failed" and entry.report_id == report_id and not retry_failed:
                raise CommandFailed(f"{report_id} was refused: {entry.note}; --retry-failed sends it again")
        if retry_failed:
            for entry in entries:
                if entry.state == "failed" and report_id in (None, entry.report_id):
                    kept.retry(entry.report_id)
        if url is not None:
            _readdress(kept, url, report_id)
        results, sent = send_reports(kept, report_id, wait_s=wait, quiet=as_json)
    except SpoolError as error:
        raise CommandFailed(str(error)) from None
    if as_json:
        click.echo(json.dumps(results, indent=2))
    raise SystemExit(0 if sent else 1)


@spool.command("drop")
@click.argument("report_ids", nargs=-1, metavar="REPORT_ID...")
@click.option("--all", "everything", is_flag=True, help="All of them.")
def spool_drop(report_ids: tuple[str, ...], everything: bool) -> None:
    """Remove reports, sent or not."""
    from vitalsd_client.spool_store import SpoolError

    if bool(report_ids) == everything:
        raise click.UsageError("give the ids of reports, or --all")
    kept = open_spool()
    try:
        for report_id in [entry.report_id for entry in kept.entries()] if everything else report_ids:
            if not kept.drop(report_id):
                raise CommandFailed(f"no report {report_id}; `vitalsd spool list` shows them")
    except SpoolError as error:
        raise CommandFailed(str(error)) from None


def open_spool(url: str | None = None, ca_file: Path | None = None) -> "Spool":
    """
    Open the spool of this user.

    Args:
        url: where reports without a URL of their own go; ``None``: nowhere.
        ca_file: PEM file with certificates of authorities to trust besides those of the system.

    Raises:
        click.UsageError: `url` is not accepted.
        CommandFailed: the spool cannot be used.
    """
    from vitalsd.discovery.directories import EndpointError, state_directory
    from vitalsd_client.spool import Spool
    from vitalsd_client.spool_store import SpoolError

    try:
        return Spool(state_directory() / "spool", url, ca_file=ca_file)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    except (SpoolError, EndpointError) as error:
        raise CommandFailed(str(error)) from None


def _readdress(kept: "Spool", url: str, report_id: str | None) -> None:
    """Direct one report to `url`; without `report_id`, only print how to redirect those with another URL."""
    others = [entry for entry in kept.entries() if entry.state == "pending" and entry.url not in (None, url)]
    if report_id is None and others:
        complain(
            f"{len(others)} with a URL of their own go there and not to --url; "
            "to change that, one at a time: vitalsd spool send REPORT_ID --url URL"
        )
    if report_id is not None and any(entry.report_id == report_id for entry in others):
        # Only for another URL: to name the same server again must not cancel the delay that this server demanded.
        kept.readdress(report_id)


def utc_time(moment: float) -> str:
    """Return a Unix time, in seconds, as ``2026-01-31 12:00:00Z``."""
    from datetime import UTC, datetime

    return f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%d %H:%M:%SZ}"


def send_reports(
    kept: "Spool", report_id: str | None, *, wait_s: float = 0.0, quiet: bool = False
) -> "tuple[list[dict[str, Any]], bool]":
    """Send with a progress bar; return what happened, and whether nothing is left to send."""
    results = [_result(outcome, quiet) for outcome in _send_with_progress(kept, report_id, wait_s, quiet)]
    left = [entry for entry in kept.entries() if entry.state == "pending" and report_id in (None, entry.report_id)]
    results += _kept_back(left, {result["report_id"] for result in results}, quiet)
    sent = {result["report_id"] for result in results if result["sent"]}
    not_sent = {result["report_id"] for result in results} - sent
    if left and not quiet:
        click.echo(f"{len(left)} left in {kept.directory}; try again with: vitalsd spool send", err=True)
    if not quiet:
        _say_what_was_refused(kept, report_id)
    return results, not left and not not_sent


def _send_with_progress(kept: "Spool", report_id: str | None, wait_s: float, quiet: bool) -> "list[Outcome]":
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def progress(entry: "Entry", sent: int, total: int) -> None:
            if entry.report_id not in tasks:
                tasks[entry.report_id] = bar.add_task(entry.report_id[:12], total=total)
            bar.update(tasks[entry.report_id], completed=sent)

        return kept.send(wait_s=wait_s, ignore_delays=True, progress=progress, report_id=report_id)


def _result(outcome: "Outcome", quiet: bool) -> "dict[str, Any]":
    """Return the JSON of one attempt, and print its line unless `quiet`."""
    from vitalsd_client.upload import UploadReceipt

    attempt = outcome.attempt
    sent = isinstance(attempt, UploadReceipt)
    said = attempt.number if isinstance(attempt, UploadReceipt) else attempt.reason
    if not quiet:
        line = f"{outcome.report_id}: {'sent, receipt ' if sent else 'not sent: '}{said}"
        click.echo(one_line(line), err=not sent)
    return {"report_id": outcome.report_id, "sent": sent, "receipt" if sent else "reason": said}


def _kept_back(left: "list[Entry]", tried: set[str], quiet: bool) -> "list[dict[str, Any]]":
    """Return the JSON of the reports that were not tried because the server demanded a delay; print their lines."""
    import time

    results: list[dict[str, Any]] = []
    for entry in left:
        if entry.asked and entry.not_before > time.time() and entry.report_id not in tried:
            reason = f"the server asked to wait until {utc_time(entry.not_before)}"
            results.append({"report_id": entry.report_id, "sent": False, "reason": reason})
            if not quiet:
                click.echo(f"{entry.report_id}: not sent: {reason}", err=True)
    return results


def _say_what_was_refused(kept: "Spool", report_id: str | None) -> None:
    given_up = [entry for entry in kept.entries() if entry.state == "failed" and report_id in (None, entry.report_id)]
    if given_up:
        which = given_up[0].report_id if len(given_up) == 1 else "REPORT_ID"
        how = f"vitalsd spool send {which} --retry-failed [--url URL]"
        click.echo(
            f"{len(given_up)} refused by the server, and kept in {kept.directory}; to try again: {how}", err=True
        )
