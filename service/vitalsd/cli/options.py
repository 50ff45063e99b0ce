"""Share among the commands: options, errors, tables, and the location of directories and processes."""

import sys
from collections.abc import Callable
from dataclasses import replace
from math import isfinite, isinf
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from vitalsd.cli.completion import processes
from vitalsd.sidecar.config import SETTINGS, Setting, SidecarConfig

if TYPE_CHECKING:
    from vitalsd.contract.application import Application
    from vitalsd.sources.platform import Platform

__all__ = [
    "CommandFailed",
    "Number",
    "UsageRefused",
    "all_setting_options",
    "app_option",
    "app_version_option",
    "application_of",
    "complain",
    "config_of",
    "exclude",
    "find_target",
    "name_option",
    "needs",
    "pid_option",
    "platform_of",
    "print_table",
    "proc_root_option",
    "raise_descriptor_limit",
    "runs_path",
    "setting_option",
    "was_given",
]


class Number(click.FloatRange):
    """Accept a finite number within a range."""

    def convert(self, value: "Any", param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number. Raise `click.BadParameter`: it is infinite, not a number, or out of range."""
        number = float(super().convert(value, param, ctx))
        if not isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number

    def _describe_range(self) -> str:
        """Return the range as help and errors show it: whole bounds without a fraction, others with three digits."""
        low, high = (None if each is None else _shown(each) for each in (self.min, self.max))
        return click.FloatRange(low, high)._describe_range()


def _shown(bound: float) -> float:
    return float(f"{bound:.3g}") if bound % 1 else int(bound)


def not_empty(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """Refuse an empty name of a process, the value of a shell variable that is not set; a callback of click."""
    if value == "":
        raise click.BadParameter("it is empty")
    return value


def needs(context: click.Context, parameter: str, condition: str, *, met: bool) -> None:
    """Raise `click.UsageError` if an option was given that does nothing unless `condition` is met."""
    if not met and was_given(context, parameter):
        raise click.UsageError(f"{_option(context, parameter)} does nothing {condition}")


def exclude(context: click.Context, *parameters: str) -> None:
    """Raise `click.UsageError` if more than one of these options was given."""
    given = [_option(context, parameter) for parameter in parameters if was_given(context, parameter)]
    if len(given) > 1:
        raise click.UsageError(f"{given[0]} and {given[1]} exclude each other")


def was_given(context: click.Context, parameter: str) -> bool:
    """Return whether the command line has this option."""
    return context.get_parameter_source(parameter) is click.core.ParameterSource.COMMANDLINE


def _option(context: click.Context, parameter: str) -> str:
    return next(each.opts[0] for each in context.command.params if each.name == parameter)


Decorator = Callable[[Callable[..., None]], Callable[..., None]]


def setting_option(name: str, **changes: "Any") -> Decorator:
    """
    Return the option of a setting of the sidecar.

    Args:
        name: the setting.
        changes: fields of `Setting` that differ for this command.
    """
    setting = replace(SETTINGS[name], **changes)
    more: dict[str, Any] = {"help": setting.help, "hidden": setting.hidden}
    if setting.default_text or setting.bare:
        more["help"] += f"  [default: {setting.default_text}]" if setting.default_text else f"  [{setting.bare}]"
    if setting.is_flag:
        more |= {"is_flag": True, "default": setting.default, "show_default": "/" in setting.option}
        if "/" not in setting.option:
            more["flag_value"] = not setting.default
        return click.option(setting.option, name, **more)
    if setting.default is not None:
        more |= {"default": setting.default / setting.scale if setting.time else setting.default, "show_default": True}
    if setting.bare:
        more |= {"is_flag": False, "flag_value": setting.bare}
    more["type"] = _type_of(setting)
    more["metavar"] = setting.metavar or setting.time.upper() or None
    more["shell_complete"] = processes if name in ("pid", "name") else None
    more["callback"] = not_empty if name == "name" else _in_seconds(setting) if setting.time else None
    return click.option(setting.option, name, **more)


def _type_of(setting: Setting) -> click.ParamType[Any] | None:
    """Return the type of a setting's option; ``None``: text."""
    if setting.choices:
        return click.Choice(setting.choices)
    if setting.time:
        low = 0 if setting.or_zero else setting.low / setting.scale
        return Number(low, None if isinf(setting.high) else setting.high / setting.scale)
    if setting.whole:
        return click.IntRange(int(setting.low), None if isinf(setting.high) else int(setting.high))
    return None


def _in_seconds(setting: Setting) -> "Callable[[click.Context, click.Parameter, float], float]":
    def callback(_: click.Context, __: click.Parameter, value: float) -> float:
        if setting.or_zero and 0 < value * setting.scale < setting.low:
            raise click.UsageError(f"{setting.flag} is 0 or at least {setting.low / setting.scale:g} {setting.time}")
        return value * setting.scale

    return callback


def all_setting_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of all settings, in the order of `SidecarConfig`."""
    for name in reversed(SETTINGS):
        command = setting_option(name)(command)
    return command


def config_of(context: click.Context) -> SidecarConfig:
    """Return the configuration that the options of a command make. Raise `click.UsageError`."""
    try:
        return SidecarConfig.checked(**{name: value for name, value in context.params.items() if name in SETTINGS})
    except ValueError as error:
        raise click.UsageError(str(error)) from None


pid_option = setting_option("pid")
name_option = setting_option("name")
app_option = setting_option("app")
app_version_option = setting_option("app_version")
proc_root_option = setting_option("proc_root")


def application_of(app: str | None, app_version: str | None) -> "Application":
    """Return the application of ``--app`` and ``--app-version``. Raise `click.UsageError`."""
    from vitalsd.contract.application import Application

    try:
        return Application.checked(app, app_version)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def complain(text: str) -> None:
    """Print one line on stderr; text from other programs is escaped and cut."""
    from vitalsd.text import one_line

    click.echo(f"vitalsd: {one_line(text)}", err=True)


class CommandFailed(click.ClickException):
    """Report that the command has failed: one line, which the program escapes and cuts, and exit status 1."""

    def show(self, file: "IO[Any] | None" = None) -> None:
        """Print the line on stderr, whatever `file` is."""
        click.echo(f"vitalsd: {self.message}", err=True)


class UsageRefused(CommandFailed):
    """Report that the request is impossible here: one line and exit status 2."""

    exit_code = 2


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """Print aligned columns; text from other programs is escaped and cut."""
    from vitalsd.text import one_line

    shown = [head, *(list(map(one_line, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for row in shown:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def runs_path() -> Path:
    """Return the directory of runs. Raise `CommandFailed`: this user has no state directory."""
    from vitalsd.discovery.directories import EndpointError, state_directory

    try:
        return state_directory() / "runs"
    except EndpointError as error:
        raise CommandFailed(str(error)) from None


def platform_of(context: click.Context, proc_root: str = "/proc") -> "Platform":
    """Return the platform handed to `main` as ``obj``, or the running kernel."""
    from vitalsd.sources.platform import Platform, this_platform

    return context.obj if isinstance(context.obj, Platform) else this_platform(proc_root)


def find_target(pid: int | None, name: str | None, platform: "Platform") -> int | None:
    """
    Return the pid that ``--pid`` or ``--name`` means. If several processes have the name, print which one it is.

    On macOS the case of letters does not count, as in its file systems: a framework build of Python runs as ``Python``.

    Raises:
        NoSuchProcessError: no process of this user has the name.
    """
    if name is None:
        return pid
    from vitalsd.sidecar.target_process import choose_process

    taken = choose_process(name, platform)
    if len(taken.called) > 1:
        several = f"{len(taken.called)} processes are called {name}"
        click.echo(f"vitalsd: {several}; process {taken.pid} is taken: {taken.why}", err=True)
    return taken.pid


def raise_descriptor_limit() -> None:
    """Raise the limit of descriptors to what the system allows: on Linux, one is open for each thread of the target."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if sys.platform == "linux" and soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
