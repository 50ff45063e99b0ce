"""``vitalsd runs`` and ``vitalsd endpoints``: what is on disk, and what is running."""

import click

from vitalsd.cli.options import print_table, runs_path

__all__ = ["endpoints", "runs"]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def runs(as_json: bool) -> None:
    """List the runs on disk: crashed ones first, then the newest first."""
    import json

    from vitalsd.http.past import run_json
    from vitalsd.runs import RunDirectory

    path = runs_path()
    found = RunDirectory(path).runs()
    if as_json:
        click.echo(json.dumps([run_json(run) for run in found], indent=2))
        return
    if not found:
        click.echo(f"no runs in {path}")
        return
    rows = [
        [run.state, run.identity.name, str(run.identity.pid), _last_seen(run.last_wall_ns), run.ended or "", run.id]
        for run in found
    ]
    print_table(["STATE", "NAME", "PID", "LAST SEEN", "ENDED", "ID"], rows)
    click.echo(f"\nreplay one with: vitalsd replay {path}/ID.sqlite")


def _last_seen(wall_ns: int | None) -> str:
    from vitalsd.wire import iso

    return "never" if wall_ns is None else iso(wall_ns)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def endpoints(as_json: bool) -> None:
    """List your sidecars that are running, the newest first, and clear away what dead ones left.

    A token is never printed; it is in the FILE.
    """
    import json
    from dataclasses import asdict

    from vitalsd.endpoint import published, runtime_directories, sweep

    found = []
    for directory in runtime_directories():
        sweep(directory)
        found += [entry for entry in published(directory) if entry.liveness != "dead"]
    found.sort(key=lambda entry: entry.endpoint.started_at, reverse=True)
    if as_json:
        shown = [
            asdict(entry.endpoint)
            | {
                "url": entry.endpoint.url,
                "token": entry.endpoint.token is not None,
                "state": entry.liveness,
                "file": str(entry.path),
            }
            for entry in found
        ]
        click.echo(json.dumps(shown, indent=2))
        return
    if not found:
        click.echo("no sidecar of yours is running")
        return
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
