"""``vitalsd runs`` and ``vitalsd endpoints``: what is on disk, and what is running."""

from typing import TYPE_CHECKING

import click

from vitalsd.cli.options import complain, print_table, runs_path

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vitalsd.discovery.runtime_file import Endpoint, Published

__all__ = ["endpoints", "runs"]

HEALTH_S = 3.0
"""For a sidecar to say how it is."""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def runs(as_json: bool) -> None:
    """List the runs on disk: crashed ones first, then the newest first."""
    import json

    from vitalsd.recording.run_directory import RunDirectory

    path = runs_path()
    found, unreadable, older = RunDirectory(path).scan()
    for reason in unreadable.values():
        complain(reason)
    if older:
        complain(f"{older} older runs in {path} are not listed")
    if as_json:
        click.echo(json.dumps([run.to_json() for run in found], indent=2))
        return
    if not found:
        click.echo(f"no runs in {path}")
        return
    rows = [
        [
            run.state + (", reported" if run.reported else ""),
            run.application.app or "-",
            run.identity.name,
            str(run.identity.pid),
            _last_seen(run.last_wall_ns),
            run.ended or "",
            run.id,
        ]
        for run in found
    ]
    print_table(["STATE", "APP", "NAME", "PID", "LAST SEEN", "ENDED", "ID"], rows)
    click.echo(f"\nshow one:            vitalsd replay {path}/ID.sqlite\nmake a report of one: vitalsd report --run ID")


def _last_seen(wall_ns: int | None) -> str:
    from vitalsd.contract.encoding import iso

    return "never" if wall_ns is None else iso(wall_ns)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--check", is_flag=True, help="Ask each for its health; exit status 1 unless all are well and there is one."
)
def endpoints(as_json: bool, check: bool) -> None:
    """List your sidecars that are running, the newest first, and clear away what dead ones left.

    A token is never printed; it is in the FILE.
    """
    import json
    from dataclasses import asdict

    from vitalsd.discovery.directories import runtime_directories
    from vitalsd.discovery.runtime_file import published, sweep

    found = []
    for directory in runtime_directories():
        sweep(directory)
        found += [entry for entry in published(directory) if entry.liveness != "dead"]
    found.sort(key=lambda entry: entry.endpoint.started_at, reverse=True)
    ill = {entry.path: reason for entry in found if check and (reason := _illness(entry.endpoint))}
    if as_json:
        shown = [
            asdict(entry.endpoint)
            | {
                "url": entry.endpoint.url,
                "token": entry.endpoint.token is not None,
                "state": entry.liveness,
                "file": str(entry.path),
            }
            | ({"healthy": entry.path not in ill, "reason": ill.get(entry.path)} if check else {})
            for entry in found
        ]
        click.echo(json.dumps(shown, indent=2))
    elif not found:
        click.echo("no sidecar of yours is running")
    else:
        _show(found)
        for path, reason in ill.items():
            complain(f"{path.name}: {reason}")
    if check and (ill or not found):
        raise SystemExit(1)


def _illness(endpoint: "Endpoint") -> str | None:
    """What is wrong with a sidecar that is asked for its health; ``None`` if nothing is."""
    import time

    from vitalsd.discovery.http_connection import ExchangeError
    from vitalsd_client.locate import locate

    (sidecar,) = locate(socket=endpoint.socket, url=None if endpoint.socket else endpoint.url)
    try:
        answer = sidecar.get("/healthz", deadline=time.monotonic() + HEALTH_S)
    except ExchangeError as error:
        return str(error)
    return None if answer.status == 200 else f"/healthz answers {answer.status}: {answer.body[:200]!a}"


def _show(found: "Sequence[Published]") -> None:
    rows = [
        [
            str(entry.endpoint.pid),
            str(entry.endpoint.target.pid) if entry.endpoint.target else "-",
            entry.liveness,
            entry.endpoint.started_at[:19] + "Z",
            entry.endpoint.url or "-",
            entry.endpoint.socket or "-",
            str(entry.path),
        ]
        for entry in found
    ]
    print_table(["PID", "TARGET", "STATE", "STARTED", "URL", "SOCKET", "FILE"], rows)
