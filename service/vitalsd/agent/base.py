"""
The background agent: files for launchd or systemd, and the talk with those.

Both hold the sockets themselves and start the sidecar when somebody connects.
"""

import os
import plistlib
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import vitalsd
from vitalsd.discovery.atomic_file import draft
from vitalsd.discovery.directories import agent_socket
from vitalsd.sidecar.frozen import (
    NotRunnableError,
    is_frozen,
    is_one_file,
    own_command,
    restore_libraries,
    with_own_path,
)

__all__ = [
    "LABEL",
    "OVERRIDES",
    "Agent",
    "AgentError",
    "Launchd",
    "Plan",
    "Status",
    "Supervisor",
    "Systemd",
    "supervisor",
]

LABEL = "org.vitalsd.agent"
UNITS = ("vitalsd.socket", "vitalsd.service")
OVERRIDES = ("VITALSD_RUNTIME_DIR", "VITALSD_STATE_DIR")
"""Variables that the agent must share with its clients."""

Run = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]
Supervisor = Literal["launchd", "systemd"]


class AgentError(Exception):
    """The agent could not be installed, removed or asked; ``str(error)`` says why in a sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be installed, for whom and where."""

    home: Path
    runtime: Path
    state: Path
    name: str | None = None
    """Follow the newest process of this name; then it runs from the login on, to have recorded what was."""
    port: int = 9779
    options: Sequence[str] = ()
    """More of `vitalsd serve`."""
    program: Sequence[str] = ()
    """How vitalsd is run; empty: see `own_command`."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Of the agent, besides what a login gives it."""

    def start(self) -> tuple[list[str], dict[str, str]]:
        """
        Return the command with its arguments, and the environment besides what a login gives.

        The command is absolute, because neither supervisor looks at PATH. A copy of vitalsd that was found by
        PYTHONPATH is not found by what the supervisor runs, so the environment says where it is.

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
    """What the supervisor says of the agent."""

    installed: bool
    loaded: bool
    pid: int | None
    """``None``: it waits for somebody to connect."""


class Agent(Protocol):
    """The agent under one supervisor."""

    def files(self) -> dict[Path, bytes]:
        """What `install` writes. Raises `AgentError`."""
        ...

    def install(self) -> None:
        """Write the files and have them loaded; again, it brings a change into effect. Raises `AgentError`."""
        ...

    def uninstall(self) -> bool:
        """End the agent and remove its files; False if it was not installed. Raises `AgentError`."""
        ...

    def status(self) -> Status:
        """Raises `AgentError`."""
        ...


def supervisor(kind: Supervisor, plan: Plan) -> Agent:
    """The agent of `plan` under `kind`."""
    return Launchd(plan) if kind == "launchd" else Systemd(plan)


REMEDY = "run `/path/to/python -m vitalsd agent install` with a Python in which vitalsd is installed"


def _not_runnable() -> str:
    """Return why `own_command` has none; its own words are for a program that calls `spawn`."""
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
        AgentError: it cannot be run; the supervisor would say so in its log alone.
    """
    path = os.path.abspath(program) if os.path.dirname(program) else shutil.which(program)
    if path is None or not (os.path.isfile(path) and os.access(path, os.X_OK)):
        raise AgentError(f"{path or program} is not a program that can be run, so the agent would not start: {REMEDY}")
    return os.path.abspath(path)


