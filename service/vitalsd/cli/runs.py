"""Run ``vitalsd runs``: list the runs on disk."""

import click

from vitalsd.cli.options import complain, print_table, runs_path

__all__ = ["runs"]


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
    from vitalsd.text import iso

    return "never" if wall_ns is None else iso(wall_ns)
