"""
Measure how much memory a quarter of an hour of many threads takes, compared with two straightforward ways.

    python benchmarks/memory.py [--threads 1000] [--snapshots 900]

The counters are synthetic: 4 % of the threads run and wait in each second, then all of them. Each way fills a process
of its own; the figure is the growth of its resident memory (Linux: /proc/self/statm).
"""

import argparse
import json
import multiprocessing
import os
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping

from vitalsd.recording.series import Record
from vitalsd.snapshot import Identity, MachineFigures, Snapshot, ThreadRoster

SECOND_NS = 1_000_000_000
SHARES = (0.04, 1.0)

pthread = namedtuple("pthread", ("id", "user_time", "system_time"))  # as psutil's threads() returns them


def snapshots(threads: int, count: int, share: float) -> Iterator[Snapshot]:
    """Yield one snapshot a second in which `share` of the threads run, with one roster, as a source does."""
    tids = tuple(range(1, threads + 1))
    roster = ThreadRoster(tids, (7,) * threads, tuple(f"worker {tid}" for tid in tids))
    cpu_ns, wait_ns = [0] * threads, [0] * threads
    step = round(1 / share)
    for number in range(1, count + 1):
        cpu_ns, wait_ns = cpu_ns.copy(), wait_ns.copy()
        for i in range(number % step, threads, step):
            cpu_ns[i] += 1_234_567 + i
            wait_ns[i] += 990_000_000 + i
        yield Snapshot(
            monotonic_ns=number * SECOND_NS,
            boottime_ns=number * SECOND_NS,
            wall_ns=number * SECOND_NS,
            uptime_ns=number * SECOND_NS,
            skew_ns=1000,
            cpu_ns=sum(cpu_ns),
            cpu_grain_ns=1,
            exited_cpu_ns=(0, 0),
            rss_bytes=1 << 30,
            vm_bytes=1 << 32,
            image=1,
            roster=roster,
            thread_cpu_ns=cpu_ns,
            thread_grain_ns=1,
            thread_lag_ns=0,
            thread_wait_ns=wait_ns,
            wait_ns=sum(wait_ns),
            source="made up",
            machine=MachineFigures(busy_ns=number),
        )


def product(taken: Iterator[Snapshot]) -> object:
    """Fill the recorder's ring buffer."""
    record = Record(Identity("linux", 1, "made up", "0", 0, 0), interval_ns=SECOND_NS)
    for snapshot in taken:
        record.append(snapshot)
    return record


def lists(taken: Iterator[Snapshot]) -> object:
    """Keep a list of numbers for each snapshot."""
    return list(taken)


def objects(taken: Iterator[Snapshot]) -> object:
    """Keep a dictionary by name of psutil's objects for each snapshot."""
    return [
        {
            name: pthread(tid, ns / 1e9, 0.0)
            for tid, name, ns in zip(s.roster.tids, s.roster.names, s.thread_cpu_ns, strict=True)
        }
        for s in taken
    ]


WAYS: Mapping[str, Callable[[Iterator[Snapshot]], object]] = {"product": product, "lists": lists, "objects": objects}


def rss_bytes() -> int:
    """Return the resident memory of this process, bytes (Linux: /proc/self/statm)."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def grown_mib(way: str, threads: int, count: int, share: float) -> float:
    """Return the growth of a process that is filled this way, MiB."""
    before = rss_bytes()
    kept = WAYS[way](snapshots(threads, count, share))
    grown = (rss_bytes() - before) / (1 << 20)
    assert not isinstance(kept, Record) or len(kept) == count  # a Record drops the oldest snapshots at its limit
    return grown


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1000)
    parser.add_argument("--snapshots", type=int, default=900)
    arguments = parser.parse_args()
    for share in SHARES:
        figures = {}
        for way in WAYS:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                figures[way] = pool.apply(grown_mib, (way, arguments.threads, arguments.snapshots, share))
        line: dict[str, float] = {
            "threads": arguments.threads,
            "snapshots": arguments.snapshots,
            "running_percent": 100 * share,
        }
        line |= {f"{way}_mib": round(mib, 2) for way, mib in figures.items()}
        line |= {f"{way}_to_product": round(mib / figures["product"], 1) for way, mib in figures.items()}
        del line["product_to_product"]
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
