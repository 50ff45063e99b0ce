"""
Parse text of files that describe the machine or a control group; this module opens no file.

Each parser returns ``None`` for content that lacks the figure: kernels differ in what they write.
"""

import re

__all__ = ["parse_busy_ticks", "parse_last_pid", "parse_load_milli", "parse_pressure_ns", "parse_value"]


def parse_busy_ticks(content: bytes) -> int | None:
    """
    Return the CPU time of all cores in ``/proc/stat``: user, nice, system, irq and softirq, in clock ticks.

    User time includes that of guests. Time that another guest stole is not included.
    """
    found = re.match(rb"cpu +(\d+) (\d+) (\d+) \d+ \d+ (\d+) (\d+)", content)
    return None if found is None else sum(map(int, found.groups()))


def parse_load_milli(content: bytes) -> int | None:
    """Return the load average of one minute in ``/proc/loadavg``, thousandths."""
    found = re.match(rb"(\d+)\.(\d\d) ", content)
    return None if found is None else int(found[1]) * 1000 + int(found[2]) * 10


def parse_last_pid(content: bytes) -> int | None:
    """Return the id that the kernel gave last, to a process or a thread, from ``/proc/loadavg``."""
    found = re.search(rb"/\d+ (\d+)\n$", content)
    return None if found is None else int(found[1])


def parse_pressure_ns(content: bytes) -> int | None:
    """Return the time in which at least one task waited, from a file of PSI, ns."""
    found = re.search(rb"^some .*\btotal=(\d+)$", content, re.MULTILINE)
    return None if found is None else int(found[1]) * 1000


def parse_value(key: str, content: bytes) -> int | None:
    """Return the number after a key, of ``meminfo``, ``cpu.stat`` or ``memory.stat``; ``None``: it is not there."""
    found = re.search(rb"^%b:? +(\d+)(?: kB)?$" % key.encode(), content, re.MULTILINE)
    return None if found is None else int(found[1])
