"""The figures of the machine: of this one, and of kernels and containers made of files."""

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from support.sidecars import eventually
from support.target import Target
from vitalsd.snapshot import THERMAL_STATES, MachineFigures, Part
from vitalsd.sources.linux.cpu_counters import USER_TICK_NS
from vitalsd.sources.linux.machine import MachineReader
from vitalsd.sources.linux.process_files import ProcessFiles
from vitalsd.sources.linux.source import LinuxSource

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

Start = Callable[..., Target]

MIB = 1 << 20
PROC = {
    "stat": "cpu  100 20 30 4000 50 6 7 800 9 1\ncpu0 1 2 3 4 5 6 7 8 9 1\n",
    "loadavg": "1.25 0.50 0.10 2/345 6789\n",
    "meminfo": "MemTotal:  8192 kB\nMemFree:  10 kB\nMemAvailable:  4096 kB\nSwapTotal:  2048 kB\nSwapFree:  1024 kB\n",
    "pressure/cpu": "some avg10=1.00 avg60=0.00 avg300=0.00 total=5000\nfull avg10=0.00 total=1\n",
    "pressure/memory": "some avg10=0.00 avg60=0.00 avg300=0.00 total=6000\n",
    "pressure/io": "some avg10=0.00 avg60=0.00 avg300=0.00 total=7000\n",
    "7/cgroup": "0::/app/inner\n",
}
V2_HOST = {
    "cgroup.controllers": "cpu memory\n",
    "cpu.stat": "usage_usec 900\n",
    "app/cpu.stat": "usage_usec 9\nnr_throttled 2\nthrottled_usec 30\n",
    "app/inner/cpu.stat": "usage_usec 9\nnr_throttled 2\nthrottled_usec 20\n",
}
V2_CONTAINER = {
    **V2_HOST,
    "cgroup.type": "domain\n",
    "cpu.stat": "usage_usec 900\nthrottled_usec 10\n",
    "cpu.pressure": "some avg10=0.00 avg60=0.00 avg300=0.00 total=50\n",
    "memory.pressure": "some avg10=0.00 avg60=0.00 avg300=0.00 total=60\n",
    "io.pressure": "some avg10=0.00 avg60=0.00 avg300=0.00 total=70\n",
    "memory.current": f"{3 * MIB}\n",
    "memory.max": f"{4 * MIB}\n",
    "memory.stat": f"anon 1\ninactive_file {MIB // 2}\nactive_file {MIB // 4}\n",
    "memory.swap.current": "4096\n",
}
V1_HOST = {
    "unified/cgroup.controllers": "",
    "unified/cpu.stat": "usage_usec 900\n",
    "cpu,cpuacct/cpu.stat": "nr_throttled 0\nthrottled_time 0\n",
    "cpu,cpuacct/app/cpu.stat": "nr_throttled 1\nthrottled_time 12345\n",
    "cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
    "memory/memory.limit_in_bytes": "9223372036854771712\n",
}
V1_CONTAINER = {
    **V1_HOST,
    "cpu,cpuacct/cpuacct.usage": "123456\n",
    "cpu,cpuacct/cpu.cfs_quota_us": "50000\n",
    "memory/memory.limit_in_bytes": f"{4 * MIB}\n",
    "memory/memory.usage_in_bytes": f"{3 * MIB}\n",
    "memory/memory.memsw.usage_in_bytes": f"{3 * MIB + 4096}\n",
    "memory/memory.stat": f"total_inactive_file {MIB // 2}\ntotal_active_file {MIB // 4}\n",
}


