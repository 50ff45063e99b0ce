"""Emulate ``launchctl`` and ``systemctl`` by programs that behave like them and record their calls."""

import json
import os
import sys
from pathlib import Path
from typing import Any

__all__ = ["FakeSupervisor"]

LAUNCHCTL = """\
import json, plistlib, sys
from pathlib import Path
state_file = Path(__file__).with_name("state.json")
state = json.loads(state_file.read_text())
verb, *rest = sys.argv[1:]
domain = next((word.split("/")[0] for word in rest if "/" in word), "")
here = state["loaded"] in (True, domain)
state["calls"].append(sys.argv[1:])
status = 0
if state["fail"].get(verb):
    status = state["fail"][verb].pop(0)
elif verb == "print":
    if "org.vitalsd.agent" in rest[0]:
        if state["draining"] > 0:
            state["draining"] -= 1
            print("\\tstate = SIGTERMed")
        elif here:
            print("\\tstate = running\\n\\tpid = 4242" if state["running"] else "\\tstate = not running")
        else:
            status = 113
    elif domain not in state["domains"]:
        status = 112
elif verb == "bootstrap":
    kind = {"gui": "Aqua", "user": "Background"}[domain]
    if state["loaded"] or state["draining"] > 0 or not Path(rest[1]).exists():
        status = 5
    elif plistlib.loads(Path(rest[1]).read_bytes()).get("LimitLoadToSessionType", "Aqua") != kind:
        status = 134
    else:
        state["loaded"] = domain
elif verb == "bootout":
    status = 36 if here and state["drains"] else 0 if here else 3
    state["loaded"], state["draining"] = False, state["drains"]
elif verb == "kickstart":
    if here:
        state["running"] = True
    else:
        status = 113
elif verb == "error":
    print(f"{rest[0]}: whatever launchd calls it")
state_file.write_text(json.dumps(state))
if status:
    print(f"{verb} failed: {status}", file=sys.stderr)
sys.exit(status)
"""

SYSTEMCTL = """\
import json, sys
from pathlib import Path
state_file = Path(__file__).with_name("state.json")
state = json.loads(state_file.read_text())
assert sys.argv[1:3] == ["--user", "--no-pager"]
verb, *rest = sys.argv[3:]
state["calls"].append(sys.argv[3:])
status = 0
if state["bus"] is False:
    print("Failed to connect to bus: No medium found", file=sys.stderr)
    status = 1
elif state["fail"].get(verb):
    status = state["fail"][verb].pop(0)
    print(f"Failed to {verb}: recorded", file=sys.stderr)
elif verb == "enable":
    state["loaded"] = True
    state["running"] = "vitalsd.service" in rest
elif verb in ("disable", "stop"):
    state["loaded"] = state["running"] = False
elif verb == "show":
    active = "active" if state["loaded"] else "inactive"
    print(f"ActiveState={active}\\n\\nMainPID={4242 if state['running'] else 0}\\nActiveState={active}")
state_file.write_text(json.dumps(state))
sys.exit(status)
"""


class FakeSupervisor:
    """
    Install fake ``launchctl`` and ``systemctl`` in a directory for PATH, and keep their arguments.

    As in the real launchctl: ``bootout`` is asynchronous (``drains`` looks long) and fails with 36 while the job ends,
    ``bootstrap`` of what is loaded or still draining fails with 5, and with 134 in a domain that the property list is
    not for; of an unloaded label ``bootout`` says 3, ``print`` and ``kickstart`` 113, and ``gui/`` may be missing.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._state = directory / "state.json"
        for name, program in (("launchctl", LAUNCHCTL), ("systemctl", SYSTEMCTL)):
            path = directory / name
            path.write_text(f"#!{sys.executable} -IS\n{program}")
            path.chmod(0o755)
        self.set(
            calls=[], fail={}, loaded=False, running=False, draining=0, drains=0, domains=["gui", "user"], bus=True
        )

    @property
    def path(self) -> str:
        """Return PATH with these programs first."""
        return f"{self.directory}{os.pathsep}{os.environ['PATH']}"

    def set(self, **values: Any) -> None:
        """Change the state that they find."""
        state = json.loads(self._state.read_text()) if self._state.exists() else {}
        self._state.write_text(json.dumps(state | values))

    def calls(self) -> list[list[str]]:
        """Return the arguments of their calls since the last time."""
        calls: list[list[str]] = json.loads(self._state.read_text())["calls"]
        self.set(calls=[])
        return calls

    @property
    def loaded(self) -> bool:
        """Return whether the agent is loaded."""
        return bool(json.loads(self._state.read_text())["loaded"])
