"""Run ``vitalsd agent``: have launchd or systemd start a sidecar."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vitalsd.cli.options import CommandFailed, setting_option, was_given
from vitalsd.sidecar.config import DEFAULT_PORT, SETTINGS

if TYPE_CHECKING:
    from collections.abc import Callable

    from vitalsd.agent.base import Agent

__all__ = ["agent"]


@click.group()
def agent() -> None:
    """Have launchd or systemd start a sidecar when a client connects to port 9779.

    \b
    vitalsd agent install --name myapp    follow myapp, from login on
    vitalsd agent install --name myapp -- --otlp --log-format json
    vitalsd agent status                  exit status 1 if it is not loaded
    """  # noqa: D301 - click reads \b


def _agent_options(command: "Callable[..., None]") -> "Callable[..., None]":
    default = "launchd" if sys.platform == "darwin" else "systemd"
    kinds = click.Choice(["launchd", "systemd"])
    command = click.option("--supervisor", "kind", type=kinds, default=default, show_default=True)(command)
    command = setting_option("port", default=DEFAULT_PORT, default_text="", help="", low=1, metavar="")(command)
    return setting_option("name", help="Follow your process of this name.", metavar="TARGET")(command)


def _serve_options(context: click.Context, parameter: click.Parameter, options: tuple[str, ...]) -> tuple[str, ...]:
    """
    Return what follows ``--``: options that `vitalsd serve` accepts.

    They are checked here, because the user sees an error here, and may not see one in the log of the agent.
    """
    from vitalsd.cli.serve import check, serve

    try:
        parsed = serve.make_context("serve", list(options))
        check(parsed)
    except click.exceptions.Exit:
        raise click.BadParameter("options of `vitalsd serve` alone") from None
    except click.UsageError as error:
        raise click.BadParameter(error.format_message()) from None
    for name, setting in SETTINGS.items():
        if setting.set_by_agent and was_given(parsed, name):
            raise click.BadParameter(f"{setting.flag} is for the supervisor, or goes before the --")
    return options


_serve_argument = click.argument(
    "options", nargs=-1, type=click.UNPROCESSED, metavar="[-- SERVE_OPTIONS...]", callback=_serve_options
)


def _agent(kind: str, name: str | None, port: int, options: tuple[str, ...] = ()) -> "Agent":
    import os

    from vitalsd.agent import supervisor
    from vitalsd.agent.base import OVERRIDES, Plan
    from vitalsd.discovery.directories import EndpointError, runtime_directory, state_directory

    try:
        plan = Plan(
            home=Path.home(),
            runtime=runtime_directory(),
            state=state_directory(),
            name=name,
            port=port,
            options=options,
            environment={each: os.path.abspath(os.environ[each]) for each in OVERRIDES if os.environ.get(each)},
        )
    except EndpointError as error:
        raise CommandFailed(str(error)) from None
    return supervisor(kind, plan)  # type: ignore[arg-type]


@agent.command("install")
@_agent_options
@_serve_argument
def agent_install(kind: str, name: str | None, port: int, options: tuple[str, ...]) -> None:
    """Install the agent, or apply a change. The options after -- go to `vitalsd serve`."""
    from vitalsd.agent.base import AgentError

    try:
        installed = _agent(kind, name, port, options)
        installed.install()
    except AgentError as error:
        raise CommandFailed(str(error)) from None
    for path in installed.files():
        click.echo(f"installed {path}")
    click.echo(f"try: curl -s http://127.0.0.1:{port}/info")


@agent.command("uninstall")
@_agent_options
def agent_uninstall(kind: str, name: str | None, port: int) -> None:
    """End the agent and remove its files."""
    from vitalsd.agent.base import AgentError

    try:
        removed = _agent(kind, name, port).uninstall()
    except AgentError as error:
        raise CommandFailed(str(error)) from None
    click.echo("removed" if removed else "it was not installed")


@agent.command("status")
@_agent_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def agent_status(kind: str, name: str | None, port: int, as_json: bool) -> None:
    """Show whether the agent is installed, loaded and running. Exit status 1 if it is not loaded."""
    import json
    from dataclasses import asdict

    from vitalsd.agent.base import AgentError

    try:
        found = _agent(kind, name, port).status()
    except AgentError as error:
        raise CommandFailed(str(error)) from None
    if as_json:
        click.echo(json.dumps(asdict(found)))
    elif found.loaded:
        click.echo(f"running as process {found.pid}" if found.pid else "waiting for the first connection")
    else:
        click.echo("installed, but not loaded" if found.installed else "not installed")
    if not found.loaded:
        raise SystemExit(1)


@agent.command("print")
@_agent_options
@_serve_argument
def agent_print(kind: str, name: str | None, port: int, options: tuple[str, ...]) -> None:
    """Print the files that install would write."""
    from vitalsd.agent.base import AgentError

    try:
        files = _agent(kind, name, port, options).files()
    except AgentError as error:
        raise CommandFailed(str(error)) from None
    for path, content in files.items():
        if len(files) > 1:
            click.echo(f"# {path}")
        click.echo(content)
