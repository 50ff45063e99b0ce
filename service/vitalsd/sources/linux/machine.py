"""
Read the figures of a Linux machine, or of the container in which the target runs.

The files of ``/proc`` describe the host also inside a container. The figures are those of a container if the control
groups that this process sees begin with a group that is not the root of the hierarchy, and the target is in it:

- version 2: the mount point has ``cgroup.type``, which the kernel writes in every group but the root
  (kernel/cgroup/cgroup.c, CFTYPE_NOT_ON_ROOT);
- version 1: the mount point has a limit of memory or a CPU quota, which the kernel refuses for the root;
- the path of the target's group does not begin with ``/..``: it is not outside of this cgroup namespace.

Then CPU, memory, swap and pressure come from that group, and no load average is shown, because the kernel has it for
the host only. Of the memory that the group may still get and that of the host the smaller figure counts.

A CPU that the firmware throttles counts each time in sysfs (drivers/thermal/intel/therm_throt.c); a virtual machine has
no such files.
"""

import errno
import os
import time
from collections.abc import Iterator, Sequence
from operator import gt

from vitalsd.snapshot import THERMAL_STATES, MachineFigures
from vitalsd.sources.linux.cpu_counters import USER_TICK_NS, first_reserved_fd, read_file
from vitalsd.sources.linux.process_files import ProcessFiles
from vitalsd.sources.linux.procfs import group_paths
from vitalsd.sources.linux.system_text import parse_busy_ticks, parse_load_milli, parse_pressure_ns, parse_value

__all__ = ["MachineReader"]

PRESSURES = ("cpu", "memory", "io")
V1_CPU = ("cpu", "cpu,cpuacct")
"""Directories of the controller of version 1 below the mount point."""
V1_UNLIMITED = 1 << 62
"""Limits of memory from here on mean none, bytes."""
THROTTLE_CPUS = 8
"""Number of CPUs of which the counts of throttling are read. Each CPU counts the events of its package."""
FIND_EVERY_NS = 5_000_000_000
"""Interval at which the control groups of the target are looked for, ns; a process rarely moves."""
THROTTLED_NS = 1_000_000_000
"""For how long a CPU counts as throttled after the count has grown, ns."""
CONTENT_BYTES = 8192
"""Most bytes of a file that are read; ``memory.stat`` has 2 to 4 KiB."""