def _finds_vitalsd(python: str) -> bool:
    """
    Return whether `python` finds this vitalsd by itself, as in an editable installation or that of a user.

    The agent outlives the shell that installs it, so as little as possible of that one's path goes into its files.
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
def _in_words() -> Iterator[None]:
    """What the system refuses is an `AgentError`."""
    try:
        yield
    except OSError as error:
        raise AgentError(f"{error.filename}: {error.strerror}") from None


def _run(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    environ = dict(os.environ)
    restore_libraries(environ)
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60, env=environ)
    except FileNotFoundError:
        raise AgentError(f"there is no {command[0]} on this system") from None
    except subprocess.TimeoutExpired:
        raise AgentError(f"{' '.join(command)} did not answer within a minute") from None


def _template(folder: str, name: str) -> bytes:
    here = Path(vitalsd.__file__).parent
    for root in (here, here.parent.parent):  # installed, or a checkout
        with suppress(FileNotFoundError):
            return (root / folder / name).read_bytes()
    raise AgentError(f"this installation lacks {folder}/{name}")


def _write(path: Path, content: bytes) -> bool:
    """Write `path` atomically, mode 0644; False if it has that content already."""
    try:
        with suppress(FileNotFoundError):
            if path.read_bytes() == content:
                return False
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        with draft(temporary, content, mode=0o644):  # launchd wants no group or world write
            os.rename(temporary, path)
    except OSError as error:
        raise AgentError(f"cannot write {path}: {error.strerror}") from None
    return True


class Launchd:
    """
    A per-user launch agent (launchd.plist(5), launchctl(1)).

    Some facts on which this rests: ``bootout`` returns before the job has ended, with 36 (EINPROGRESS) if the job takes
    its time, and until it has ended ``bootstrap`` fails with 5; the same 5 means a bad property list. The text of
    ``print`` is no interface, so only its status decides and its pid is a courtesy. ``gui/`` exists only for a user who
    has logged in at the screen. Of a set of changed sockets nothing is seen before a new bootstrap. A property list
    without ``LimitLoadToSessionType`` is for ``gui/`` alone, and one with ``Background`` for ``user/`` alone; the other
    domain refuses it with 134.

    Args:
        plan: what to install.
        run: runs launchctl.
        sleep: between two tries.
        uid: whose agent it is.
    """

    TRIES = 20
    PAUSE_S = 0.5
    NOT_LOADED = (3, 113)
    AGAIN = (5, 36, 37)
    SENTENCES: Mapping[int, str] = {
        3: "the agent is not loaded",
        5: "launchd cannot take it: the property list is invalid, or the agent before it has still not ended",
        36: "launchd is still ending the agent",
        37: "launchd is still busy with the agent",
        112: "this user has no session that launchd could run it in; log in at the screen, and not by SSH or sudo",
        113: "the agent is not loaded",
        119: "the agent is disabled",
        125: "this user has no session that launchd could run it in; log in at the screen, and not by SSH or sudo",
        134: "launchd does not run it in this kind of session; run `vitalsd agent uninstall`, then install it again",
    }

    def __init__(
        self,
        plan: Plan,
        *,
        run: Run = _run,
        sleep: Callable[[float], None] = time.sleep,
        uid: int | None = None,
    ) -> None:
        self._plan = plan
        self._run = run
        self._sleep = sleep
        self._uid = os.getuid() if uid is None else uid
        self._path = plan.home / "Library/LaunchAgents" / f"{LABEL}.plist"
        self._log = plan.home / "Library/Logs/vitalsd/agent.log"

    @_in_words()
    def files(self) -> dict[Path, bytes]:
        return self._files(self._gui)

    def _files(self, domain: str) -> dict[Path, bytes]:
        plan = self._plan
        job = plistlib.loads(_template("launchd", f"{LABEL}.plist"))
        job["ProgramArguments"], environment = plan.start()
        for each in job["Sockets"]["http"]:
            each["SockServiceName"] = str(plan.port)
        job["Sockets"]["unix"]["SockPathName"] = str(agent_socket(plan.runtime))
        job["StandardOutPath"] = job["StandardErrorPath"] = str(self._log)
        if environment:
            job["EnvironmentVariables"] = environment
        if plan.name is not None:
            job["KeepAlive"] = {"SuccessfulExit": False}  # implies RunAtLoad
        if domain == self._user:
            # And not Aqua as well: with both, launchd would start two agents on one port.
            job["LimitLoadToSessionType"] = "Background"
        return {self._path: plistlib.dumps(job)}

    @_in_words()
    def install(self) -> None:
        self._log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        domain = self._domain()
        service = f"{domain}/{LABEL}"
        [(path, content)] = self._files(domain).items()
        changed = _write(path, content)
        if (loaded := self._loaded_service()) is not None:
            if loaded == service and not changed:
                self._tell("kickstart", "-k", service)
                return
            self._bootout(loaded)
        self._tell("enable", service)
        for attempt in range(self.TRIES):
            status = self._launchctl("bootstrap", domain, str(path)).returncode
            if status == 0:
                return
            if status not in self.AGAIN or attempt == self.TRIES - 1:
                raise self._error("bootstrap", status)
            self._sleep(self.PAUSE_S)

    @_in_words()
    def uninstall(self) -> bool:
        service = self._loaded_service()
        if service is not None:
            self._bootout(service)
        installed = self._path.exists()
        self._path.unlink(missing_ok=True)
        agent_socket(self._plan.runtime).unlink(missing_ok=True)
        return installed or service is not None

    @_in_words()
    def status(self) -> Status:
        service = self._loaded_service()
        if service is None:
            return Status(self._path.exists(), False, None)
        pid = re.search(r"^\s*pid = ([0-9]+)$", self._launchctl("print", service).stdout, re.MULTILINE)
        return Status(self._path.exists(), True, int(pid[1]) if pid else None)

    @property
    def _gui(self) -> str:
        return f"gui/{self._uid}"

    @property
    def _user(self) -> str:
        """The domain of a user without a session at the screen."""
        return f"user/{self._uid}"

    def _domain(self) -> str:
        return self._gui if self._launchctl("print", self._gui).returncode == 0 else self._user

    def _loaded_service(self) -> str | None:
        """Return the agent with its domain; it may have been installed over SSH, and be asked for at the screen."""
        services = (f"{domain}/{LABEL}" for domain in (self._gui, self._user))
        return next(filter(self._loaded, services), None)

    def _loaded(self, service: str) -> bool:
        return self._launchctl("print", service).returncode == 0

    def _bootout(self, service: str) -> None:
        status = self._launchctl("bootout", service).returncode
        if status not in (0, *self.NOT_LOADED, *self.AGAIN):
            raise self._error("bootout", status)
        for _ in range(2 * self.TRIES):
            if not self._loaded(service):
                return
            self._sleep(self.PAUSE_S)
        raise AgentError(f"launchd has not ended {LABEL} yet; try again in a minute")

    def _tell(self, *arguments: str) -> None:
        status = self._launchctl(*arguments).returncode
        if status != 0:
            raise self._error(arguments[0], status)

    def _error(self, verb: str, status: int) -> AgentError:
        sentence = self.SENTENCES.get(status)
        if sentence is None:
            sentence = self._launchctl("error", str(status)).stdout.strip() or "launchd does not say why"
        return AgentError(f"{sentence} (launchctl {verb}: {status})")

    def _launchctl(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return self._run(["launchctl", *arguments])


class Systemd:
    """
    A socket and a service of the user's own systemd (systemd.socket(5), systemd.service(5)).

    Args:
        plan: what to install.
        run: runs systemctl.
        units: where the unit files go; default: that of the user.
    """

    def __init__(self, plan: Plan, *, run: Run = _run, units: Path | None = None) -> None:
        self._plan = plan
        self._run = run
        self._units = plan.home / ".config/systemd/user" if units is None else units

    @_in_words()
    def files(self) -> dict[Path, bytes]:
        plan = self._plan
        command, environment = plan.start()
        values = {
            b"@PROGRAM@": " ".join(_quoted(each).replace("$", "$$") for each in command),
            b"@PORT@": str(plan.port),
            b"@SOCKET@": _escaped(str(agent_socket(plan.runtime))),
            b"@RUNTIME@": _quoted(str(plan.runtime)),
            b"@STATE@": _quoted(str(plan.state)),
        }
        found = {}
        for unit in UNITS:
            content = _template("systemd", unit)
            content = content.partition(b"\n")[2].lstrip()
            for mark, value in values.items():
                content = content.replace(mark, os.fsencode(value))
            if unit.endswith(".service"):
                if is_one_file():
                    # Its launcher is the main process and unpacks it, not to /tmp; the child of that says READY=1.
                    environment["TMPDIR"] = str(plan.state)
                    content = content.replace(b"Type=notify\n", b"Type=notify\nNotifyAccess=all\n")
                lines = "".join(f"Environment={_quoted(f'{k}={v}')}\n" for k, v in environment.items())
                content = content.replace(b"[Service]\n", b"[Service]\n" + os.fsencode(lines))
            found[self._units / unit] = content
        return found

    @_in_words()
    def install(self) -> None:
        self._systemctl("show", "--property=Version")  # before anything is written: there may be no systemd to read it
        changed = [_write(path, content) for path, content in self.files().items()]
        self._systemctl("daemon-reload")
        # What follows a process by name has to run before somebody asks.
        units = UNITS if self._plan.name is not None else UNITS[:1]
        if any(changed):
            self._systemctl("stop", *UNITS)
        self._systemctl("enable", "--now", *units)
        if not any(changed):
            self._systemctl("try-restart", UNITS[1])

    @_in_words()
    def uninstall(self) -> bool:
        paths = [self._units / unit for unit in UNITS]
        installed = [path for path in paths if path.exists()]
        if installed:
            try:
                self._systemctl("disable", "--now", *(path.name for path in installed))
            finally:
                for path in installed:
                    path.unlink(missing_ok=True)
            self._systemctl("daemon-reload")
        return bool(installed)

    @_in_words()
    def status(self) -> Status:
        shown = self._systemctl("show", "--property=ActiveState,MainPID", *UNITS)
        blocks = [
            dict(line.split("=", 1) for line in block.splitlines() if "=" in line) for block in shown.split("\n\n")
        ]
        socket_state, service = (*blocks, {}, {})[:2]
        pid = service.get("MainPID", "0")
        return Status(
            installed=all((self._units / unit).exists() for unit in UNITS),
            loaded=socket_state.get("ActiveState") == "active",
            pid=int(pid) if pid.isdecimal() and pid != "0" else None,
        )

    def _systemctl(self, *arguments: str) -> str:
        done = self._run(["systemctl", "--user", "--no-pager", *arguments])
        if done.returncode != 0:
            said = done.stderr.strip().splitlines()
            if "Failed to connect to bus" in done.stderr:
                raise AgentError("systemd does not run for this user here; log in, or enable lingering with loginctl")
            raise AgentError(f"systemctl {arguments[0]}: {said[0] if said else f'status {done.returncode}'}")
        return done.stdout


def _escaped(text: str) -> str:
    """Raises `AgentError`: no unit file can say it."""
    if any(ord(character) < 32 for character in text):
        raise AgentError(f"a unit file cannot hold {text!r}")
    return text.replace("%", "%%")


def _quoted(text: str) -> str:
    """Return one word of a list in a unit file, systemd.syntax(7); a dollar is special in a command line alone."""
    escaped = _escaped(text).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
