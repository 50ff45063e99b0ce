"""Install the agent under systemd, by a socket and a service of the user and systemctl(1)."""

import os
from pathlib import Path

from vitalsd.agent.base import AgentError, Plan, Run, Status, as_agent_errors, read_template, run_command, write_file
from vitalsd.discovery.directories import agent_socket
from vitalsd.sidecar.frozen import is_one_file

__all__ = ["UNITS", "Systemd"]

UNITS = ("vitalsd.socket", "vitalsd.service")
"""Names of the socket unit and of the service unit that it starts."""


class Systemd:
    """
    Install, remove and query a socket and a service of the user's systemd (systemd.socket(5), systemd.service(5)).

    Args:
        plan: what to install.
        run: runs systemctl.
        units: directory of the unit files; default: that of the user.
    """

    def __init__(self, plan: Plan, *, run: Run = run_command, units: Path | None = None) -> None:
        self._plan = plan
        self._run = run
        self._units = plan.home / ".config/systemd/user" if units is None else units

    @as_agent_errors()
    def files(self) -> dict[Path, bytes]:
        """Return the two unit files. Raise `AgentError`."""
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
            content = read_template("systemd", unit)
            content = content.partition(b"\n")[2].lstrip()
            for mark, value in values.items():
                content = content.replace(mark, os.fsencode(value))
            if unit.endswith(".service"):
                if is_one_file():
                    # The launcher is the main process and does not unpack to /tmp; its child sends READY=1.
                    environment["TMPDIR"] = str(plan.state)
                    content = content.replace(b"Type=notify\n", b"Type=notify\nNotifyAccess=all\n")
                lines = "".join(f"Environment={_quoted(f'{k}={v}')}\n" for k, v in environment.items())
                content = content.replace(b"[Service]\n", b"[Service]\n" + os.fsencode(lines))
            found[self._units / unit] = content
        return found

    @as_agent_errors()
    def install(self) -> None:
        """Write the unit files and start the units; a second call restarts them. Raise `AgentError`."""
        self._systemctl("show", "--property=Version")  # before anything is written: there may be no systemd to read it
        changed = [write_file(path, content) for path, content in self.files().items()]
        self._systemctl("daemon-reload")
        # An agent that follows a process by name records it, so it runs before a client connects.
        units = UNITS if self._plan.name is not None else UNITS[:1]
        if any(changed):
            self._systemctl("stop", *UNITS)
        self._systemctl("enable", "--now", *units)
        if not any(changed):
            self._systemctl("try-restart", UNITS[1])

    @as_agent_errors()
    def uninstall(self) -> bool:
        """Stop the units, remove their files; False if there were none. Raise `AgentError`."""
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

    @as_agent_errors()
    def status(self) -> Status:
        """Return what systemd reports about the agent. Raise `AgentError`."""
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
    """Escape `text` for a unit file. Raise `AgentError`: no unit file can hold it."""
    if any(ord(character) < 32 for character in text):
        raise AgentError(f"a unit file cannot hold {text!r}")
    return text.replace("%", "%%")


def _quoted(text: str) -> str:
    """Return one word of a list in a unit file, systemd.syntax(7); a dollar is special in a command line alone."""
    escaped = _escaped(text).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
