"""
Run one Python contender of `sampling.py`: for each line on stdin take a snapshot of PID, and print its CPU time, ns.

    python benchmarks/contender.py full|full_with_names|product|psutil PID
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path


def product(pid: int) -> Callable[[], object]:
    """Take snapshots as the recorder does."""
    from vitalsd.sources.linux.source import LinuxSource

    return partial(LinuxSource(pid).snapshot, names=False)


def full(pid: int) -> Callable[[], object]:
    """Take snapshots as the recorder does, but read every thread each time."""
    from vitalsd.sources.linux.source import LinuxSource

    source = LinuxSource(pid)
    times = source._times
    assert times is not None

    def snapshot() -> object:
        times._exited_ns = None  # without it the source cannot skip threads
        return source.snapshot(names=False)

    return snapshot


def full_with_names(pid: int) -> Callable[[], object]:
    """Add what the recorder does once a second: all names, the stat of the main thread, a count of the threads."""
    from vitalsd.sources.linux.source import LinuxSource

    source = LinuxSource(pid)
    times = source._times
    assert times is not None

    def snapshot() -> object:
        times._exited_ns = None
        times._may_be_renamed = True
        times._counted_ns = times._named_ns = source._program._stat_read_ns = 0
        return source.snapshot(names=False)

    return snapshot


def with_psutil(pid: int) -> Callable[[], object]:
    """Take snapshots with psutil: threads(), and the names, which it does not provide."""
    import psutil

    process = psutil.Process(pid)

    def snapshot() -> object:
        with process.oneshot():
            total, memory, threads = process.cpu_times(), process.memory_info(), process.threads()
        names = {thread.id: Path(f"/proc/{pid}/task/{thread.id}/comm").read_text() for thread in threads}
        return total, memory, threads, names

    return snapshot


def main() -> None:
    """Run the command line."""
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    contenders = {"full": full, "full_with_names": full_with_names, "product": product, "psutil": with_psutil}
    snapshot = contenders[sys.argv[1]](int(sys.argv[2]))
    for _ in sys.stdin:
        begin = time.process_time_ns()
        taken = snapshot()
        print(time.process_time_ns() - begin, flush=True)
        del taken


if __name__ == "__main__":
    main()
