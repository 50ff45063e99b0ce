"""
Threads that use CPU time on command: the target of the source tests, in this process or as another.

Run as a program it obeys lines of JSON on standard input and answers each with one.
"""

import contextlib
import ctypes
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

__all__ = ["ChildWorkload", "OwnWorkload", "Workload"]


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


class OwnWorkload:
    """Threads of this process."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._threads: dict[int, tuple[threading.Thread, queue.SimpleQueue[Any]]] = {}

    def start_thread(self, name: str) -> int:
        orders: queue.SimpleQueue[Any] = queue.SimpleQueue()
        named: Future[None] = Future()
        thread = threading.Thread(target=_obey, args=(orders,), daemon=True)
        thread.start()
        assert thread.native_id is not None
        self._threads[thread.native_id] = thread, orders
        orders.put((lambda: _set_name(name), named))
        named.result()
        return thread.native_id

    def rename_thread(self, tid: int, name: str) -> None:
        self._order(tid, lambda: _set_name(name))

    def burn(self, tid: int, cpu_ns: int) -> int:
        used: int = self._order(tid, lambda: _burn(cpu_ns))
        return used

    def end_thread(self, tid: int) -> None:
        thread, orders = self._threads.pop(tid)
        orders.put(None)
        thread.join()
        # join() returns when Python is done with the thread, a little before the kernel is.
        while _exists(tid):
            time.sleep(0.001)

    def close(self) -> None:
        for tid in list(self._threads):
            self.end_thread(tid)

    def _order(self, tid: int, order: Callable[[], Any]) -> Any:
        done: Future[Any] = Future()
        self._threads[tid][1].put((order, done))
        return done.result()


class ChildWorkload:
    """Threads of a child process."""

    def __init__(self) -> None:
        self._child = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self._child.pid
        self._order("pid")

    def start_thread(self, name: str) -> int:
        return self._order("start_thread", name)

    def rename_thread(self, tid: int, name: str) -> None:
        self._order("rename_thread", tid, name)

    def burn(self, tid: int, cpu_ns: int) -> int:
        return self._order("burn", tid, cpu_ns)

    def end_thread(self, tid: int) -> None:
        self._order("end_thread", tid)

    def kill(self) -> None:
        """End it, and leave the zombie."""
        self._child.kill()
        if sys.platform == "darwin":
            time.sleep(0.2)
        else:
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)

    def reap(self) -> None:
        self._child.wait()

    def close(self) -> None:
        self._child.kill()
        self._child.communicate()

    def _order(self, method: str, *arguments: Any) -> int:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        print(json.dumps([method, *arguments]), file=self._child.stdin, flush=True)
        answer: int = json.loads(self._child.stdout.readline())
        return answer


def _obey(orders: "queue.SimpleQueue[Any]") -> None:
    while (order := orders.get()) is not None:
        call, done = order
        done.set_result(call())


def _burn(cpu_ns: int) -> int:
    begun = time.thread_time_ns()
    while (used := time.thread_time_ns() - begun) < cpu_ns:
        pass
    return used


def _set_name(name: str) -> None:
    if sys.platform == "darwin":
        ctypes.PyDLL(None).pthread_setname_np(name.encode())
    else:
        with open(f"/proc/self/task/{threading.get_native_id()}/comm", "w", encoding="utf-8") as file:
            file.write(name)


def _exists(tid: int) -> bool:
    if sys.platform == "darwin":
        from vitalsd.sources.darwin.mach_source import MachSource

        return tid in MachSource().snapshot().roster.tids
    with contextlib.suppress(OSError), open(f"/proc/self/task/{tid}/comm", "rb"):
        return True
    return False


def main() -> None:
    workload = OwnWorkload()
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        answer = workload.pid if method == "pid" else getattr(workload, method)(*arguments)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
