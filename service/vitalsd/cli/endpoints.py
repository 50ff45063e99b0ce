"""Run ``vitalsd endpoints``: list the running sidecars."""

from typing import TYPE_CHECKING

import click

from vitalsd.cli.options import complain, print_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vitalsd.discovery.runtime_file import Endpoint, Published

__all__ = ["endpoints"]

HEALTH_S = 3.0
"""A sidecar has this long to answer ``GET /healthz``, s."""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--check", is_flag=True, help="Check the health of each; exit status 1 unless there is one and all are healthy."
)
def endpoints(as_json: bool, check: bool) -> None:
    """List your running sidecars, the newest first, and remove the files of those that have died.

    Tokens are never printed; they are in the FILE.
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
    """Request the health of a sidecar; return what is wrong, ``None`` if nothing is."""
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
