"""
Run a tree of processes, and control each of them.

As a program, ``family.py DIRECTORY`` binds a Unix socket ``DIRECTORY/PID`` and obeys the datagrams that it gets there:
each is a command, and is answered. The processes that it forks do the same. `Family` starts it.
"""

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["Family"]

NOBODY_UID = 65534
SHORT = "i=0; while [ $i -lt 3000 ]; do i=$((i+1)); done"
"""Shell code that uses some ms of CPU time."""


class Family:
    """Run this module as a program; a context manager that kills all of its processes."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="vf", dir="/tmp")
        os.chmod(self._directory.name, 0o777)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(f"{self._directory.name}/test")
        os.chmod(f"{self._directory.name}/test", 0o777)
        self._socket.settimeout(50)
        self.process = subprocess.Popen([sys.executable, __file__, self._directory.name], start_new_session=True)
        self.pid = self.process.pid
        self._answer()

    def ask(self, pid: int, command: str) -> Any:
        """Send a command to one of the processes, and return its answer."""
        self.tell(pid, command)
        return self._answer()

    def tell(self, pid: int, command: str) -> None:
        """Send a command to one of the processes."""
        self._socket.sendto(command.encode(), f"{self._directory.name}/{pid}")

    def finish(self) -> Any:
        """Return the answer to a command that was sent with `tell`."""
        return self._answer()

    def fork(self, pid: int) -> int:
        """Let a process fork; return the pid of its child."""
        child: int = self.ask(pid, "fork")
        assert self._answer() == child
        return child

    def end(self, pid: int, parent: int) -> int:
        """Let a process exit and its parent wait for it; return the CPU time of all children of the parent, ns."""
        self.tell(pid, "exit")
        reaped_ns: int = self.ask(parent, f"wait {pid}")
        return reaped_ns

    def _answer(self) -> Any:
        return json.loads(self._socket.recv(65536))

    def __enter__(self) -> "Family":
        """Return the running family."""
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        """Kill all its processes, also those without a parent: they are in one process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()
        self._socket.close()
        self._directory.cleanup()


# The program


def reaped_ns() -> int:
    """Return the CPU time of the children that this process waited for, ns."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round((usage.ru_utime + usage.ru_stime) * 1e9)


def spin(cpu_ms: float) -> int:
    """Use CPU time; return all that this process has used, ns."""
    end_ns = time.process_time_ns() + cpu_ms * 1e6
    while (used_ns := time.process_time_ns()) < end_ns:
        pass
    return used_ns


def storm(seconds: float) -> int:
    """Run one short child after the other; return their number."""
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end and count < 1000:
        os.waitpid(os.posix_spawn("/bin/sh", ["sh", "-c", SHORT], {}), 0)
        count += 1
    return count


def obey(directory: Path, words: list[str]) -> Any:
    """Obey one command, and return its answer."""
    match words:
        case ["fork"]:
            pid = os.fork()
            if not pid:
                live(directory)
            return pid
        case ["daemon"]:  # forked twice
            reader, writer = os.pipe()
            middle = os.fork()
            if not middle:
                pid = os.fork()
                if not pid:
                    live(directory)
                os.write(writer, str(pid).encode())
                os._exit(0)
            os.waitpid(middle, 0)
            os.close(writer)
            return int(os.read(reader, 16))
        case ["sleepers", count]:
            return [os.posix_spawn("/bin/sleep", ["sleep", "60"], {}) for _ in range(int(count))]
        case ["run", shell]:  # a copy of it under any name
            return [os.posix_spawn(shell, [shell, "-c", "while :; do sleep 1; done"], os.environ)]
        case ["burn", cpu_ms]:
            return spin(float(cpu_ms))
        case ["wait", pid]:
            with contextlib.suppress(ChildProcessError):  # SIGCHLD is ignored
                os.waitpid(int(pid), 0)
            return reaped_ns()
        case ["storm", seconds]:
            before_ns = reaped_ns()
            return storm(float(seconds)), reaped_ns() - before_ns
        case ["ignore"]:
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        case ["setuid"]:
            os.setuid(NOBODY_UID)
    return None


def live(directory: Path) -> None:
    """Obey commands until the order to exit."""
    orders = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    orders.bind(str(directory / str(os.getpid())))
    orders.connect(str(directory / "test"))
    orders.send(json.dumps(os.getpid()).encode())
    while (words := orders.recv(4096).decode().split()) != ["exit"]:
        orders.send(json.dumps(obey(directory, words)).encode())
    os.unlink(directory / str(os.getpid()))
    os._exit(0)


if __name__ == "__main__":
    live(Path(sys.argv[1]))