class Made:
    """A reader over files of a procfs with one process, 7, of control groups and of CPUs."""

    def __init__(self, directory: Path, groups: dict[str, str], proc: dict[str, str] = PROC) -> None:
        self.root, self.groups, self.cpus = directory / "proc", directory / "cgroup", directory / "cpu"
        for folder, files in ((self.root, proc), (self.groups, groups)):
            folder.mkdir()
            for name, content in files.items():
                self.write(folder / name, content)
        for name in ("stat", "statm", "status", "task/7/stat"):
            self.write(self.root / "7" / name, (Path("/proc/self") / name.rpartition("/")[2]).read_text())
        self.write(self.root / "7" / "status", "Tgid:\t7\n")
        self.files = ProcessFiles(7, str(self.root), has_pidfd=False)
        self.times = itertools.count(0, 60_000_000_000)
        """The reader looks for control groups at intervals."""
        self.reader = MachineReader(str(self.root), str(self.groups), str(self.cpus))
        self.warnings: list[str] = []

    @staticmethod
    def write(path: Path, content: str) -> None:
        """Write a file without a new inode, as the kernel does."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    def read(self) -> MachineFigures:
        """Return the figures, and keep the warnings."""
        self.warnings.clear()
        return self.reader.read(self.files, next(self.times), self.warnings)

    def close(self) -> None:
        """Release both."""
        self.reader.close()
        self.files.close()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Made]]:
    made: list[Made] = []

    def make(*arguments: dict[str, str]) -> Made:
        made.append(Made(tmp_path, *arguments))
        return made[-1]

    yield make
    for each in made:
        each.close()


# This machine


def test_busy_time_lies_between_two_readings_of_psutil() -> None:
    """Without the time of guests twice, and without time that another guest stole."""
    with closing(LinuxSource()) as source:
        before = psutil.cpu_times()
        machine = source.snapshot(parts=Part.FIGURES).machine
        after = psutil.cpu_times()
    kinds = ("user", "nice", "system", "irq", "softirq")
    low, high = (sum(getattr(times, kind) for kind in kinds) for times in (before, after))
    assert machine is not None
    if machine.in_container:
        pytest.skip("psutil reads the host's CPU time")
    assert machine.busy_ns is not None
    # Each of the ten times of psutil is cut to a tick; the kernel adds them up before it does.
    assert low * 1e9 - 5 * USER_TICK_NS <= machine.busy_ns <= high * 1e9 + 5 * USER_TICK_NS


def test_memory_swap_and_load_agree_with_psutil() -> None:
    """In a container these are of its control group, which psutil does not read."""
    with closing(LinuxSource()) as source:
        machine = source.snapshot(parts=Part.FIGURES).machine
    assert machine is not None
    if machine.in_container:
        pytest.skip("psutil reads the host's memory")
    assert machine.memory_available_bytes == pytest.approx(psutil.virtual_memory().available, rel=0.05)
    assert machine.swap_used_bytes == pytest.approx(psutil.swap_memory().used, abs=64 * MIB)
    assert machine.load_milli == pytest.approx(psutil.getloadavg()[0] * 1000, abs=1000)


@pytest.mark.skipif(not os.path.exists("/proc/pressure/cpu"), reason="this kernel measures no pressure")
def test_cpu_pressure_grows_while_more_threads_than_cores_run(start: Start) -> None:
    """Three burners on one CPU wait for each other."""
    targets = [start("--burn", "100") for _ in range(3)]
    for target in targets:
        for tid in target.tids.values():
            psutil.Process(tid).cpu_affinity([0])  # type: ignore[attr-defined, unused-ignore]
    with closing(LinuxSource(targets[0].pid)) as source:
        first = source.snapshot(parts=Part.FIGURES).machine
        time.sleep(0.5)
        last = source.snapshot(parts=Part.FIGURES).machine
    assert first is not None
    assert last is not None
    if last.cpu_pressure_ns is None or first.cpu_pressure_ns is None:
        pytest.skip("pressure is switched off")
    assert last.cpu_pressure_ns - first.cpu_pressure_ns > 100_000_000


def test_reader_keeps_few_descriptors_and_releases_them() -> None:
    """They are opened by the first reading with figures, and stay the same."""
    before = set(os.listdir("/proc/self/fd"))
    with closing(LinuxSource()) as source:
        source.snapshot()
        without = set(os.listdir("/proc/self/fd"))
        source.snapshot(parts=Part.FIGURES)
        opened = set(os.listdir("/proc/self/fd"))
        source.snapshot(parts=Part.FIGURES)
        assert set(os.listdir("/proc/self/fd")) == opened
        assert len(opened - without) <= 24
    assert set(os.listdir("/proc/self/fd")) == before


def test_reader_in_a_forked_child_reads_on(make: Callable[..., Made]) -> None:
    """The child shares the open files; neither moves the other's position in them."""
    machine = MachineReader()
    made = make(V2_HOST)
    before = machine.read(made.files, time.monotonic_ns(), [])
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        with closing(machine):
            os.write(writer, str(machine.read(made.files, time.monotonic_ns(), []).busy_ns).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    in_child, after = int(os.read(reader, 32)), machine.read(made.files, time.monotonic_ns(), [])
    os.close(reader)
    os.close(writer)
    machine.close()
    assert before.busy_ns is not None
    assert after.busy_ns is not None
    assert before.busy_ns <= in_child <= after.busy_ns


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a control group")
def test_throttled_time_of_a_group_with_a_quota_grows(start: Start) -> None:
    """A fiftieth of a core, which it gets on a busy machine, too; its group and those above it are read."""
    groups = [Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup/cpu,cpuacct"), Path("/sys/fs/cgroup")]
    mount = next((path for path in groups if (path / "cpu.stat").exists()), None)
    target = start("--burn", "100")
    assert mount is not None
    group = mount / f"vitalsd-{target.pid}"
    try:
        group.mkdir()
        if (group / "cpu.cfs_quota_us").exists():
            (group / "cpu.cfs_quota_us").write_text("2000")
        else:
            (group / "cpu.max").write_text("2000 100000")
    except OSError as error:
        if group.exists():
            group.rmdir()
        pytest.skip(f"no control group with a quota can be made: {error.strerror}")
    try:
        (group / "cgroup.procs").write_text(str(target.pid))
        with closing(LinuxSource(target.pid)) as source:
            first = source.snapshot(parts=Part.FIGURES).machine
            assert first is not None
            first_ns = first.quota_throttled_ns
            assert first_ns is not None

            def grown_ns() -> int:
                now = source.snapshot(parts=Part.FIGURES)
                assert not any("vitalsd-" in warning for warning in now.warnings)
                assert now.machine is not None
                assert now.machine.quota_throttled_ns is not None
                return now.machine.quota_throttled_ns - first_ns

            eventually(lambda: grown_ns() > 200_000_000, 30)
    finally:
        target.kill()
        while (group / "cgroup.procs").read_text():
            time.sleep(0.01)
        group.rmdir()


# Kernels and containers made of files


def test_figures_of_a_host_are_those_of_procfs(make: Callable[..., Made]) -> None:
    """The control group at the mount point is the root, so it counts for nothing but the quota."""
    made = make(V2_HOST)
    assert made.read() == MachineFigures(
        in_container=False,
        busy_ns=(100 + 20 + 30 + 6 + 7) * USER_TICK_NS,
        load_milli=1250,
        memory_available_bytes=4 * MIB,
        swap_used_bytes=MIB,
        cpu_pressure_ns=5_000_000,
        memory_pressure_ns=6_000_000,
        io_pressure_ns=7_000_000,
        quota_throttled_ns=30_000,
    )
    assert made.warnings == []


def test_figures_of_a_container_are_those_of_its_control_group(make: Callable[..., Made]) -> None:
    """Version 2: CPU, memory, swap and pressure; no load average, because the kernel has none of it."""
    made = make(V2_CONTAINER)
    assert made.read() == MachineFigures(
        in_container=True,
        busy_ns=900_000,
        load_milli=None,
        memory_available_bytes=MIB + MIB // 2 + MIB // 4,
        swap_used_bytes=4096,
        cpu_pressure_ns=50_000,
        memory_pressure_ns=60_000,
        io_pressure_ns=70_000,
        quota_throttled_ns=30_000,
    )
    assert made.warnings == []


@pytest.mark.parametrize(
    ("limit", "available"), [("max", 4 * MIB), (str(64 * MIB), 4 * MIB), (str(4 * MIB), 1.75 * MIB)]
)
def test_available_memory_of_a_container_is_the_smaller_of_both(
    make: Callable[..., Made], limit: str, available: int
) -> None:
    """What the limit of the container leaves, or what the host has."""
    assert make(V2_CONTAINER | {"memory.max": limit + "\n"}).read().memory_available_bytes == available


def test_figures_of_a_container_of_version_1_are_those_of_its_control_group(make: Callable[..., Made]) -> None:
    """Each controller has a directory; version 1 measures no pressure."""
    made = make(V1_CONTAINER, PROC | {"7/cgroup": "4:cpu,cpuacct:/docker/0a1b\n3:memory:/docker/0a1b\n0::/\n"})
    figures = made.read()
    assert figures == MachineFigures(
        in_container=True,
        busy_ns=123_456,
        memory_available_bytes=MIB + MIB // 2 + MIB // 4,
        swap_used_bytes=4096,
        quota_throttled_ns=0,
    )
    (warning,) = made.warnings
    assert "pressure_percent of cpu and memory and io" in warning
    assert "docker" not in warning


def test_figures_of_a_host_with_version_1_are_those_of_procfs(make: Callable[..., Made]) -> None:
    """A limit that is none makes no container; the quota is that of the group above the target's."""
    figures = make(V1_HOST, PROC | {"7/cgroup": "4:cpu,cpuacct:/app/inner\n0::/\n"}).read()
    assert not figures.in_container
    assert figures.busy_ns == 163 * USER_TICK_NS
    assert figures.quota_throttled_ns == 12345


def test_target_outside_of_the_container_gets_figures_of_the_host(make: Callable[..., Made]) -> None:
    """As with --proc-root /host/proc: its group cannot be found from here."""
    made = make(V2_CONTAINER, PROC | {"7/cgroup": "0::/../../init.scope\n"})
    figures = made.read()
    assert (figures.in_container, figures.load_milli, figures.quota_throttled_ns) == (False, 1250, None)
    (warning,) = made.warnings
    assert warning.endswith("quota_throttled_percent (no control group of the target counts it)")
    assert "init.scope" not in warning


def test_figures_without_any_file_are_missing_with_one_warning(make: Callable[..., Made]) -> None:
    """Never 0: as where only the processes of a procfs are mounted (subset=pid)."""
    made = make({}, {})
    for _ in range(2):
        assert made.read() == MachineFigures()
        (warning,) = made.warnings
        assert warning == (
            "machine: null, because this system does not show it: cpu_percent, other_percent, load_1m,"
            " memory_available_kb, swap_used_kb, pressure_percent of cpu and memory and io (PSI is off, or not built"
            " into the kernel), quota_throttled_percent (no control group of the target counts it)"
        )


@pytest.mark.parametrize("content", ["", "x\n", "some avg10=0.00\n", "cpu 1 2\n", "MemAvailable: 4096\n"])
def test_figures_of_files_with_other_content_are_missing(make: Callable[..., Made], content: str) -> None:
    """Whatever stands there; an empty file is what a kernel with pressure switched off comes to."""
    made = make(V2_HOST, dict.fromkeys(PROC, content))
    figures = made.read()
    assert (figures.busy_ns, figures.load_milli, figures.swap_used_bytes) == (None, None, None)
    assert (figures.cpu_pressure_ns, figures.memory_pressure_ns, figures.io_pressure_ns) == (None, None, None)
    assert len(made.warnings) == 1


def test_quota_follows_the_target_into_another_group(make: Callable[..., Made]) -> None:
    """The files of the groups that it has left are closed."""
    made = make(V2_HOST | {"other/cpu.stat": "throttled_usec 7\n"})
    before = len(os.listdir("/proc/self/fd"))
    assert made.read().quota_throttled_ns == 30_000
    opened = len(os.listdir("/proc/self/fd"))
    made.write(made.root / "7" / "cgroup", "0::/other\n")
    assert made.read().quota_throttled_ns == 7_000
    assert before < len(os.listdir("/proc/self/fd")) <= opened


def test_thermal_state_is_throttled_once_a_count_has_grown(make: Callable[..., Made]) -> None:
    """Not by what was counted before the first reading; without the files, as in a virtual machine, it is unknown."""
    made = make(V2_HOST)
    assert made.read().thermal_level is None
    made.reader.close()
    for number in range(2):
        for kind in ("core", "package"):
            made.write(made.cpus / f"cpu{number}" / "thermal_throttle" / f"{kind}_throttle_count", "5\n")
    assert [made.read().thermal_level for _ in range(2)] == [THERMAL_STATES.index("nominal")] * 2
    made.write(made.cpus / "cpu1" / "thermal_throttle" / "core_throttle_count", "6\n")
    assert [made.read().thermal_level for _ in range(2)] == [THERMAL_STATES.index("throttled")] * 2
