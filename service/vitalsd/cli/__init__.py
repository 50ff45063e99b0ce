"""Run the command line. A command is imported when it is used, and imports what it needs when it runs."""

import errno
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any, cast

import click

from vitalsd import __version__
from vitalsd.sidecar.frozen import runs_as_vitalsd

__all__ = ["main"]

COMMANDS = {
    "agent": "agent.agent",
    "completion": "completion.completion",
    "doctor": "doctor.doctor",
    "endpoints": "endpoints.endpoints",
    "open": "open_page.open_page",
    "replay": "replay.replay",
    "report": "report.report",
    "runs": "runs.runs",
    "sample": "sample.sample",
    "serve": "serve.serve",
    "spool": "spool.spool",
    "top": "top.top",
}
"""Module and function of each command, below this package."""
HIDDEN = {"burn": "doctor.burn"}
"""Commands that the doctor alone runs: in a frozen application there is no ``python -m`` to run them with."""

UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}
"""errno of a failed write to standard output; such an error names no file."""

EPILOG = """\b
Exit status: 0 success, 1 the metrics are not available, 2 wrong usage, 130 interrupted."""


class _Commands(Mapping[str, click.Command]):
    def __getitem__(self, name: str) -> click.Command:
        module, attribute = (COMMANDS.get(name) or HIDDEN[name]).split(".")
        command: click.Command = getattr(import_module(f"vitalsd.cli.{module}"), attribute)
        return command

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class _Program(click.Group):
    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program; an error that click does not know, such as a full disk, is reported in one line too."""
        runs_as_vitalsd()
        for number in range(3):
            try:
                os.fstat(number)
            except OSError:  # closed: the next file or socket would have the number, and whatever is written there
                os.open(os.devnull, os.O_RDONLY if number == 1 else os.O_RDWR)
                if number == 1:  # Python has no stream for it, and an answer would be lost with status 0
                    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - for the whole run
        try:
            return super().main(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - printed here, because Python would print its text as it is
            from vitalsd.worker_thread import REFUSED, NoThreadError

            if isinstance(error, NoThreadError) or str(error) == REFUSED:  # of a thread that a library starts
                click.echo(f"vitalsd: {NoThreadError()}", err=True)
            elif isinstance(error, OSError) and error.filename is None and error.errno in UNWRITABLE:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter tries once more
                click.echo(f"vitalsd: cannot write to standard output: {error.strerror}", err=True)
            else:
                _print_traceback()
            sys.exit(1)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Parse the options that precede the command. Raise `click.UsageError`, with its text escaped and cut."""
        with _escaped():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. Raise `click.ClickException`, with its text escaped and cut."""
        with _escaped():
            return super().invoke(ctx)


@contextmanager
def _escaped() -> Iterator[None]:
    """Escape and cut the text of an error of click, which quotes arguments as they are."""
    try:
        yield
    except click.ClickException as error:
        from vitalsd.text import one_line

        error.message = one_line(error.message)  # type: ignore[misc]  # click declares it final
        raise


def _print_traceback() -> None:
    import traceback

    from vitalsd.text import one_line

    for line in traceback.format_exc().splitlines():
        click.echo(one_line(line), err=True)


@click.group(
    cls=_Program,
    commands=cast("dict[str, click.Command]", _Commands()),
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, message="%(prog)s %(version)s")
def main() -> None:
    """Measure a process: CPU, memory and every thread, on Linux and macOS.

    \b
    vitalsd sample --pid 4242          one answer, no server
    vitalsd top --pid 4242             watch it live
    vitalsd serve --pid 4242           serve it on http://127.0.0.1:9779
    curl -s 127.0.0.1:9779/metrics     query the server
    vitalsd doctor                     check the measurements on this machine
    """  # noqa: D301 - click reads \b
