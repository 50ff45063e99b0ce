"""
Run a process to measure, and control it.

As a program it starts threads that use CPU and threads that sleep, keeps a log of its own CPU clocks (the reference of
the accuracy tests) and obeys one command per line of stdin. `Target` starts it. `OwnWorkload` controls threads of this
program, or of the process that imports it.
"""

import argparse
import ctypes
import json
import mmap
import os
import platform
import queue
import resource
import subprocess
import sys
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from types import TracebackType
from typing import Any

PERIOD_NS = 20_000_000
LOG_STEP_NS = 500_000
PR_SET_DUMPABLE, PR_SET_NAME = 4, 15  # linux/prctl.h
SYS_EXIT = {"x86_64": 60, "aarch64": 93}.get(platform.machine())

Log = list[tuple[int, int]]


class Target:
    """Run this module as a program; a context manager that kills it."""

    def __init__(self, *arguments: str, python: Sequence[str] = (sys.executable,)) -> None:
        self.process = subprocess.Popen(
            [*python, __file__, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self.process.pid
        self.tids: dict[str, int] = self.read()

    def read(self) -> Any:
        """Return the JSON of the next line of the program."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the target has ended"
        return json.loads(line)

    def tell(self, command: str) -> None:
        """Send a command, and do not wait for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def ask(self, command: str) -> Any:
        """Send a command, and return its answer."""
        self.tell(command)
        return self.read()

    def kill(self) -> None:
        """Kill the program and wait for its end."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> "Target":
        """Return the running program."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill the program and close its pipes."""
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()


def cpu_at(log: Sequence[Sequence[int]], instant_ns: int) -> float:
    """Return the CPU time at `instant_ns` of the monotonic clock, interpolated between two entries of a log, ns."""
    after = bisect_right(log, instant_ns, key=lambda entry: entry[0])
    assert 0 < after < len(log), "the log does not cover that instant"
    (t0, c0), (t1, c1) = log[after - 1], log[after]
    return c0 + (c1 - c0) * (instant_ns - t0) / (t1 - t0)


# Threads on command


class OwnWorkload:
    """Control threads of this process; a `support.workload.Workload`."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._threads: dict[int, tuple[threading.Thread, queue.SimpleQueue[Any]]] = {}

    def start_thread(self, name: str) -> int:
        """Start a thread and return its id."""
        orders: queue.SimpleQueue[Any] = queue.SimpleQueue()
        named: Future[None] = Future()
        thread = threading.Thread(target=_obey, args=(orders,), daemon=True)
        thread.start()
        assert thread.native_id is not None
        self._threads[thread.native_id] = thread, orders
        orders.put((lambda: set_name(name.encode()), named))
        named.result()
        return thread.native_id

    def rename_thread(self, tid: int, name: str) -> None:
        """Rename a thread."""
        self._order(tid, lambda: set_name(name.encode()))

    def burn(self, tid: int, cpu_ns: int) -> int:
        """Let a thread use CPU time, and return how much it used, ns."""
        used: int = self._order(tid, lambda: spin(cpu_ns / 1e6))
        return used

    def end_thread(self, tid: int) -> None:
        """End a thread, and wait until the kernel no longer lists it."""
        thread, orders = self._threads.pop(tid)
        orders.put(None)
        thread.join()
        # join() returns when Python is done with the thread, a little before the kernel is.
        while _exists(tid):
            time.sleep(0.001)

    def close(self) -> None:
        """End all threads."""
        for tid in list(self._threads):
            self.end_thread(tid)

    def _order(self, tid: int, order: Callable[[], Any]) -> Any:
        done: Future[Any] = Future()
        self._threads[tid][1].put((order, done))
        return done.result()


def _obey(orders: "queue.SimpleQueue[Any]") -> None:
    while (order := orders.get()) is not None:
        call, done = order
        done.set_result(call())


def _exists(tid: int) -> bool:
    if sys.platform == "darwin":
        from vitalsd.sources.darwin.mach_source import MachSource

        return tid in MachSource().snapshot().roster.tids
    with suppress(OSError), open(f"/proc/self/task/{tid}/comm", "rb"):
        return True
    return False


# The program


def libc() -> Any:
    """Return the C library, with errno."""
    return ctypes.CDLL(None, use_errno=True)


def set_name(name: bytes) -> None:
    """Name this thread, as the kernel reports it; macOS cuts nothing and refuses more than 63 bytes."""
    if sys.platform == "darwin":
        libc().pthread_setname_np(name)
    else:
        libc().prctl(PR_SET_NAME, name, 0, 0, 0)


def burn(percent: float, log: Log, process_log: Log | None) -> None:
    """Use `percent` of a core in bursts, and write down the clocks at every edge and inside each burst."""
    while True:
        begun = time.monotonic_ns()
        until = time.thread_time_ns() + int(PERIOD_NS * percent / 100)
        while (cpu := time.thread_time_ns()) < until:
            now = time.monotonic_ns()
            if not log or now - log[-1][0] >= LOG_STEP_NS:
                log.append((now, cpu))
                if process_log is not None:
                    process_log.append((time.monotonic_ns(), time.process_time_ns()))
        log.append((time.monotonic_ns(), time.thread_time_ns()))
        if process_log is not None:
            process_log.append((time.monotonic_ns(), time.process_time_ns()))
        time.sleep(max(0.001, (begun + PERIOD_NS - time.monotonic_ns()) / 1e9))
        log.append((time.monotonic_ns(), time.thread_time_ns()))
        if process_log is not None:
            process_log.append((time.monotonic_ns(), time.process_time_ns()))


def spin(cpu_ms: float) -> int:
    """Use CPU time of this thread; return how much it was, ns."""
    begun = time.thread_time_ns()
    while (used := time.thread_time_ns() - begun) < cpu_ms * 1e6:
        pass
    return used


def churn(count: int, cpu_ms: float) -> None:
    """Let `count` threads start, work and end, a few at a time."""
    alive: list[threading.Thread] = []
    for _ in range(count):
        thread = threading.Thread(target=spin, args=(cpu_ms,))
        thread.start()
        alive.append(thread)
        if len(alive) >= 4:
            alive.pop(0).join()
    for thread in alive:
        thread.join()


def answer(value: object) -> None:
    """Print the answer to a command."""
    print(json.dumps(value), flush=True)


def reaped_ns() -> int:
    """Return the CPU time of the children that this process has waited for, ns."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round((usage.ru_utime + usage.ru_stime) * 1e9)


living: dict[str, tuple[threading.Thread, threading.Event]] = {}
grown: list[bytes] = []
"""Memory that the command "grow" took."""
files: list[mmap.mmap] = []
"""Files that the command "map" mapped and read."""


def obey(arguments: list[str], logs: dict[str, Log], process_log: Log, workload: OwnWorkload) -> None:
    """Obey one command, and print its answer."""
    match arguments:
        case ["start_thread", *hexadecimal]:
            answer(workload.start_thread(bytes.fromhex("".join(hexadecimal)).decode()))
        case ["rename_thread", tid, *hexadecimal]:
            workload.rename_thread(int(tid), bytes.fromhex("".join(hexadecimal)).decode())
            answer(None)
        case ["burn_thread", tid, cpu_ns]:
            answer(workload.burn(int(tid), int(cpu_ns)))
        case ["end_thread", tid]:
            workload.end_thread(int(tid))
            answer(None)
        case ["log"]:
            time.sleep(2 * PERIOD_NS / 1e9)
            answer({"threads": {name: log[:] for name, log in logs.items()}, "process": process_log[:]})
        case ["times"]:
            answer({"thread": time.thread_time_ns(), "process": time.process_time_ns()})
        case ["burn", cpu_ms]:
            spin(float(cpu_ms))
            answer(time.process_time_ns())
        case ["churn", count, cpu_ms]:
            churn(int(count), float(cpu_ms))
            answer(time.process_time_ns())
        case ["churn_for", seconds, per_second]:
            end, born = time.monotonic() + float(seconds), 0
            begun = time.monotonic()
            while time.monotonic() < end:
                threading.Thread(target=spin, args=(0,)).start()
                born += 1
                time.sleep(max(0, begun + born / float(per_second) - time.monotonic()))
            answer(born)
        case ["born", name, cpu_ms, *last_pid]:
            # With `last_pid` the kernel gives the new thread the number after it, unless another process forks first.
            if last_pid:
                with open("/proc/sys/kernel/ns_last_pid", "w", encoding="ascii") as file:
                    file.write(last_pid[0])
            ready, release = threading.Event(), threading.Event()

            def live() -> None:
                set_name(name.encode())
                spin(float(cpu_ms))
                ready.set()
                release.wait()

            thread = threading.Thread(target=live, daemon=True)
            thread.start()
            ready.wait()
            living[name] = thread, release
            answer(thread.native_id)
        case ["end", name]:
            thread, release = living.pop(name)
            release.set()
            thread.join()
            answer(True)
        case ["grow", byte_count]:
            grown.append(b"\1" * int(byte_count))
            answer(True)
        case ["map", path]:
            with open(path, "rb") as mapped:
                content = mmap.mmap(mapped.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ)
            answer(sum(content[:: mmap.PAGESIZE]))
            files.append(content)
        case ["children", cpu_ms]:
            before_ns = reaped_ns()
            while reaped_ns() - before_ns < float(cpu_ms) * 1e6:
                subprocess.run(["/bin/sh", "-c", "i=0; while [ $i -lt 3000 ]; do i=$((i+1)); done"], check=True)
            answer(reaped_ns() - before_ns)
        case ["name", hexadecimal]:
            set_name(bytes.fromhex(hexadecimal.strip("-")))
            answer(True)
        case ["dumpable", flag]:
            answer(libc().prctl(PR_SET_DUMPABLE, int(flag), 0, 0, 0))
        case ["uid", uid]:
            os.setgroups([])
            os.setgid(int(uid))
            os.setuid(int(uid))
            libc().prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
            answer(True)
        case ["exec", *rest]:
            os.execv(sys.executable, [sys.executable, __file__, *rest])
        case ["exec_from_thread", *rest]:
            command = [sys.executable, __file__, *rest]
            threading.Thread(target=os.execv, args=(sys.executable, command)).start()
            threading.Event().wait()
        case ["exit_main"]:
            answer(True)
            libc().syscall(SYS_EXIT, 0)
        case _:
            raise SystemExit(f"no such command: {arguments}")


def main() -> None:
    """Start the threads of the command line, and obey standard input."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--burn", type=float, nargs="*", default=[], metavar="PERCENT")
    parser.add_argument("--idle", type=int, default=0, metavar="N")
    parser.add_argument("--spin-first", type=float, default=0, metavar="CPU_MS")
    options = parser.parse_args()

    threading.stack_size(256 * 1024)
    logs: dict[str, Log] = {}
    process_log: Log = []
    tids = {"main": threading.get_native_id()}
    started = threading.Semaphore(0)

    def run(name: str, percent: float | None) -> None:
        set_name(name.encode())
        tids[name] = threading.get_native_id()
        started.release()
        if percent is None:
            threading.Event().wait()
        else:
            burn(percent, logs[name], process_log if name == "burn-0" else None)

    wanted = [(f"burn-{i}", percent) for i, percent in enumerate(options.burn)]
    for name, percent in [*wanted, *((f"idle-{i}", None) for i in range(options.idle))]:
        logs[name] = []
        threading.Thread(target=run, args=(name, percent), daemon=True).start()
        started.acquire()
    spin(options.spin_first)
    answer(tids)
    workload = OwnWorkload()
    for line in sys.stdin:
        obey(line.split(), logs, process_log, workload)


if __name__ == "__main__":
    main()
