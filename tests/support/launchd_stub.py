"""
Emulate ``launchctl`` and launchd on Linux, as far as one agent needs them.

    python launchd_stub.py STATE VERB ...

STATE is a directory. ``bootstrap`` starts a supervisor that listens on the sockets of the property list, and runs the
program with them when a client connects; see ``SIM_LAUNCHD`` in ``launchd_stub.c``.
"""

import os
import plistlib
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

UNKNOWN_SERVICE, ALREADY_LOADED, ENDING, NO_SUCH_PROCESS = 113, 5, 36, 3


def listener(description: dict[str, Any]) -> socket.socket:
    """Return a listener for a dictionary under Sockets."""
    if "SockPathName" in description:
        made = socket.socket(socket.AF_UNIX)
        Path(description["SockPathName"]).unlink(missing_ok=True)
        made.bind(description["SockPathName"])
        os.chmod(description["SockPathName"], description["SockPathMode"])
    else:
        made = socket.socket(socket.AF_INET6 if description["SockFamily"] == "IPv6" else socket.AF_INET)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((description["SockNodeName"], int(description["SockServiceName"])))
    made.listen()
    return made


def start(job: dict[str, Any], sockets: dict[str, list[socket.socket]]) -> "subprocess.Popen[bytes]":
    """Start the program of a job with its sockets, and the variable by which the stub library knows them."""
    code = (
        "import os, sys\n"
        "os.environ['SIM_LAUNCHD'] = f'{os.getpid()} {sys.argv[1]}'\n"
        "os.execv(sys.argv[2], sys.argv[2:])\n"
    )
    held = " ".join(f"{key}={','.join(str(made.fileno()) for made in several)}" for key, several in sockets.items())
    with open(job["StandardErrorPath"], "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", code, held, *job["ProgramArguments"]],
            env=os.environ | job.get("EnvironmentVariables", {}),
            pass_fds=[made.fileno() for several in sockets.values() for made in several],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def supervise(state: Path, plist: Path) -> None:
    """Serve one job until SIGTERM; then end it, as ``bootout`` does, after half a second."""
    job = plistlib.loads(plist.read_bytes())
    sockets = {
        key: [listener(each) for each in (found if isinstance(found, list) else [found])]
        for key, found in job["Sockets"].items()
    }
    ended = False

    def end(*_: object) -> None:
        nonlocal ended
        ended = True

    signal.signal(signal.SIGTERM, end)
    process: subprocess.Popen[bytes] | None = None
    (state / "supervisor").write_text(str(os.getpid()), encoding="ascii")
    while not ended:
        if process is not None and process.poll() is None:
            time.sleep(0.05)
        elif select.select([made for several in sockets.values() for made in several], [], [], 0.05)[0]:
            process = start(job, sockets)
        if (state / "kickstart").exists():
            (state / "kickstart").unlink()
            if process is not None:
                process.terminate()
                process.wait()
            process = start(job, sockets)
    time.sleep(0.5)
    if process is not None:
        process.terminate()
        process.wait()
    (state / "supervisor").unlink()


def main(state: Path, verb: str, *arguments: str) -> int:
    """Run a verb of launchctl and return its exit status."""
    running = state / "supervisor"
    loaded = running.exists()
    if verb == "print":
        service = arguments[0].count("/") == 2
        return 0 if not service or (loaded and arguments[0].startswith("gui/")) else UNKNOWN_SERVICE
    if verb == "bootstrap":
        if loaded:
            return ALREADY_LOADED
        subprocess.Popen(
            [sys.executable, __file__, str(state), "supervise", arguments[1]],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not running.exists():
            time.sleep(0.01)
    elif verb == "supervise":
        supervise(state, Path(arguments[0]))
    elif verb == "bootout":
        if not loaded:
            return NO_SUCH_PROCESS
        os.kill(int(running.read_text("ascii")), signal.SIGTERM)
        return ENDING
    elif verb == "kickstart":
        if not loaded:
            return UNKNOWN_SERVICE
        (state / "kickstart").touch()
        while (state / "kickstart").exists():
            time.sleep(0.01)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
