"""Run ``vitalsd replay``: serve a recorded process over HTTP."""

import os
from pathlib import Path
from typing import Any

import click

from vitalsd.cli.logging_setup import logging_as
from vitalsd.cli.options import CommandFailed, config_of, setting_option
from vitalsd.cli.service_command import Serving, import_service, refusing, serve_until_signal, starts

__all__ = ["replay"]


@click.command(cls=Serving)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@setting_option("host")
@setting_option("port")
@setting_option("log_format")
@starts
@click.pass_context
def replay(context: click.Context, /, file: Path, log_format: str, **_: Any) -> None:
    """Show a bug report, or the record of a run that has ended, on the page and through the API.

    FILE is the .zip of a report, its previous-run.json or runtime-history.json, or a .sqlite file of
    `vitalsd runs`. A report opens at the run that crashed, if there is one; the others are in /runs.
    """
    from vitalsd.recording.replay import Replay
    from vitalsd.recording.replay_file import read_replay_file
    from vitalsd.recording.run_reader import UnreadableRunError

    with logging_as(log_format):
        try:
            replayed = Replay(read_replay_file(file))
        except UnreadableRunError as error:
            raise CommandFailed(str(error)) from None
        except OSError as error:
            raise CommandFailed(f"cannot read {file}: {error.strerror}") from None
        import_service()
        from vitalsd.sidecar.builder import build_replay

        with refusing():
            service = build_replay(config_of(context), replayed, os.environ)
        serve_until_signal(service, f"a replay of {file.name}", page="/")
