"""A process whose threads use CPU time on command: the target of the source tests, this process or another."""

import os
import sys
import time
from typing import Any, Protocol

from support.target import Target

__all__ = ["ChildWorkload", "Workload"]


class Workload(Protocol):
    """A process whose threads do as they are told."""

    pid: int

    def start_thread(self, name: str) -> int:
        """Its id."""
        ...

    def rename_thread(self, tid: int, name: str) -> None: ...
    def burn(self, tid: int, cpu_ns: int) -> int:
        """Let a thread use that much CPU time; what it really used, ns."""
        ...

    def end_thread(self, tid: int) -> None:
        """Back when the kernel has forgotten it."""
        ...

    def close(self) -> None: ...


class ChildWorkload:
    """Threads of a child process; `support.target.OwnWorkload` are those of this one."""

    def __init__(self) -> None:
        self._target = Target()
        self.pid = self._target.pid

    def start_thread(self, name: str) -> int:
        return self._ask("start_thread", name.encode().hex())

    def rename_thread(self, tid: int, name: str) -> None:
        self._ask("rename_thread", tid, name.encode().hex())

    def burn(self, tid: int, cpu_ns: int) -> int:
        return self._ask("burn_thread", tid, cpu_ns)

    def end_thread(self, tid: int) -> None:
        self._ask("end_thread", tid)

    def kill(self) -> None:
        """End it, and leave the zombie."""
        self._target.process.kill()
        if sys.platform == "darwin":
            time.sleep(0.2)
        else:
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)

    def reap(self) -> None:
        self._target.process.wait()

    def close(self) -> None:
        self._target.__exit__(None, None, None)

    def _ask(self, command: str, *arguments: Any) -> int:
        answer: int = self._target.ask(" ".join(map(str, (command, *arguments))))
        return answer
