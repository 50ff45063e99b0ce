"""Build the simulated libSystem (``libsystem_sim.c``), and control it from tests."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from support.darwin.abi import zig
from support.paths import SUPPORT
from vitalsd.sources.darwin.functions import FUNCTIONS
from vitalsd.sources.darwin.libsystem import LibSystem, load

__all__ = ["SHORT_REPLY", "Simulator", "build"]

SHORT_REPLY = -1
"""Code of a fault: the call succeeds with a reply that is one word too short."""

SOURCES = (
    Path(__file__).with_name("libsystem_sim.c"),
    SUPPORT / "launchd_stub.c",
)


def build(directory: Path) -> Path:
    """Compile the library for this machine into `directory`, and keep the compiler's cache there too."""
    library = directory / "libsystem_sim.so"
    compiled = zig(
        "build-lib", "-dynamic", "-lc", "-fPIC", "-O", "ReleaseFast", "-fno-compiler-rt", "-fno-ubsan-rt",
        "-cflags", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "--", *SOURCES, f"-femit-bin={library}",
        cache=directory / "zig",
    )  # fmt: skip
    if compiled.returncode:
        raise subprocess.SubprocessError(compiled.stderr)
    return library


class Simulator:
    """
    Load a copy of the library: a new kernel without port names, arrays, faults and violations.

    Args:
        library: path returned by `build`; it is copied, because two users of one file share its variables.
        directory: directory for the copy.
    """

    def __init__(self, library: Path, directory: Path) -> None:
        self.path = str(shutil.copy(library, directory / f"libsystem_{len(os.listdir(directory))}.so"))
        self.lib: LibSystem = load(self.path)
        self._raw = ctypes.PyDLL(self.path, use_errno=True)
        for name, restype, *argtypes in (
            ("sim_fault", None, ctypes.c_char_p, ctypes.c_int, ctypes.c_long, ctypes.c_long, ctypes.c_long),
            ("sim_clear_faults", None),
            ("sim_violations", ctypes.c_long),
            ("sim_violation", ctypes.c_char_p, ctypes.c_long),
            ("sim_arrays", ctypes.c_long),
            ("sim_references_owed", ctypes.c_long),
            ("sim_sleep", None, ctypes.c_longlong),
            ("sim_rosetta", None, ctypes.c_int),
            ("sim_tbfrequency", None, ctypes.c_longlong),
            ("sim_perf_levels", None, ctypes.c_longlong),
            (
                "sim_memory", None, ctypes.c_longlong, ctypes.c_longlong, ctypes.c_longlong, ctypes.c_longlong,
            ),
            ("sim_pressure_level", None, ctypes.c_longlong),
            ("sim_hide_sysctl", None, ctypes.c_char_p),
            ("sim_wait", None, ctypes.c_long, ctypes.c_longlong),
            ("sim_reap", None, ctypes.c_long, ctypes.c_longlong),
            ("sim_runnable_lag", None, ctypes.c_longlong),
            ("sim_reap_delay", None, ctypes.c_long),
            ("sim_hide_real_threads", None),
            (
                "sim_add_thread", None, ctypes.c_uint64, ctypes.c_longlong, ctypes.c_longlong, ctypes.c_char_p,
                ctypes.c_int,
            ),
            ("sim_advance_thread", None, ctypes.c_uint64, ctypes.c_longlong, ctypes.c_longlong),
            ("sim_realtime", None, ctypes.c_uint64),
            ("sim_end_thread", None, ctypes.c_uint64, ctypes.c_int),
            ("sim_pthread_setname_np", ctypes.c_int, ctypes.c_char_p),
            ("sim_caller_euid", None, ctypes.c_long),
            ("sim_newest_rusage", None, ctypes.c_int),
            ("sim_teardown", None, ctypes.c_longlong),
            ("sim_reuse_pid", None, ctypes.c_long, ctypes.c_longlong),
            ("sim_pid_estimate", None, ctypes.c_long),
            ("sim_exec", None, ctypes.c_long),
            ("sim_cost_in_c", ctypes.c_longlong),
            ("sim_nothing_cost_in_c", ctypes.c_longlong, ctypes.c_long),
        ):  # fmt: skip
            function = getattr(self._raw, str(name))
            function.restype = restype
            function.argtypes = argtypes

    def fault(self, function: str, code: int, *, flavor: int = -1, at: int = 1, every: int = 0) -> None:
        """Let call number `at` of `function` fail with `code`, and then each `every`-th (0: no more)."""
        self._raw.sim_fault(function.encode(), flavor, at, every, code)

    def clear_faults(self) -> None:
        """Remove all faults."""
        self._raw.sim_clear_faults()

    @property
    def violations(self) -> list[str]:
        """Return the broken rules of the kernel; each would have killed the process, corrupted memory or leaked."""
        number = self._raw.sim_violations()
        return [self._raw.sim_violation(i).decode() for i in range(number)]

    @property
    def arrays(self) -> int:
        """Return the number of arrays of `task_threads` that were not released."""
        return int(self._raw.sim_arrays())

    @property
    def references_owed(self) -> int:
        """Return the number of port references that were not released."""
        return int(self._raw.sim_references_owed())

    def sleep(self, ns: int) -> None:
        """Simulate a sleep of the machine, as its clocks show it."""
        self._raw.sim_sleep(ns)

    def rosetta(self) -> None:
        """Translate this process by Rosetta from now on; load the library again to see it."""
        self._raw.sim_rosetta(1)

    def state_tick_frequency(self, stated: int) -> None:
        """Set the value of ``hw.tbfrequency``; 0: there is none. The ticks stay at 24 MHz."""
        self._raw.sim_tbfrequency(stated)

    def perf_levels(self, levels: int) -> None:
        """Set the number of performance levels of the CPU."""
        self._raw.sim_perf_levels(levels)

    def memory(self, *, free: int, speculative: int, external: int, purgeable: int) -> None:
        """Set the pages of the machine; `free` without the speculative ones."""
        self._raw.sim_memory(free, speculative, external, purgeable)

    def pressure_level(self, level: int) -> None:
        """Set the value of ``kern.memorystatus_vm_pressure_level``."""
        self._raw.sim_pressure_level(level)

    def hide_sysctl(self, name: str) -> None:
        """Let there be no variable of this name; only one at a time is hidden."""
        self._raw.sim_hide_sysctl(name.encode())

    def wait(self, pid: int, ns: int) -> None:
        """Let the threads of a process have waited for a CPU."""
        self._raw.sim_wait(pid, ns)

    def reap(self, pid: int, ns: int) -> None:
        """Let a process have waited for children with this CPU time."""
        self._raw.sim_reap(pid, ns)

    def runnable_lag(self, ns: int) -> None:
        """Set how far the runnable time of a process is behind its CPU time."""
        self._raw.sim_runnable_lag(ns)

    def reap_delay(self, lists: int) -> None:
        """Set the number of lists of threads in which an ended thread still appears."""
        self._raw.sim_reap_delay(lists)

    def hide_real_threads(self) -> None:
        """Hide all threads but those of `add_thread`."""
        self._raw.sim_hide_real_threads()

    def add_thread(
        self, tid: int, *, user_ns: int = 0, system_ns: int = 0, name: bytes = b"", run_state: int = 3
    ) -> None:
        """Add a simulated thread."""
        self._raw.sim_add_thread(tid, user_ns, system_ns, name, run_state)

    def advance_thread(self, tid: int, *, user_ns: int = 0, system_ns: int = 0) -> None:
        """Let a simulated thread use CPU time."""
        self._raw.sim_advance_thread(tid, user_ns, system_ns)

    def make_realtime(self, tid: int) -> None:
        """Give a thread of `add_thread` a time constraint policy."""
        self._raw.sim_realtime(tid)

    def end_thread(self, tid: int, *, shown_as: int) -> None:
        """End a thread; until it is reaped it is 0: no port, 1: MACH_PORT_DEAD, 2: inactive, 3: detached."""
        self._raw.sim_end_thread(tid, shown_as)

    def set_own_thread_name(self, name: bytes) -> int:
        """Name the calling thread as ``pthread_setname_np`` of macOS does; return 0 or an errno."""
        return int(self._raw.sim_pthread_setname_np(name))

    def caller_euid(self, euid: int) -> None:
        """Check permissions as for this user."""
        self._raw.sim_caller_euid(euid)

    def newest_rusage(self, flavor: int) -> None:
        """Set the newest flavor of ``proc_pid_rusage`` that the kernel knows."""
        self._raw.sim_newest_rusage(flavor)

    def teardown(self, ns: int) -> None:
        """Set the time of the teardown of a process, from the first ESRCH to NOTE_EXIT, ns."""
        self._raw.sim_teardown(ns)

    def reuse_pid(self, pid: int) -> None:
        """Reuse the pid for a process that started an hour later."""
        self._raw.sim_reuse_pid(pid, 3600)

    def pid_estimate(self, pids: int) -> None:
        """Set the estimated number of processes, as before some more were started."""
        self._raw.sim_pid_estimate(pids)

    def exec(self, pid: int) -> None:
        """Let the process execute a program."""
        self._raw.sim_exec(pid)

    def function(self, name: str) -> Any:
        """Return a function of libSystem without its error check."""
        function = getattr(self._raw, name)
        if name in FUNCTIONS:
            function.argtypes, function.restype = FUNCTIONS[name].argtypes, FUNCTIONS[name].restype
        return function
