"""``vitalsd replay``: a recorded process over HTTP."""

from pathlib import Path

import click

from vitalsd.cli.logging_setup import log_format_option, logging_as
from vitalsd.cli.options import Failed, host_option, port_option
from vitalsd.cli.service_command import Serving, Where, import_service, serve_until_signal, starts

__all__ = ["replay"]


@click.command(cls=Serving)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@host_option
@port_option
@log_format_option
@starts
def replay(file: Path, host: str, port: int | None, log_format: str) -> None:
    """Show a bug report, or the record of a run that has ended, on the page and through the API.

    FILE is the .zip of a report, its previous-run.json or runtime-history.json, or a .sqlite file of
    `vitalsd runs`. A report opens at the run that crashed, if there is one; the others are in /runs.
    """
    from vitalsd.recording.replay import Replay
    from vitalsd.recording.replay_file import read_replay_file
    from vitalsd.recording.run_reader import UnreadableRun
    from vitalsd.sampling.target_pool import Targets
    from vitalsd.sources.base import NoSuchProcess, Source

    def no_process(pid: int) -> Source:
        raise NoSuchProcess(f"this is a replay of {file.name}; it has no process {pid}")

    with logging_as(log_format):
        try:
            replayed = Replay(read_replay_file(file))
        except UnreadableRun as error:
            raise Failed(str(error)) from None
        except OSError as error:
            raise Failed(f"cannot read {file}: {error.strerror}") from None
        import_service()
        serve_until_signal(
            Targets(replayed, no_process),
            list,
            None,  # The runs of this machine are not those of the report.
            f"a replay of {file.name}",
            Where(host, port),
            published=False,
        )
