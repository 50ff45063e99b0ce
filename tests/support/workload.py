"""Control threads that use CPU time on command, of this process or a child: the targets of the source tests."""

import os
import sys
import time
from typing import Any, Protocol

from support.target import Target

__all__ = ["ChildWorkload", "Workload"]


class Workload(Protocol):
    """Declare how to control the threads of a process."""

    pid: int

    def start_thread(self, name: str) -> int:
        """Start a thread and return its id."""
        ...

    def rename_thread(self, tid: int, name: str) -> None:
        """Rename a thread."""

    def burn(self, tid: int, cpu_ns: int) -> int:
        """Let a thread use CPU time, and return how much it used, ns."""
        ...

    def end_thread(self, tid: int) -> None:
        """End a thread, and wait until the kernel no longer lists it."""
        ...

    def close(self) -> None:
        """End the threads."""


class ChildWorkload:
    """Control threads of a child process; `support.target.OwnWorkload` controls those of this one."""

    def __init__(self) -> None:
        self._target = Target()
        self.pid = self._target.pid

    def start_thread(self, name: str) -> int:
        """Start a thread and return its id."""
        return self._ask("start_thread", name.encode().hex())

    def rename_thread(self, tid: int, name: str) -> None:
        """Rename a thread."""
        self._ask("rename_thread", tid, name.encode().hex())

    def burn(self, tid: int, cpu_ns: int) -> int:
        """Let a thread use CPU time, and return how much it used, ns."""
        return self._ask("burn_thread", tid, cpu_ns)

    def end_thread(self, tid: int) -> None:
        """End a thread, and wait until the kernel no longer lists it."""
        self._ask("end_thread", tid)

    def kill(self) -> None:
        """Kill the child, and leave the zombie."""
        self._target.process.kill()
        if sys.platform == "darwin":
            time.sleep(0.2)
        else:
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)

    def reap(self) -> None:
        """Wait for the child, which removes the zombie."""
        self._target.process.wait()

    def close(self) -> None:
        """Kill the child."""
        self._target.__exit__(None, None, None)

    def _ask(self, command: str, *arguments: Any) -> int:
        answer: int = self._target.ask(" ".join(map(str, (command, *arguments))))
        return answer
