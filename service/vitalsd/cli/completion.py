"""Run ``vitalsd completion``: print what a shell needs to complete commands and options of vitalsd."""

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

__all__ = ["completion", "processes"]


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script that lets your shell complete vitalsd.

    \b
    bash   eval "$(vitalsd completion bash)"        in ~/.bashrc
    zsh    eval "$(vitalsd completion zsh)"         in ~/.zshrc, after compinit
    fish   vitalsd completion fish | source         in ~/.config/fish/config.fish
    """  # noqa: D301 - click reads \b
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(context.find_root().command, {}, "vitalsd", "_VITALSD_COMPLETE").source())


def processes(context: click.Context, parameter: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """Complete processes of this user for ``--pid`` and ``--name``, the newest first."""
    import os

    from click.shell_completion import CompletionItem

    from vitalsd.sources import list_processes
    from vitalsd.sources.base import SourceError

    try:
        mine = [entry for entry in list_processes() if entry.is_of(os.geteuid()) and entry.pid != os.getpid()]
    except SourceError:
        return []
    mine.sort(key=lambda entry: entry.started_unix_ns, reverse=True)
    if parameter.name == "pid":
        pids = {str(entry.pid): entry.name for entry in mine}
        return [
            CompletionItem(pid, help=name if name.isprintable() else None)
            for pid, name in pids.items()
            if pid.startswith(incomplete)
        ]
    names = dict.fromkeys(name for entry in mine for name in sorted(entry.names))
    # A name that a shell would split or execute is not offered: the user has to quote it.
    return [CompletionItem(name) for name in names if name.startswith(incomplete) and _is_a_word(name)]


def _is_a_word(name: str) -> bool:
    return name.isprintable() and name.replace("-", "").replace("_", "").replace(".", "").isalnum()
