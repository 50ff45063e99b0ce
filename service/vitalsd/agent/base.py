"""
Describe the background agent that is to be installed, and share what the two supervisors have in common.

Both supervisors hold the sockets themselves and start the sidecar when a client connects.
"""

import os
import secrets
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import vitalsd
from vitalsd.discovery.atomic_file import draft
from vitalsd.sidecar.config import DEFAULT_PORT
from vitalsd.sidecar.frozen import (
    NotRunnableError,
    is_frozen,
    own_command,
    restore_libraries,
    with_own_path,
)

__all__ = [
    "OVERRIDES",
    "Agent",
    "AgentError",
    "Plan",
    "Run",
    "Status",
    "as_agent_errors",
    "read_template",
    "run_command",
    "write_file",
]

OVERRIDES = ("VITALSD_RUNTIME_DIR", "VITALSD_STATE_DIR")
"""Environment variables with which the agent must run if its clients do: both must use the same directories."""

Run = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]


class AgentError(Exception):
    """Report why the agent could not be installed, removed or queried; ``str(error)`` is the reason, a sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Describe what is to be installed, for which user and where."""

    home: Path
    runtime: Path
    state: Path
    name: str | None = None
    """Name of the process to follow, the newest one. With it the agent runs from the login on, and so has a record."""
    port: int = DEFAULT_PORT
    options: Sequence[str] = ()
    """More options of `vitalsd serve`."""
    program: Sequence[str] = ()
    """How vitalsd is run; empty: see `own_command`."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment of the agent, besides that of a login."""

    def start(self) -> tuple[list[str], dict[str, str]]:
        """
        Return the command with its arguments, and the environment besides that of a login.

        The command is an absolute path, because neither supervisor searches PATH. If this vitalsd was found by
        PYTHONPATH, the environment has its directory, because the supervisor's process would not find it.

        Raises:
            AgentError: this program cannot be run as vitalsd.
        """
        environment = dict(self.environment)
        try:
            program = list(self.program) or own_command()
        except NotRunnableError:
            raise AgentError(_not_runnable()) from None
        program[0] = _executable(program[0])
        path: dict[str, str] = {}
        with_path = with_own_path(program, path)
        if not self.program and with_path != program and not _finds_vitalsd(program[0]):
            program, environment = with_path, environment | path
        target = ["--name", self.name] if self.name is not None else []
        return [*program, "serve", *target, *self.options], environment


@dataclass(frozen=True, slots=True)
class Status:
    """Hold what the supervisor reports about the agent."""

    installed: bool
    loaded: bool
    pid: int | None
    """Process id of the agent; ``None``: it waits for a client to connect."""


class Agent(Protocol):
    """Install, remove and query the agent under one supervisor."""

    def files(self) -> dict[Path, bytes]:
        """Return what `install` writes. Raise `AgentError`."""
        ...

    def install(self) -> None:
        """Write the files and load them; a second call brings a change into effect. Raise `AgentError`."""
        ...

    def uninstall(self) -> bool:
        """End the agent and remove its files; False if it was not installed. Raise `AgentError`."""
        ...

    def status(self) -> Status:
        """Return what the supervisor knows of the agent. Raise `AgentError`."""
        ...


REMEDY = "run `/path/to/python -m vitalsd agent install` with a Python in which vitalsd is installed"
"""The next step where this program cannot be the agent."""


def _not_runnable() -> str:
    """Return why this program cannot be the agent; the text of `NotRunnableError` is for callers of `spawn`."""
    if is_frozen():
        return (
            "this application is frozen, and to run its executable would start the application again: call"
            f" vitalsd.freeze_support() first in its main module, or {REMEDY}"
        )
    return f"sys.executable is empty, so there is no Python to run the agent with: {REMEDY}"


def _executable(program: str) -> str:
    """
    Return the absolute path of `program`.

    Raises:
        AgentError: it cannot be run; the supervisor would report that in its log alone.
    """
    path = os.path.abspath(program) if os.path.dirname(program) else shutil.which(program)
    if path is None or not (os.path.isfile(path) and os.access(path, os.X_OK)):
        raise AgentError(f"{path or program} is not a program that can be run, so the agent would not start: {REMEDY}")
    return os.path.abspath(path)


def _finds_vitalsd(python: str) -> bool:
    """
    Return whether `python` finds this vitalsd by itself, as in an editable installation or that of a user.

    The agent outlives the shell that installs it, so its files hold as little as possible of the path of that shell.
    """
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    restore_libraries(environ)
    command = [python, "-P", "-c", "import os, vitalsd; print(os.path.realpath(vitalsd.__file__))"]
    here = os.path.realpath(vitalsd.__file__)
    try:
        found = subprocess.run(command, capture_output=True, timeout=60, env=environ, cwd="/")
    except (OSError, subprocess.TimeoutExpired):
        return False
    return os.fsdecode(found.stdout).rstrip("\n") == here


@contextmanager
def as_agent_errors() -> Iterator[None]:
    """Raise `AgentError` in place of an `OSError`."""
    try:
        yield
    except OSError as error:
        raise AgentError(f"{error.filename}: {error.strerror}") from None


def run_command(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    """
    Run `command` for at most a minute, and return its output, whatever its exit status.

    Raises:
        AgentError: the command does not exist, or takes longer.
    """
    environ = dict(os.environ)
    restore_libraries(environ)
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60, env=environ)
    except FileNotFoundError:
        raise AgentError(f"there is no {command[0]} on this system") from None
    except subprocess.TimeoutExpired:
        raise AgentError(f"{' '.join(command)} did not answer within a minute") from None


def read_template(folder: str, name: str) -> bytes:
    """Return the file `name` that vitalsd brings in `folder`. Raise `AgentError` if the installation lacks it."""
    here = Path(vitalsd.__file__).parent
    for root in (here, here.parent.parent):  # installed, or a checkout
        with suppress(FileNotFoundError):
            return (root / folder / name).read_bytes()
    raise AgentError(f"this installation lacks {folder}/{name}")


def write_file(path: Path, content: bytes) -> bool:
    """Write `path` atomically, mode 0644; False if it has that content already."""
    try:
        with suppress(FileNotFoundError):
            if path.read_bytes() == content:
                return False
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        with draft(temporary, content, mode=0o644):  # launchd refuses a file that others may write
            os.rename(temporary, path)
    except OSError as error:
        raise AgentError(f"cannot write {path}: {error.strerror}") from None
    return True
