"""The simulator against the rules of XNU, one by one; the sections cited are those of docs/macos-proof.md."""

import ctypes
import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from support.darwin.simulator import Simulator
from support.sidecars import eventually
from support.target import OwnWorkload
from vitalsd.sources.darwin.apple_headers import (
    CPU_STATE_MAX,
    CPU_STATE_NICE,
    HOST_VM_INFO64,
    KERN_INVALID_ARGUMENT,
    KERN_SUCCESS,
    KERN_TERMINATED,
    MACH_PORT_DEAD,
    MACH_PORT_NULL,
    MACH_SEND_INVALID_DEST,
    MACH_TASK_BASIC_INFO,
    PROC_PIDLISTTHREADIDS,
    PROC_PIDT_SHORTBSDINFO,
    PROC_PIDTASKALLINFO,
    PROC_PIDTHREADID64INFO,
    PROC_PIDVNODEPATHINFO,
    PROCESSOR_CPU_LOAD_INFO,
    RUSAGE_INFO_V2,
    RUSAGE_INFO_V4,
    RUSAGE_INFO_V6,
    SZOMB,
    TASK_ABSOLUTETIME_INFO,
    TASK_VM_INFO,
    THREAD_EXTENDED_INFO,
    THREAD_IDENTIFIER_INFO,
    loadavg,
    mach_task_basic_info,
    proc_bsdshortinfo,
    proc_taskallinfo,
    proc_threadinfo,
    proc_vnodepathinfo,
    rusage_info_v2,
    rusage_info_v4,
    rusage_info_v6,
    task_absolutetime_info,
    task_vm_info,
    thread_extended_info,
    thread_identifier_info,
    vm_statistics64,
    xsw_usage,
)
from vitalsd.sources.darwin.functions import MachError

assert sys.platform != "darwin" or not TYPE_CHECKING

TASK = 0x103
BURN_NS = 30_000_000
TICKS_PER_S = 24_000_000