class MachineReader:
    """
    Read system-wide files, which stay open from the first reading on.

    Args:
        root: mount point of procfs.
        cgroups: mount point of control groups: of version 2, or of a directory for each controller.
        cpus: directory of CPUs in sysfs.
    """

    def __init__(
        self, root: str = "/proc", cgroups: str = "/sys/fs/cgroup", cpus: str = "/sys/devices/system/cpu"
    ) -> None:
        self._root, self._cgroups, self._cpus = root, cgroups, cpus
        self._fds: dict[str, int] = {}
        """Descriptor by path; -1: there is no such file."""
        unified = f"{cgroups}/unified"  # of version 2, where version 1 is mounted beside it
        self._v2 = unified if os.path.exists(f"{unified}/cgroup.controllers") else cgroups
        self._container: int | None = None
        """Version of the control groups that show a container; 0: they are the host's; ``None``: not yet known."""
        self._found: list[tuple[int, str]] = []
        """Version and path of the target's groups as they were found last."""
        self._find_ns = 0
        """Monotonic time at which they are looked for again."""
        self._groups: bytes | None = None
        """Content of the target's ``cgroup`` at the last reading."""
        self._quotas: list[tuple[str, str, int]] = []
        """Path, key and unit in ns of what counts throttling, for the target's group and those above it."""
        self._throttle_files: list[str] | None = None
        """Files that count throttling; ``None``: not looked for yet."""
        self._throttles: Sequence[int] = ()
        """Counts of throttling at the last reading."""
        self._throttled_ns: int | None = None
        """Monotonic time at which a count of throttling had last grown."""

    def close(self) -> None:
        """Release every descriptor. A second call does nothing."""
        self._throttle_files = None
        while self._fds:
            _, fd = self._fds.popitem()
            if fd >= 0:
                os.close(fd)

    def read(self, files: ProcessFiles, now_ns: int, warnings: list[str]) -> MachineFigures:
        """
        Read the figures; what this system does not show is ``None``.

        Args:
            files: of the target.
            now_ns: monotonic time, ns.
            warnings: gets one sentence that names what is missing, and why.
        """
        if now_ns >= self._find_ns:
            self._find_ns = now_ns + FIND_EVERY_NS
            self._found = self._find_groups(files)
        groups = self._found
        is_here = bool(groups) and all(not path.startswith("/..") for _, path in groups)
        container = self._find_container() if is_here else 0
        busy_ns, load_milli, available, swap = self._of_container() if container else self._of_host()
        pressures = [self._pressure_ns(name, container) for name in PRESSURES]
        figures = MachineFigures(
            in_container=container > 0,
            busy_ns=busy_ns,
            load_milli=load_milli,
            memory_available_bytes=available,
            swap_used_bytes=swap,
            cpu_pressure_ns=pressures[0],
            memory_pressure_ns=pressures[1],
            io_pressure_ns=pressures[2],
            quota_throttled_ns=self._quota_throttled_ns(),
            thermal_level=self._thermal_level(),
        )
        if missing := list(_missing(figures)):
            warnings.append(f"machine: null, because this system does not show it: {', '.join(missing)}")
        return figures

    def _content(self, path: str) -> bytes:
        """Return the content of a file; empty if it is missing, or the kernel does not fill it."""
        fd = self._fds.get(path)
        try:
            if fd is None:
                fd = os.open(path, os.O_RDONLY)
                if fd >= first_reserved_fd():
                    try:
                        return os.pread(fd, CONTENT_BYTES, 0)
                    finally:
                        os.close(fd)
                self._fds[path] = fd
            return os.pread(fd, CONTENT_BYTES, 0) if fd >= 0 else b""
        except OSError as error:  # EOPNOTSUPP: pressure is switched off. ENODEV: the control group or the CPU is gone.
            if fd is None and error.errno not in (errno.EMFILE, errno.ENFILE):
                self._fds[path] = -1
            return b""

    def _number(self, path: str) -> int | None:
        content = self._content(path).strip()
        return int(content) if content.isdigit() else None

    # The host, or the container

    def _of_host(self) -> tuple[int | None, int | None, int | None, int | None]:
        """Return the CPU time, the load, and memory available and swapped."""
        ticks = parse_busy_ticks(self._content(f"{self._root}/stat"))
        available, swap = self._memory_of_host()
        return (
            None if ticks is None else ticks * USER_TICK_NS,
            parse_load_milli(self._content(f"{self._root}/loadavg")),
            available,
            swap,
        )

    def _memory_of_host(self) -> tuple[int | None, int | None]:
        memory = self._content(f"{self._root}/meminfo")
        available, total, free = (parse_value(key, memory) for key in ("MemAvailable", "SwapTotal", "SwapFree"))
        return (
            None if available is None else available * 1024,
            None if total is None or free is None else (total - free) * 1024,
        )

    def _of_container(self) -> tuple[int | None, int | None, int | None, int | None]:
        """Return the same of the container, of which version 1 has each controller in a directory of its own."""
        v1 = f"{self._cgroups}/memory", "usage_in_bytes", "limit_in_bytes", "memsw.usage_in_bytes", "total_"
        if self._container == 1:
            usages = [self._number(f"{self._cgroups}/{name}/cpuacct.usage") for name in ("cpuacct", "cpu,cpuacct")]
            return next((ns for ns in usages if ns is not None), None), None, *self._memory_of_container(*v1)
        used_us = parse_value("usage_usec", self._content(f"{self._v2}/cpu.stat"))
        has_memory = self._content(f"{self._v2}/memory.current")  # Version 1 may have that controller.
        names = (self._v2, "current", "max", "swap.current", "") if has_memory else v1
        return None if used_us is None else used_us * 1000, None, *self._memory_of_container(*names)

    def _memory_of_container(
        self, directory: str, usage: str, limit: str, swap: str, prefix: str
    ) -> tuple[int | None, int | None]:
        """
        Return the memory that the group may still get, and its swap.

        Args:
            directory: of the group.
            usage: file of the memory in use, without ``memory.``, as the next two.
            limit: file of the limit.
            swap: file of the swap in use; of version 1, of memory and swap together.
            prefix: of the keys in ``memory.stat`` that include groups below.
        """
        used, most = self._number(f"{directory}/memory.{usage}"), self._number(f"{directory}/memory.{limit}")
        swapped = self._number(f"{directory}/memory.{swap}")
        if swapped is not None and used is not None and swap.startswith("memsw"):
            swapped = max(0, swapped - used)
        available, _ = self._memory_of_host()
        if used is not None and most is not None and most < V1_UNLIMITED:
            stat = self._content(f"{directory}/memory.stat")
            cached = sum(parse_value(f"{prefix}{kind}", stat) or 0 for kind in ("inactive_file", "active_file"))
            room = max(0, most - used + cached)
            available = room if available is None else min(available, room)
        return available, swapped

    def _pressure_ns(self, name: str, container: int) -> int | None:
        if container == 1:
            return None  # Version 1 does not measure it.
        path = f"{self._v2}/{name}.pressure" if container else f"{self._root}/pressure/{name}"
        return parse_pressure_ns(self._content(path))

    # Control groups

    def _find_container(self) -> int:
        if self._container is None:
            limit = self._number(f"{self._cgroups}/memory/memory.limit_in_bytes")
            quotas = [self._number(f"{self._cgroups}/{name}/cpu.cfs_quota_us") for name in V1_CPU]
            if self._content(f"{self._v2}/cgroup.type"):
                self._container = 2
            else:
                limited = limit is not None and limit < V1_UNLIMITED
                self._container = int(limited or any(quota is not None for quota in quotas))  # -1: no quota
        return self._container

    def _find_groups(self, files: ProcessFiles) -> list[tuple[int, str]]:
        """Return version and path of the groups that may limit the target's CPU; empty: it cannot be read."""
        prefix = "" if files.member == files.pid else f"task/{files.member}/"
        try:
            content = read_file(f"{prefix}cgroup", files.directory)
        except OSError:  # The kernel has no control groups, or it hides the target since a moment ago.
            content = self._groups or b""
        groups = group_paths(content, b"cpu")
        if content != self._groups:
            self._groups = content
            for path in [path for path in self._fds if path.endswith("/cpu.stat")]:
                if (fd := self._fds.pop(path)) >= 0:
                    os.close(fd)
            self._quotas = [quota for group in groups for quota in self._quotas_of(*group)]
        return groups

    def _quotas_of(self, version: int, path: str) -> Iterator[tuple[str, str, int]]:
        """Yield what counts throttling for a group and those above it, as far as they are mounted here."""
        key, unit = ("throttled_time", 1) if version == 1 else ("throttled_usec", 1000)
        mounts = [f"{self._cgroups}/{name}" for name in V1_CPU] if version == 1 else [self._v2]
        while not path.startswith("/.."):
            for mount in mounts:
                file = f"{mount}{path.rstrip('/')}/cpu.stat"
                if parse_value(key, self._content(file)) is not None:
                    yield file, key, unit
            if path in ("", "/"):
                break
            path = path.rpartition("/")[0]

    def _quota_throttled_ns(self) -> int | None:
        found = [(parse_value(key, self._content(path)), unit) for path, key, unit in self._quotas]
        return max((value * unit for value, unit in found if value is not None), default=None)

    # Temperature

    def _thermal_level(self) -> int | None:
        if self._throttle_files is None:
            directories = [f"{self._cpus}/cpu{number}/thermal_throttle" for number in range(THROTTLE_CPUS)]
            files = [f"{directory}/{kind}_throttle_count" for directory in directories for kind in ("package", "core")]
            self._throttle_files = [file for file in files if os.path.exists(file)]
        counts = [self._number(file) for file in self._throttle_files]
        if all(count is None for count in counts):
            return None
        before, self._throttles = self._throttles, [count or 0 for count in counts]
        now_ns = time.monotonic_ns()
        if before and any(map(gt, self._throttles, before)):
            self._throttled_ns = now_ns
        throttled = self._throttled_ns is not None and now_ns - self._throttled_ns < THROTTLED_NS
        return THERMAL_STATES.index("throttled" if throttled else "nominal")


def _missing(figures: MachineFigures) -> Iterator[str]:
    """Yield the names of missing figures as the answers have them, each with the reason if there is a usual one."""
    if figures.busy_ns is None:
        yield "cpu_percent, other_percent"
    if figures.load_milli is None and not figures.in_container:
        yield "load_1m"
    if figures.memory_available_bytes is None:
        yield "memory_available_kb"
    if figures.swap_used_bytes is None:
        yield "swap_used_kb"
    pressures = zip(
        PRESSURES, (figures.cpu_pressure_ns, figures.memory_pressure_ns, figures.io_pressure_ns), strict=True
    )
    if lacking := [name for name, ns in pressures if ns is None]:
        yield f"pressure_percent of {' and '.join(lacking)} (PSI is off, or not built into the kernel)"
    if figures.quota_throttled_ns is None:
        yield "quota_throttled_percent (no control group of the target counts it)"
