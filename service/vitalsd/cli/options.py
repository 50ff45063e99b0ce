"""What the commands share: options, failures, tables, and where things are."""

import sys
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from vitalsd.cli.completion import processes

if TYPE_CHECKING:
    from typing import IO, Any

    from vitalsd.contract.application import Application
    from vitalsd.sources.platform import Platform

__all__ = [
    "Failed",
    "Number",
    "Refused",
    "Taken",
    "app_option",
    "app_version_option",
    "application_of",
    "choose_process",
    "complain",
    "exclude",
    "find_target",
    "host_option",
    "name_option",
    "needs",
    "not_empty",
    "pid_option",
    "platform_of",
    "port_option",
    "print_table",
    "proc_root_option",
    "raise_descriptor_limit",
    "runs_path",
]


class Number(click.FloatRange):
    """A number of a range, and nothing else that Python takes for one."""

    def convert(self, value: "Any", param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not isfinite(number):
            self.fail(f"{value} is not a number to count with.", param, ctx)
        return number


def not_empty(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """Callback of an option that names a process: an empty one is a variable that was not set."""
    if value == "":
        raise click.BadParameter("it is empty")
    return value


def needs(context: click.Context, parameter: str, condition: str, *, met: bool) -> None:
    """Raises `click.UsageError` if an option was given that does nothing unless `condition` is met."""
    if not met and _was_given(context, parameter):
        raise click.UsageError(f"{_option(context, parameter)} does nothing {condition}")


def exclude(context: click.Context, *parameters: str) -> None:
    """Raises `click.UsageError` if more than one of these options was given."""
    given = [_option(context, parameter) for parameter in parameters if _was_given(context, parameter)]
    if len(given) > 1:
        raise click.UsageError(f"{given[0]} and {given[1]} exclude each other")


def _was_given(context: click.Context, parameter: str) -> bool:
    return context.get_parameter_source(parameter) is click.core.ParameterSource.COMMANDLINE


def _option(context: click.Context, parameter: str) -> str:
    return next(each.opts[0] for each in context.command.params if each.name == parameter)


pid_option = click.option(
    "--pid", type=click.IntRange(1, 2**31 - 1), metavar="N", help="Target process.", shell_complete=processes
)
name_option = click.option(
    "--name",
    metavar="NAME",
    callback=not_empty,
    help="Target: your process of that name; of several the one from which the others descend, or the newest.",
    shell_complete=processes,
)
app_option = click.option(
    "--app", metavar="ID", help="Application id, under which reports find the runs of this program."
)
app_version_option = click.option("--app-version", metavar="VERSION", help="Version of the application.")


def application_of(app: str | None, app_version: str | None) -> "Application":
    """Return the application of ``--app`` and ``--app-version``. Raises `click.UsageError`."""
    from vitalsd.contract.application import Application

    try:
        return Application.checked(app, app_version)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


proc_root_option = click.option(
    "--proc-root",
    default="/proc",
    show_default=True,
    metavar="DIR",
    help="Linux: where procfs is mounted, e.g. /host/proc in a container.",
)


host_option = click.option(
    "--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Address to listen on."
)
port_option = click.option(
    "--port",
    type=click.IntRange(0, 65535),
    metavar="PORT",
    help="Port; 0 takes a free one.  [default: 9779, or a free one]",
)


def complain(text: str) -> None:
    """Print one line on stderr; what others wrote is shown escaped and cut."""
    from vitalsd.text import one_line

    click.echo(f"vitalsd: {one_line(text)}", err=True)


class Failed(click.ClickException):
    """It cannot be done: one line, which the program escapes and cuts, and exit status 1."""

    def show(self, file: "IO[Any] | None" = None) -> None:
        click.echo(f"vitalsd: {self.message}", err=True)


class Refused(Failed):
    """It was asked for what cannot be: one line and exit status 2."""

    exit_code = 2


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """Print aligned columns; what others wrote is shown escaped and cut."""
    from vitalsd.text import one_line

    shown = [head, *(list(map(one_line, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for row in shown:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def runs_path() -> Path:
    from vitalsd.discovery.directories import EndpointError, state_directory

    try:
        return state_directory() / "runs"
    except EndpointError as error:
        raise Failed(str(error)) from None


def platform_of(context: click.Context, proc_root: str = "/proc") -> "Platform":
    """The platform handed to `main` as ``obj``, or the running kernel."""
    from vitalsd.sources.platform import Platform, this_platform

    return context.obj if isinstance(context.obj, Platform) else this_platform(proc_root)


def find_target(pid: int | None, name: str | None, platform: "Platform") -> int | None:
    """
    Return the pid that ``--pid`` or ``--name`` means; which of several of that name it is goes to stderr.

    On macOS the case of letters does not count, as in its file systems: a framework build of Python runs as ``Python``.

    Raises:
        NoSuchProcess: there is none.
    """
    if name is None:
        return pid
    taken = choose_process(name, platform)
    if len(taken.called) > 1:
        several = f"{len(taken.called)} processes are called {name}"
        click.echo(f"vitalsd: {several}; process {taken.pid} is taken: {taken.why}", err=True)
    return taken.pid


class Taken(NamedTuple):
    """A process chosen by its name."""

    pid: int
    called: frozenset[int]
    """All processes of that name."""
    why: str


def choose_process(name: str, platform: "Platform") -> Taken:
    """
    Choose one of this user's processes by its name.

    Of several it is the one from which the others descend; of several such, the newest.

    Raises:
        NoSuchProcess: none has this name.
    """
    import os

    from vitalsd.sources.base import NoSuchProcess

    fold = str.casefold if platform.name == "macos" else str
    every = {entry.pid: entry for entry in platform.list_processes()}
    called = frozenset(
        entry.pid
        for entry in every.values()
        if entry.is_of(os.geteuid()) and entry.pid != os.getpid() and fold(name) in map(fold, entry.names)
    )
    if not called:
        raise NoSuchProcess(
            f"no process of yours is called {name}; a process is called as its main thread (on Linux its first 15"
            " bytes), its program or its #! script; what runs as `python app.py` is called python"
        )

    def descends(pid: int) -> bool:
        above: set[int] = set()
        while pid in every and pid not in above:
            above.add(pid)
            pid = every[pid].parent
            if pid in called:
                return True
        return False

    eldest = [pid for pid in called if not descends(pid)] or list(called)  # pids are given again as they are listed
    pid = max(eldest, key=lambda pid: (every[pid].started_unix_ns, pid))
    why = "the others descend from it" if len(eldest) == 1 else "it descends from none of them and is the newest such"
    return Taken(pid, called, why)


def raise_descriptor_limit() -> None:
    """One descriptor per thread of the target is kept open, so take all that the system grants."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if sys.platform == "linux" and soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