def call_task_info(
    simulator: Simulator, flavor: int, info: ctypes.Structure, words: int | None = None
) -> tuple[int, int]:
    """Code and count out."""
    count = ctypes.c_uint32(ctypes.sizeof(info) // 4 if words is None else words)
    code = simulator.function("task_info")(TASK, flavor, ctypes.addressof(info), ctypes.addressof(count))
    return code, count.value


def call_thread_info(
    simulator: Simulator, port: int, flavor: int, info: ctypes.Structure, words: int | None = None
) -> tuple[int, int]:
    count = ctypes.c_uint32(ctypes.sizeof(info) // 4 if words is None else words)
    code = simulator.function("thread_info")(port, flavor, ctypes.addressof(info), ctypes.addressof(count))
    return code, count.value


def list_threads(simulator: Simulator) -> tuple[list[int], int]:
    """Entries, and the address of the array."""
    array, count = ctypes.POINTER(ctypes.c_uint32)(), ctypes.c_uint32()
    assert simulator.function("task_threads")(TASK, ctypes.addressof(array), ctypes.addressof(count)) == KERN_SUCCESS
    return array[: count.value], ctypes.cast(array, ctypes.c_void_p).value or 0


def release(simulator: Simulator, ports: list[int], address: int, size: int | None = None) -> None:
    for port in ports:
        assert simulator.function("mach_port_deallocate")(TASK, port) == KERN_SUCCESS
    size = 4 * len(ports) if size is None else size
    assert simulator.function("vm_deallocate")(TASK, address, size) == KERN_SUCCESS


def references(simulator: Simulator, port: int) -> int:
    return simulator.lib.mach.send_references(port)


def port_of(simulator: Simulator, ports: list[int], tid: int) -> int:
    for port in ports:
        info = thread_identifier_info()
        if call_thread_info(simulator, port, THREAD_IDENTIFIER_INFO, info)[0] == 0 and info.thread_id == tid:
            return port
    raise AssertionError(f"{tid} is not listed")


def call_pidinfo(
    simulator: Simulator, pid: int, flavor: int, arg: int, info: object, size: int | None = None
) -> tuple[int, int]:
    """Result and errno."""
    ctypes.set_errno(0)
    size = ctypes.sizeof(info) if size is None else size  # type: ignore[arg-type]
    result = simulator.function("proc_pidinfo")(pid, flavor, arg, ctypes.addressof(info), size)  # type: ignore[arg-type]
    return result, ctypes.get_errno()


@contextmanager
def workload() -> Iterator[OwnWorkload]:
    threads = OwnWorkload()
    try:
        yield threads
    finally:
        threads.close()


class TestTask:
    """docs/macos-proof.md, section 1."""

    @pytest.mark.parametrize(
        ("flavor", "info"),
        [(TASK_ABSOLUTETIME_INFO, task_absolutetime_info), (MACH_TASK_BASIC_INFO, mach_task_basic_info)],
    )
    def test_task_info_count_below_the_flavor_is_refused(
        self, simulator: Simulator, flavor: int, info: type[ctypes.Structure]
    ) -> None:
        """Counts are words, in and out: one less is KERN_INVALID_ARGUMENT, more is answered by the true one (§1)."""
        words = ctypes.sizeof(info) // 4
        assert call_task_info(simulator, flavor, info(), words - 1)[0] == KERN_INVALID_ARGUMENT
        assert call_task_info(simulator, flavor, info(), words) == (KERN_SUCCESS, words)

        class roomy(ctypes.Structure):
            _fields_ = (("info", info), ("more", ctypes.c_uint32 * 4))

        assert call_task_info(simulator, flavor, roomy()) == (KERN_SUCCESS, words)

    def test_task_info_unknown_flavor_is_refused(self, simulator: Simulator) -> None:
        """KERN_INVALID_ARGUMENT (§1)."""
        assert call_task_info(simulator, 999, task_vm_info())[0] == KERN_INVALID_ARGUMENT

    def test_mach_task_basic_info_has_times_of_terminated_threads_only(self, simulator: Simulator) -> None:
        """A busy living thread is not in MACH_TASK_BASIC_INFO; once it has ended, all of it is (§1, key trap)."""

        def basic_ns() -> int:
            info = mach_task_basic_info()
            assert call_task_info(simulator, MACH_TASK_BASIC_INFO, info)[0] == KERN_SUCCESS
            return sum(t.seconds * 10**9 + t.microseconds * 1000 for t in (info.user_time, info.system_time))

        with workload() as threads:
            tid = threads.start_thread("busy")
            before = basic_ns()
            used = threads.burn(tid, BURN_NS)
            assert basic_ns() - before < used // 100  # microseconds of the kernel, rounded anew at each call
            threads.end_thread(tid)
            eventually(lambda: basic_ns() - before >= used)  # joined is not yet reaped

    def test_task_absolutetime_info_has_total_and_living_in_24_mhz_ticks(self, simulator: Simulator) -> None:
        """TASK_ABSOLUTETIME_INFO.total_* is what the process used, live and terminated (§1)."""
        info = task_absolutetime_info()
        before = time.process_time_ns()
        assert call_task_info(simulator, TASK_ABSOLUTETIME_INFO, info)[0] == KERN_SUCCESS
        after = time.process_time_ns()
        total = info.total_user + info.total_system
        assert before <= (total + 2) * 10**9 // TICKS_PER_S
        assert total * 10**9 // TICKS_PER_S <= after
        assert info.threads_user + info.threads_system <= total

    def test_ended_thread_counts_as_living_until_reaped(self, simulator: Simulator) -> None:
        """Its time stays with the living until then, and the total never falls meanwhile (§1, atomicity)."""

        def times() -> tuple[int, int]:
            info = task_absolutetime_info()
            call_task_info(simulator, TASK_ABSOLUTETIME_INFO, info)
            total = info.total_user + info.total_system
            return total, total - info.threads_user - info.threads_system

        simulator.reap_delay(2)
        with workload() as threads:
            tid = threads.start_thread("brief")
            release(simulator, *list_threads(simulator))
            used = threads.burn(tid, BURN_NS)
            total, exited = times()
            threads.end_thread(tid)
            for still in (True, True, False):
                release(simulator, *list_threads(simulator))
                before, total = total, times()[0]
                assert total >= before
                grown = (times()[1] - exited) * 10**9 // TICKS_PER_S
                assert (grown < used // 2) is still

    def test_task_vm_info_ends_at_the_end_of_the_buffer(self, lawless_simulator: Simulator) -> None:
        """36 words have no footprint, 38 have; above 93 the kernel logs each call (§1, TASK_VM_INFO)."""
        info = task_vm_info()
        assert call_task_info(lawless_simulator, TASK_VM_INFO, info, 35)[0] == KERN_INVALID_ARGUMENT
        assert call_task_info(lawless_simulator, TASK_VM_INFO, info, 36) == (KERN_SUCCESS, 36)
        assert info.phys_footprint == 0
        assert call_task_info(lawless_simulator, TASK_VM_INFO, info, 38) == (KERN_SUCCESS, 38)
        assert 0 < info.phys_footprint <= info.resident_size <= info.virtual_size
        assert lawless_simulator.violations == []
        call_task_info(lawless_simulator, TASK_VM_INFO, info, 94)
        assert "macOS 15 logs each such call" in lawless_simulator.violations[0]

    def test_task_info_of_a_name_that_is_no_task_port_is_invalid_dest(self, simulator: Simulator) -> None:
        """A name that is no task port: MACH_SEND_INVALID_DEST (§1)."""
        count = ctypes.c_uint32(8)
        info = task_absolutetime_info()
        code = simulator.function("task_info")(TASK + 4, 1, ctypes.addressof(info), ctypes.addressof(count))
        assert code == MACH_SEND_INVALID_DEST


class TestThreads:
    """docs/macos-proof.md, section 2."""

    def test_task_threads_twice_has_twice_the_references(self, simulator: Simulator) -> None:
        """Two lists have the same names, and twice the references to give back (§2, lifecycle)."""
        first, second = list_threads(simulator), list_threads(simulator)
        assert first[0] == second[0]
        assert first[1] != second[1]
        assert references(simulator, first[0][0]) == 3  # libpthread's own, and ours
        assert simulator.references_owed == 2 * len(first[0])
        release(simulator, *first)
        assert references(simulator, second[0][0]) == 2
        release(simulator, *second)

    def test_task_threads_lists_a_dying_thread_without_a_port(self, simulator: Simulator) -> None:
        """As MACH_PORT_NULL or MACH_PORT_DEAD, and to release those is right and does nothing (§2)."""
        simulator.hide_real_threads()
        simulator.reap_delay(3)
        for tid, shown_as in ((1 << 40, 0), (2 << 40, 1)):
            simulator.add_thread(tid)
            simulator.end_thread(tid, shown_as=shown_as)
        ports, address = list_threads(simulator)
        assert ports == [MACH_PORT_NULL, MACH_PORT_DEAD]
        release(simulator, ports, address)
        for port in ports:
            assert (
                call_thread_info(simulator, port, THREAD_EXTENDED_INFO, thread_extended_info())[0]
                == MACH_SEND_INVALID_DEST
            )

    @pytest.mark.parametrize(("shown_as", "code"), [(2, KERN_TERMINATED), (3, KERN_INVALID_ARGUMENT)])
    def test_thread_info_of_a_dying_thread_with_a_port_is_an_error(
        self, simulator: Simulator, shown_as: int, code: int
    ) -> None:
        """Inactive: KERN_TERMINATED, detached: KERN_INVALID_ARGUMENT; the reference is to be released (§2)."""
        simulator.hide_real_threads()
        simulator.reap_delay(3)
        simulator.add_thread(1 << 40)
        simulator.end_thread(1 << 40, shown_as=shown_as)
        ports, address = list_threads(simulator)
        for flavor, info in (
            (THREAD_EXTENDED_INFO, thread_extended_info),
            (THREAD_IDENTIFIER_INFO, thread_identifier_info),
        ):
            assert call_thread_info(simulator, ports[0], flavor, info())[0] == code
        assert simulator.references_owed == 1
        release(simulator, ports, address)

    def test_thread_info_of_a_thread_that_ended_is_a_dead_name(self, simulator: Simulator) -> None:
        """MACH_SEND_INVALID_DEST, and the name stays until its reference is released (§2)."""
        with workload() as threads:
            tid = threads.start_thread("brief")
            in_use = simulator.lib.mach.ports_in_use()
            ports, address = list_threads(simulator)
            port = port_of(simulator, ports, tid)
            threads.end_thread(tid)
            assert (
                call_thread_info(simulator, port, THREAD_EXTENDED_INFO, thread_extended_info())[0]
                == MACH_SEND_INVALID_DEST
            )
            assert simulator.lib.mach.ports_in_use() == in_use
            release(simulator, ports, address)
            assert simulator.lib.mach.ports_in_use() == in_use - 1

    def test_port_reference_not_released_is_a_leaked_name(self, lawless_simulator: Simulator) -> None:
        """It does not show while the thread lives: references coalesce; afterwards it does (§6)."""
        with workload() as threads:
            tid = threads.start_thread("brief")
            before = lawless_simulator.lib.mach.ports_in_use()
            list_threads(lawless_simulator)
            assert lawless_simulator.lib.mach.ports_in_use() == before
            threads.end_thread(tid)
            assert lawless_simulator.lib.mach.ports_in_use() == before
            assert lawless_simulator.references_owed > 0
            assert lawless_simulator.arrays == 1

    def test_port_release_of_an_invalid_name_is_a_violation(self, lawless_simulator: Simulator) -> None:
        """The guard kGUARD_EXC_INVALID_NAME (§2, never over-release)."""
        with workload() as threads:
            tid = threads.start_thread("brief")
            ports, address = list_threads(lawless_simulator)
            port = port_of(lawless_simulator, ports, tid)
            threads.end_thread(tid)
            release(lawless_simulator, ports, address)
            assert lawless_simulator.violations == []
            assert lawless_simulator.function("mach_port_deallocate")(TASK, port) != KERN_SUCCESS
            assert "kGUARD_EXC_INVALID_NAME" in lawless_simulator.violations[0]

    def test_port_release_of_the_last_reference_is_a_violation(self, lawless_simulator: Simulator) -> None:
        """The guard kGUARD_EXC_MOD_REFS, fatal for a pinned port (§2)."""
        ports, address = list_threads(lawless_simulator)
        release(lawless_simulator, ports, address)
        assert lawless_simulator.function("mach_port_deallocate")(TASK, ports[0]) != KERN_SUCCESS
        assert "kGUARD_EXC_MOD_REFS" in lawless_simulator.violations[0]

    def test_vm_deallocate_with_the_wrong_size_is_a_violation(self, lawless_simulator: Simulator) -> None:
        """Elements are 4 bytes wide; 8 frees what is not ours (§2)."""
        ports, address = list_threads(lawless_simulator)
        lawless_simulator.function("vm_deallocate")(TASK, address, 8 * len(ports))
        assert lawless_simulator.violations == [f"vm_deallocate of {8 * len(ports)} bytes, not {4 * len(ports)}"]

    def test_vm_deallocate_twice_is_a_violation(self, lawless_simulator: Simulator) -> None:
        """By then the address may be somebody else's (§2)."""
        ports, address = list_threads(lawless_simulator)
        release(lawless_simulator, ports, address)
        assert lawless_simulator.function("vm_deallocate")(TASK, address, 4 * len(ports)) == KERN_INVALID_ARGUMENT
        assert "for the second time" in lawless_simulator.violations[0]

    def test_thread_extended_info_times_are_ns_cut_to_us(self, simulator: Simulator) -> None:
        """Of the thread, to the microsecond, user and system (§2, THREAD_EXTENDED_INFO)."""
        with workload() as threads:
            tid = threads.start_thread("worker")
            used = threads.burn(tid, BURN_NS)
            ports, address = list_threads(simulator)
            info = thread_extended_info()
            assert call_thread_info(simulator, port_of(simulator, ports, tid), THREAD_EXTENDED_INFO, info) == (0, 28)
            release(simulator, ports, address)
            assert info.pth_user_time % 1000 == info.pth_system_time % 1000 == 0
            assert info.pth_user_time + info.pth_system_time + 2000 >= used
            assert info.pth_name == b"worker"

    @pytest.mark.parametrize(("flavor", "words"), [(THREAD_EXTENDED_INFO, 28), (THREAD_IDENTIFIER_INFO, 6)])
    def test_thread_info_count_below_the_flavor_is_refused(self, simulator: Simulator, flavor: int, words: int) -> None:
        """As for the task (§2)."""
        ports, address = list_threads(simulator)
        info = thread_extended_info()
        assert call_thread_info(simulator, ports[0], flavor, info, words - 1)[0] == KERN_INVALID_ARGUMENT
        assert call_thread_info(simulator, ports[0], flavor, info, 28) == (KERN_SUCCESS, words)
        assert call_thread_info(simulator, ports[0], 99, info)[0] == KERN_INVALID_ARGUMENT
        release(simulator, ports, address)

    def test_thread_name_above_63_bytes_is_enametoolong(self, simulator: Simulator) -> None:
        """More is ENAMETOOLONG, so that the NUL always fits (§2)."""
        assert simulator.set_own_thread_name(b"x" * 64) == errno.ENAMETOOLONG
        assert simulator.set_own_thread_name(b"x" * 63) == 0
        ports, address = list_threads(simulator)
        info = thread_extended_info()
        port = port_of(simulator, ports, threading.get_native_id())
        assert call_thread_info(simulator, port, THREAD_EXTENDED_INFO, info)[0] == KERN_SUCCESS
        assert bytes(info)[48:] == b"x" * 63 + b"\0"
        release(simulator, ports, address)

    def test_port_table_counts_each_thread_once(self, simulator: Simulator) -> None:
        """The table of names counts each thread once (§6)."""
        before = simulator.lib.mach.ports_in_use()
        with workload() as threads:
            for i in range(10):
                threads.start_thread(f"t{i}")
            assert simulator.lib.mach.ports_in_use() == before + 10
        assert simulator.lib.mach.ports_in_use() == before


class TestProcesses:
    """docs/macos-proof.md, sections 3 and 7."""

    @pytest.fixture
    def child(self) -> Iterator[subprocess.Popen[bytes]]:
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
            yield child
            child.kill()

    def test_proc_pidinfo_error_is_zero_with_errno(self, simulator: Simulator, child: subprocess.Popen[bytes]) -> None:
        """Too small ENOMEM, unknown flavor EINVAL, unknown process or thread ESRCH (§3)."""
        info = proc_taskallinfo()
        assert call_pidinfo(simulator, child.pid, PROC_PIDTASKALLINFO, 0, info, 231) == (0, errno.ENOMEM)
        assert call_pidinfo(simulator, child.pid, PROC_PIDTASKALLINFO, 0, info) == (232, 0)
        assert call_pidinfo(simulator, child.pid, 99, 0, info) == (0, errno.EINVAL)
        assert call_pidinfo(simulator, 2**30, PROC_PIDTASKALLINFO, 0, info) == (0, errno.ESRCH)
        assert call_pidinfo(simulator, child.pid, PROC_PIDTHREADID64INFO, 2**40, info) == (0, errno.ESRCH)

    def test_proc_pidinfo_of_another_users_process_is_eperm(
        self, simulator: Simulator, child: subprocess.Popen[bytes]
    ) -> None:
        """Another's process is EPERM, but for the flavors that tell nothing secret (§3)."""
        simulator.caller_euid(os.geteuid() + 12345)
        assert call_pidinfo(simulator, child.pid, PROC_PIDTASKALLINFO, 0, proc_taskallinfo()) == (0, errno.EPERM)
        assert call_pidinfo(simulator, child.pid, PROC_PIDLISTTHREADIDS, 0, (ctypes.c_uint64 * 9)()) == (0, errno.EPERM)
        assert call_pidinfo(simulator, child.pid, PROC_PIDT_SHORTBSDINFO, 0, proc_bsdshortinfo()) == (64, 0)
        with pytest.raises(PermissionError):
            simulator.lib.proc.rusage(child.pid, rusage_info_v6(), RUSAGE_INFO_V6)
        simulator.caller_euid(0)
        assert call_pidinfo(simulator, child.pid, PROC_PIDTASKALLINFO, 0, proc_taskallinfo()) == (232, 0)

    def test_proc_pidinfo_of_a_zombie_is_esrch_except_shortbsdinfo(
        self, simulator: Simulator, child: subprocess.Popen[bytes]
    ) -> None:
        """ESRCH for a live process's flavors; SHORTBSDINFO with arg 1 and proc_pid_rusage answer (§3)."""
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # type: ignore[attr-defined, unused-ignore]
        brief, usage = proc_bsdshortinfo(), rusage_info_v6()
        assert call_pidinfo(simulator, child.pid, PROC_PIDTASKALLINFO, 0, proc_taskallinfo()) == (0, errno.ESRCH)
        assert call_pidinfo(simulator, child.pid, PROC_PIDLISTTHREADIDS, 0, (ctypes.c_uint64 * 9)()) == (0, errno.ESRCH)
        assert call_pidinfo(simulator, child.pid, PROC_PIDT_SHORTBSDINFO, 0, brief) == (0, errno.ESRCH)
        assert call_pidinfo(simulator, child.pid, PROC_PIDT_SHORTBSDINFO, 1, brief) == (64, 0)
        assert brief.pbsi_status == SZOMB
        simulator.lib.proc.rusage(child.pid, usage, RUSAGE_INFO_V6)
        assert (usage.ri_phys_footprint, usage.ri_proc_exit_abstime > 0) == (0, True)

    def test_proc_pidlistthreadids_ends_at_the_end_of_the_buffer(self, simulator: Simulator) -> None:
        """Silently: a full buffer means that there may be more (§3, truncation)."""
        with workload() as threads:
            for i in range(8):
                threads.start_thread(f"t{i}")
            all_ = (ctypes.c_uint64 * 64)()
            size, _ = call_pidinfo(simulator, os.getpid(), PROC_PIDLISTTHREADIDS, 0, all_)
            assert set(all_[: size // 8]) == {int(tid) for tid in os.listdir("/proc/self/task")}
            few = (ctypes.c_uint64 * 3)()
            assert call_pidinfo(simulator, os.getpid(), PROC_PIDLISTTHREADIDS, 0, few) == (24, 0)
            assert call_pidinfo(simulator, os.getpid(), PROC_PIDLISTTHREADIDS, 0, few, 7) == (0, errno.ENOMEM)

    def test_proc_pidlistthreadids_of_a_burst_has_ten_more_at_most(self, simulator: Simulator) -> None:
        """The number plus ten is taken before the list is made, whatever the buffer (§3, truncation)."""
        ids = (ctypes.c_uint64 * 64)()
        before, _ = call_pidinfo(simulator, os.getpid(), PROC_PIDLISTTHREADIDS, 0, ids)
        with workload() as threads:
            for i in range(15):
                threads.start_thread(f"t{i}")
            size, _ = call_pidinfo(simulator, os.getpid(), PROC_PIDLISTTHREADIDS, 0, ids)
            assert size == before + 10 * 8
            size, _ = call_pidinfo(simulator, os.getpid(), PROC_PIDLISTTHREADIDS, 0, ids)
            assert size == before + 15 * 8

    def test_proc_pidlistthreadids_lists_an_ended_thread_until_reaped(self, simulator: Simulator) -> None:
        """With its final times; then it is ESRCH (§3)."""
        simulator.reap_delay(2)
        simulator.add_thread(7 << 32, user_ns=5_000_000, name=b"late")
        simulator.end_thread(7 << 32, shown_as=0)
        ids, info = (ctypes.c_uint64 * 64)(), proc_threadinfo()
        call_pidinfo(simulator, os.getpid(), PROC_PIDLISTTHREADIDS, 0, ids)
        assert 7 << 32 in ids
        assert call_pidinfo(simulator, os.getpid(), PROC_PIDTHREADID64INFO, 7 << 32, info) == (112, 0)
        assert (info.pth_run_state, info.pth_user_time, info.pth_name) == (5, 5_000_000, b"late")
        for _ in range(2):
            ids = (ctypes.c_uint64 * 64)()
            call_pidinfo(simulator, os.getpid(), PROC_PIDLISTTHREADIDS, 0, ids)
        assert 7 << 32 not in ids
        assert call_pidinfo(simulator, os.getpid(), PROC_PIDTHREADID64INFO, 7 << 32, info) == (0, errno.ESRCH)

    def test_vnodepathinfo_of_a_process_that_may_be_read_is_its_directory(
        self, simulator: Simulator, child: subprocess.Popen[bytes]
    ) -> None:
        """Fill in path and attributes; less room is ENOMEM, another user's process EPERM, a zombie ESRCH (§3)."""
        info = proc_vnodepathinfo()
        assert call_pidinfo(simulator, child.pid, PROC_PIDVNODEPATHINFO, 0, info, 2351) == (0, errno.ENOMEM)
        assert call_pidinfo(simulator, child.pid, PROC_PIDVNODEPATHINFO, 0, info) == (2352, 0)
        here = os.stat(".")
        assert os.fsdecode(info.pvi_cdir.vip_path) == os.getcwd()
        assert info.pvi_cdir.vip_vi.vi_stat.vst_ino == here.st_ino
        assert info.pvi_cdir.vip_vi.vi_stat.vst_mode == here.st_mode
        assert not any(bytes(info.pvi_rdir))
        simulator.caller_euid(os.geteuid() + 12345)
        assert call_pidinfo(simulator, child.pid, PROC_PIDVNODEPATHINFO, 0, info) == (0, errno.EPERM)
        simulator.caller_euid(0)
        assert call_pidinfo(simulator, child.pid, PROC_PIDVNODEPATHINFO, 0, info) == (2352, 0)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # type: ignore[attr-defined, unused-ignore]
        assert call_pidinfo(simulator, child.pid, PROC_PIDVNODEPATHINFO, 1, info) == (0, errno.ESRCH)

    def test_vnodepathinfo_of_a_long_path_is_its_end(self, simulator: Simulator, tmp_path: Path) -> None:
        """Answer 1023 bytes whole; of a path of 1024 bytes leave out the first name, and report success (§3)."""
        info = proc_vnodepathinfo()
        fits = tmp_path.resolve()
        while len(os.fsencode(fits)) < 1023:
            left = 1022 - len(os.fsencode(fits))
            fits /= "x" * (left if left <= 200 else 100)
        exceeds = fits.with_name(fits.name + "x")
        for directory in (fits, exceeds):
            directory.mkdir(parents=True)
            with subprocess.Popen(["/bin/cat"], cwd=directory, stdin=subprocess.PIPE) as child:
                assert call_pidinfo(simulator, child.pid, PROC_PIDVNODEPATHINFO, 0, info) == (2352, 0)
                told = os.fsdecode(info.pvi_cdir.vip_path)
                child.kill()
            assert told == (str(directory) if directory == fits else "/" + "/".join(directory.parts[2:]))

    def test_vnodepathinfo_of_a_removed_directory_is_its_last_path(self, simulator: Simulator, tmp_path: Path) -> None:
        """Use the name in the kernel's cache, which removing the directory leaves there (§3)."""
        info, directory = proc_vnodepathinfo(), tmp_path.resolve() / "removed"
        directory.mkdir()
        with subprocess.Popen(["/bin/cat"], cwd=directory, stdin=subprocess.PIPE) as child:
            directory.rmdir()
            assert call_pidinfo(simulator, child.pid, PROC_PIDVNODEPATHINFO, 0, info) == (2352, 0)
            assert os.fsdecode(info.pvi_cdir.vip_path) == str(directory)
            child.kill()

    def test_vnodepathinfo_of_a_process_without_its_main_thread_is_its_directory(
        self, simulator: Simulator, tmp_path: Path
    ) -> None:
        """Answer as long as one thread lives; the directory belongs to the process (§3)."""
        code = (
            "import ctypes, os, threading\n"
            "threading.Thread(target=os.read, args=(0, 1)).start()\n"
            "ctypes.CDLL(None).pthread_exit(None)\n"
        )
        info = proc_vnodepathinfo()
        with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdin=subprocess.PIPE) as child:
            status = Path(f"/proc/{child.pid}/task/{child.pid}/stat")
            eventually(lambda: status.read_text().rpartition(")")[2].split()[0] == "Z")
            assert call_pidinfo(simulator, child.pid, PROC_PIDVNODEPATHINFO, 0, info)[0] == 2352
            assert os.fsdecode(info.pvi_cdir.vip_path) == str(tmp_path.resolve())
            child.kill()

    def test_proc_pid_rusage_writes_its_whole_flavor(
        self, simulator: Simulator, child: subprocess.Popen[bytes]
    ) -> None:
        """160 bytes of V2, 296 of V4, 464 of V6, whatever room there is; a newer flavor than known is EINVAL (§3)."""
        buffer = (ctypes.c_uint8 * 512)(*[0xAA] * 512)
        call = simulator.function("proc_pid_rusage")
        for flavor, struct in (
            (RUSAGE_INFO_V2, rusage_info_v2), (RUSAGE_INFO_V4, rusage_info_v4), (RUSAGE_INFO_V6, rusage_info_v6)
        ):  # fmt: skip
            assert call(child.pid, flavor, ctypes.addressof(buffer)) == 0
            size = ctypes.sizeof(struct)
            assert bytes(buffer[size - 8 : size]) != b"\xaa" * 8
            assert bytes(buffer[size:]) == b"\xaa" * (512 - size)
            buffer[:size] = [0xAA] * size
        simulator.newest_rusage(RUSAGE_INFO_V4)
        ctypes.set_errno(0)
        assert call(child.pid, RUSAGE_INFO_V6, ctypes.addressof(buffer)) == -1
        assert ctypes.get_errno() == errno.EINVAL

    def test_rusage_of_a_zombie_has_its_final_times_until_its_parent_waits(self, simulator: Simulator) -> None:
        """The parent's ``ri_child_*`` grows when it waits, by what the child and its children used (§3)."""
        code = "import time; any(time.process_time() > 0.1 for _ in iter(int, 1))"
        own, ended = rusage_info_v4(), rusage_info_v4()
        simulator.lib.proc.rusage(os.getpid(), own, RUSAGE_INFO_V4)
        before = own.ri_child_user_time + own.ri_child_system_time
        with subprocess.Popen([sys.executable, "-c", code]) as child:
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # type: ignore[attr-defined, unused-ignore]
            simulator.lib.proc.rusage(child.pid, ended, RUSAGE_INFO_V4)
            used = ended.ri_user_time + ended.ri_system_time
            assert ended.ri_proc_exit_abstime > 0
            assert used >= TICKS_PER_S // 10
            simulator.lib.proc.rusage(os.getpid(), own, RUSAGE_INFO_V4)
            assert own.ri_child_user_time + own.ri_child_system_time == before
        simulator.lib.proc.rusage(os.getpid(), own, RUSAGE_INFO_V4)
        grown = own.ri_child_user_time + own.ri_child_system_time - before
        assert abs(grown - used) <= TICKS_PER_S // 50  # Linux books whole ticks of 10 ms
        with pytest.raises(ProcessLookupError):
            simulator.lib.proc.rusage(child.pid, ended, RUSAGE_INFO_V4)

    def test_runnable_time_is_cpu_time_and_wait(self, simulator: Simulator, child: subprocess.Popen[bytes]) -> None:
        """Of all threads, in ticks; a running thread's is behind its CPU time by a quantum at most (§3)."""
        usage = rusage_info_v4()

        def waited() -> int:
            simulator.lib.proc.rusage(child.pid, usage, RUSAGE_INFO_V4)
            return int(usage.ri_runnable_time - usage.ri_user_time - usage.ri_system_time)

        before = waited()
        simulator.wait(child.pid, 10**9)
        assert TICKS_PER_S - 100 <= waited() - before <= 60 * TICKS_PER_S
        simulator.runnable_lag(1_000_000)
        assert -TICKS_PER_S // 1000 - 2 <= waited() < 0

    def test_proc_listchildpids_lists_zombies_and_cuts_the_list(
        self, simulator: Simulator, child: subprocess.Popen[bytes]
    ) -> None:
        """Children alone; a process that is gone has none, which is no error; without a buffer an estimate (§7)."""
        call = simulator.function("proc_listchildpids")
        with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as zombie:
            zombie.kill()
            os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)  # type: ignore[attr-defined, unused-ignore]
            assert {child.pid, zombie.pid} <= set(simulator.lib.proc.children(os.getpid()))
            pids = (ctypes.c_int32 * 1)()
            assert call(os.getpid(), ctypes.addressof(pids), 4) == 1
            assert call(os.getpid(), ctypes.addressof(pids), 3) == 0
            assert ctypes.get_errno() == errno.ENOMEM
        ctypes.set_errno(0)
        assert call(child.pid, ctypes.addressof(pids), 4) == call(2**30, ctypes.addressof(pids), 4) == 0
        assert ctypes.get_errno() == 0
        assert call(child.pid, None, 0) > 20
        assert os.getpid() not in simulator.lib.proc.children(os.getpid())

    def test_proc_listallpids_estimates_and_cuts_the_list(self, simulator: Simulator) -> None:
        """Without a buffer the number and 20 more; with one as many as fit (§7)."""
        call = simulator.function("proc_listallpids")
        estimate = call(None, 0)
        pids = (ctypes.c_int32 * estimate)()
        number = call(ctypes.addressof(pids), ctypes.sizeof(pids))
        assert os.getpid() in pids[:number]
        assert number < estimate
        assert call(ctypes.addressof(pids), 4) == 1

    def test_procargs2_with_a_short_buffer_returns_the_end(self, simulator: Simulator) -> None:
        """Which is the environment; more room than arguments may take is EINVAL, as is a pid of nobody (§7)."""
        call, oid = simulator.function("sysctl"), (ctypes.c_int * 3)(1, 49, 0)

        def ask(pid: int, room: int) -> tuple[int, bytes]:
            oid[2] = pid
            buffer, size = ctypes.create_string_buffer(room), ctypes.c_size_t(room)
            ctypes.set_errno(0)
            code = call(ctypes.addressof(oid), 3, ctypes.addressof(buffer), ctypes.addressof(size), None, 0)
            return (ctypes.get_errno(), b"") if code else (0, buffer.raw[: size.value])

        with subprocess.Popen(["/bin/cat", "-u"], env={"A": "1", "B": "2"}, stdin=subprocess.PIPE) as child:
            eventually(lambda: b"/cat" in ask(child.pid, 4 + 1024 * 1024)[1])  # exec is over
            code, whole = ask(child.pid, 4 + 1024 * 1024)
            assert code == 0
            assert whole[:4] == (2).to_bytes(4, sys.byteorder)
            path = os.path.realpath("/bin/cat").encode()
            assert whole[4:].startswith(path + b"\0")
            assert whole.endswith(b"\0/bin/cat\0-u\0A=1\0B=2\0")
            assert ask(child.pid, 4 + 8) == (0, whole[:4] + b"A=1\0B=2\0")
            assert ask(child.pid, 5 + 1024 * 1024) == (errno.EINVAL, b"")
            assert ask(child.pid, 4) == (errno.EINVAL, b"")
            child.kill()
        assert ask(2**30, 4096) == (errno.EINVAL, b"")


class TestClocks:
    """docs/macos-proof.md, sections 4 and 5."""

    def test_mach_continuous_time_alone_includes_sleep(self, simulator: Simulator) -> None:
        """mach_continuous_time adds the time slept, mach_absolute_time stops (§4)."""
        absolute, continuous = simulator.lib.host.absolute_ns(), simulator.lib.host.continuous_ns()
        simulator.sleep(3600 * 10**9)
        assert simulator.lib.host.continuous_ns() - continuous >= 3600 * 10**9
        assert simulator.lib.host.absolute_ns() - absolute < 3600 * 10**9

    def test_rosetta_changes_user_space_clocks_and_no_kernel_ticks(self, simulator: Simulator) -> None:
        """A timebase of 1/1, clocks in ns, and kernel ticks as before (§5)."""
        timebase = (ctypes.c_uint32 * 2)()
        timebase_info, absolute = simulator.function("mach_timebase_info"), simulator.function("mach_absolute_time")
        assert (timebase_info(ctypes.addressof(timebase)), timebase[0], timebase[1]) == (0, 125, 3)
        native = absolute()
        simulator.rosetta()
        assert (timebase_info(ctypes.addressof(timebase)), timebase[0], timebase[1]) == (0, 1, 1)
        assert absolute() > 40 * native
        assert simulator.lib.host.sysctl_int("hw.tbfrequency") == TICKS_PER_S
        info = task_absolutetime_info()
        call_task_info(simulator, TASK_ABSOLUTETIME_INFO, info)
        assert info.total_user + info.total_system <= time.process_time_ns() * 3 // 125

    def test_sysctl_of_an_unknown_name_is_enoent(self, simulator: Simulator) -> None:
        """And hw.tbfrequency is an integer of 8 bytes (§5)."""
        assert simulator.lib.host.sysctl("hw.tbfrequency") == (24_000_000).to_bytes(8, "little")
        with pytest.raises(FileNotFoundError, match=r"sysctlbyname\(hw.vitals\)"):
            simulator.lib.host.sysctl("hw.vitals")


class TestMachine:
    """docs/macos-proof.md, section 11."""

    def test_mach_host_self_adds_a_reference_each_time(self, lawless_simulator: Simulator) -> None:
        """All have one name, so that the number of names does not show them (§11)."""
        call, release_ = (lawless_simulator.function(name) for name in ("mach_host_self", "mach_port_deallocate"))
        in_use, held = lawless_simulator.lib.mach.ports_in_use(), lawless_simulator.lib.statistics.references()
        port = call()
        assert call() == port
        assert references(lawless_simulator, port) == held + 1  # the reading itself had one
        assert lawless_simulator.references_owed == 2
        assert lawless_simulator.lib.mach.ports_in_use() == in_use
        assert [release_(TASK, port) for _ in range(2)] == [KERN_SUCCESS] * 2
        assert lawless_simulator.violations == []
        assert release_(TASK, port) != KERN_SUCCESS
        assert "another library holds" in lawless_simulator.violations[0]

    def test_host_processor_info_returns_an_array_to_free(self, simulator: Simulator) -> None:
        """Four counters of 1/100 s for each processor; without a host port MACH_SEND_INVALID_DEST (§11)."""
        processors, count, array = ctypes.c_uint32(), ctypes.c_uint32(), ctypes.POINTER(ctypes.c_uint32)()
        replies = [ctypes.addressof(each) for each in (processors, array, count)]
        call = simulator.function("host_processor_info")
        assert call(0, PROCESSOR_CPU_LOAD_INFO, *replies) == MACH_SEND_INVALID_DEST
        port = simulator.function("mach_host_self")()
        assert call(port, 99, *replies) == KERN_INVALID_ARGUMENT
        assert call(port, PROCESSOR_CPU_LOAD_INFO, *replies) == KERN_SUCCESS
        assert (processors.value, count.value) == (os.cpu_count(), 4 * (os.cpu_count() or 0))
        words = array[: count.value]
        assert min(words[:2]) > 0
        assert set(words[CPU_STATE_NICE::CPU_STATE_MAX]) == {0}
        release(simulator, [port], ctypes.cast(array, ctypes.c_void_p).value or 0, 4 * count.value)

    def test_host_statistics64_ends_at_the_end_of_the_buffer(self, simulator: Simulator) -> None:
        """24 words are the oldest revision, less is KERN_FAILURE (§11)."""
        pages, call, port = (
            vm_statistics64(), simulator.function("host_statistics64"), simulator.function("mach_host_self")()
        )  # fmt: skip

        def ask(words: int, flavor: int = HOST_VM_INFO64) -> tuple[int, int]:
            count = ctypes.c_uint32(words)
            return call(port, flavor, ctypes.addressof(pages), ctypes.addressof(count)), count.value

        assert ask(23)[0] == 5
        assert ask(37) == (KERN_SUCCESS, 24)
        assert pages.external_page_count == 0
        assert ask(38) == ask(400) == (KERN_SUCCESS, 38)
        assert pages.external_page_count > 0
        assert pages.free_count >= pages.speculative_count
        assert ask(38, 99)[0] == KERN_INVALID_ARGUMENT
        simulator.function("mach_port_deallocate")(TASK, port)

    def test_host_statistics64_repeats_an_answer_within_a_second(self, simulator: Simulator) -> None:
        """All programs together get 2 to 10 answers in a second (§11)."""
        amounts = []
        for free in range(40):
            simulator.memory(free=free, speculative=0, external=1, purgeable=0)
            amounts.append(simulator.lib.statistics.memory().free_count)
        assert amounts[:2] == [0, 1]
        assert any(later == earlier for earlier, later in pairwise(amounts))
        eventually(lambda: simulator.lib.statistics.memory().free_count == 39)

    def test_sysctls_of_the_machine_are_structs(self, simulator: Simulator) -> None:
        """Of 24 and 32 bytes, and integers of 4 (§11)."""
        host = simulator.lib.host
        load, swap = host.sysctl_struct("vm.loadavg", loadavg), host.sysctl_struct("vm.swapusage", xsw_usage)
        assert load.fscale == 2048
        assert swap.xsu_total == swap.xsu_avail + swap.xsu_used
        assert swap.xsu_pagesize == 16384
        assert host.sysctl("kern.memorystatus_vm_pressure_level") == (1).to_bytes(4, "little")
        assert host.sysctl_int("hw.ncpu") == os.cpu_count()
        with pytest.raises(MachError, match=r"sysctlbyname\(vm.loadavg\) answered 24 bytes of 32"):
            host.sysctl_struct("vm.loadavg", xsw_usage)


def test_injected_fault_occurs_at_the_requested_call(simulator: Simulator) -> None:
    """At the n-th, and then each m-th."""
    simulator.fault("task_info", 5, flavor=TASK_ABSOLUTETIME_INFO, at=2, every=3)
    codes = [call_task_info(simulator, TASK_ABSOLUTETIME_INFO, task_absolutetime_info())[0] for _ in range(9)]
    assert codes == [0, 5, 0, 0, 5, 0, 0, 5, 0]
    assert call_task_info(simulator, MACH_TASK_BASIC_INFO, mach_task_basic_info())[0] == KERN_SUCCESS
    simulator.clear_faults()
    assert call_task_info(simulator, TASK_ABSOLUTETIME_INFO, task_absolutetime_info())[0] == KERN_SUCCESS
