"""Completion in a real shell: what stands on the command line after Tab."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.target import Target
from support.terminals import PseudoTerminal
from support.tools import program

pytestmark = pytest.mark.live

Start = Callable[..., Target]


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A PATH that begins with a `vitalsd` of this tree."""
    ours = tmp_path / "bin" / "vitalsd"
    ours.parent.mkdir()
    ours.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m vitalsd "$@"\n', encoding="utf-8")
    ours.chmod(0o755)
    return f"{ours.parent}{os.pathsep}{os.environ['PATH']}"


def test_bash_completes_commands_options_values_and_processes(path: str, start: Start) -> None:
    """Tab in an interactive bash finishes a command, an option, one of its values and the name of a process."""
    bash = program("bash", package="bash")
    name = f"vcomp{os.getpid()}"
    target = start()
    target.ask(f"name {name.encode().hex()}")
    with PseudoTerminal([bash, "--norc", "--noprofile", "-i"], env={"PATH": path, "PS1": "> "}) as shell:
        shell.press('eval "$(vitalsd completion bash)"; clear; echo rea""dy\n')
        shell.until(lambda text: "ready" in text)
        for typed, completed in (
            ("vitalsd samp\t", "vitalsd sample "),
            ("vitalsd serve --log-f\t", "vitalsd serve --log-format "),
            ("vitalsd serve --log-format js\t", "vitalsd serve --log-format json "),
            ("vitalsd top --name vcomp\t", f"vitalsd top --name {name} "),
            ("vitalsd completion b\t", "vitalsd completion bash "),
        ):
            shell.press(typed)
            # The blank that bash puts after a word it has finished cannot be seen; the next letter shows it.
            shell.until(lambda text, wanted=completed: wanted.rstrip() in text)  # type: ignore[misc]
            shell.press("!")
            shell.until(lambda text, wanted=completed: f"{wanted}!" in text)  # type: ignore[misc]
            shell.press("\x15")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script_parses_in_its_shell(path: str, shell: str) -> None:
    """The script is printed for each shell, and parsed by it where it is installed."""
    out = subprocess.run(["vitalsd", "completion", shell], env={"PATH": path}, capture_output=True, text=True)
    assert (out.returncode, out.stderr) == (0, "")
    assert "_VITALSD_COMPLETE" in out.stdout
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=out.stdout, text=True, check=True)


def test_completion_of_an_unknown_shell_is_wrong_usage(path: str) -> None:
    """The shells that there are scripts for are named."""
    out = subprocess.run(["vitalsd", "completion", "csh"], env={"PATH": path}, capture_output=True, text=True)
    assert out.returncode == 2
    assert "'bash', 'zsh', 'fish'" in out.stderr
