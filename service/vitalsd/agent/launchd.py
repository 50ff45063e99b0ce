"""Install the agent under launchd, by a property list and launchctl(1)."""

import os
import plistlib
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from vitalsd.agent.base import AgentError, Plan, Run, Status, as_agent_errors, read_template, run_command, write_file
from vitalsd.discovery.directories import agent_socket

__all__ = ["LABEL", "Launchd"]

LABEL = "org.vitalsd.agent"
"""Label of the job, and name of its property list."""


class Launchd:
    """
    Install, remove and query a per-user launch agent (launchd.plist(5), launchctl(1)).

    This depends on the following facts. ``bootout`` returns before the job has ended, with 36 (EINPROGRESS) if the job
    takes long. Until it has ended, ``bootstrap`` fails with 5; the same 5 means an invalid property list. The text of
    ``print`` is no stable interface, so only its exit status decides, and its pid is only shown. ``gui/`` exists only
    once the user has logged in at the screen. A change of the sockets takes effect at the next bootstrap. A list
    without ``LimitLoadToSessionType`` is for ``gui/`` alone, and one with ``Background`` for ``user/`` alone; the other
    domain refuses it with 134.

    Args:
        plan: what to install.
        run: runs launchctl.
        sleep: waits between two tries, s.
        uid: the user; default: the user of this process.
    """

    TRIES = 20
    """Attempts of ``bootstrap``; after ``bootout``, twice as many checks, 20 s in all, that the agent has ended."""
    PAUSE_S = 0.5
    """Pause between two attempts, s."""
    NOT_LOADED = (3, 113)
    """Exit statuses of launchctl for an agent that is not loaded."""
    AGAIN = (5, 36, 37)
    """Exit statuses of launchctl that may mean that the job has not ended yet."""
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
    """Reason, for the user, by exit status of launchctl."""

    def __init__(
        self,
        plan: Plan,
        *,
        run: Run = run_command,
        sleep: Callable[[float], None] = time.sleep,
        uid: int | None = None,
    ) -> None:
        self._plan = plan
        self._run = run
        self._sleep = sleep
        self._uid = os.getuid() if uid is None else uid
        self._path = plan.home / "Library/LaunchAgents" / f"{LABEL}.plist"
        self._log = plan.home / "Library/Logs/vitalsd/agent.log"

    @as_agent_errors()
    def files(self) -> dict[Path, bytes]:
        """Return the property list for a session at the screen. Raise `AgentError`."""
        return self._files(self._gui)

    def _files(self, domain: str) -> dict[Path, bytes]:
        plan = self._plan
        job = plistlib.loads(read_template("launchd", f"{LABEL}.plist"))
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
            # Not Aqua in addition: with both, launchd would start two agents on one port.
            job["LimitLoadToSessionType"] = "Background"
        return {self._path: plistlib.dumps(job)}

    @as_agent_errors()
    def install(self) -> None:
        """Write the property list and load it; restart a loaded agent. Raise `AgentError`."""
        self._log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        domain = self._domain()
        service = f"{domain}/{LABEL}"
        [(path, content)] = self._files(domain).items()
        changed = write_file(path, content)
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

    @as_agent_errors()
    def uninstall(self) -> bool:
        """Unload the agent, remove its files; False if it was not installed. Raise `AgentError`."""
        service = self._loaded_service()
        if service is not None:
            self._bootout(service)
        installed = self._path.exists()
        self._path.unlink(missing_ok=True)
        agent_socket(self._plan.runtime).unlink(missing_ok=True)
        return installed or service is not None

    @as_agent_errors()
    def status(self) -> Status:
        """Return what launchd reports about the agent. Raise `AgentError`."""
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
        """Domain of a user without a session at the screen."""
        return f"user/{self._uid}"

    def _domain(self) -> str:
        return self._gui if self._launchctl("print", self._gui).returncode == 0 else self._user

    def _loaded_service(self) -> str | None:
        """Return the agent with its domain: it may have been installed over SSH, and be queried at the screen."""
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
