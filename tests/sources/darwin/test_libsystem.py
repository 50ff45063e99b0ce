"""The calls of libSystem: what is released, what is refused, and how errors are named."""

import ctypes
import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.darwin.abi import zig
from support.darwin.simulator import SHORT_REPLY, Simulator
from support.sidecars import eventually
from support.target import OwnWorkload
from vitalsd.sources.base import UnsupportedError
from vitalsd.sources.darwin.apple_headers import (
    MACH_TASK_BASIC_INFO,
    PROC_PIDTASKALLINFO,
    PROC_PIDTHREADID64INFO,
    PROC_PIDVNODEPATHINFO,
    TASK_ABSOLUTETIME_INFO,
    THREAD_EXTENDED_INFO,
    THREAD_IDENTIFIER_INFO,
    mach_task_basic_info,
    proc_taskallinfo,
    rusage_info_v6,
    task_absolutetime_info,
)
from vitalsd.sources.darwin.functions import FUNCTIONS, MachError, bind, mach_error
from vitalsd.sources.darwin.libsystem import load
from vitalsd.sources.darwin.thread_rows import ThreadRows

KERN_FAILURE = 5
KERN_RESOURCE_SHORTAGE = 6
NO_PATH = -2
"""As the code of a fault: PROC_PIDVNODEPATHINFO succeeds with an empty path."""


@pytest.fixture(scope="module")
def stub_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library with all the symbols and no hash table that would notice a rename."""
    directory = tmp_path_factory.mktemp("stub")
    source = directory / "stub.c"
    source.write_text(
        "unsigned mach_task_self_ = 259;\n" + "".join(f"long {name}(void) {{ return 0; }}\n" for name in FUNCTIONS)
    )
    built = zig(
        "build-lib", "-dynamic", "-lc", "-fPIC", "-fno-compiler-rt", "-fno-ubsan-rt", "-O", "ReleaseFast",
        source, f"-femit-bin={directory / 'stub.so'}", cache=directory / "zig",
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    return directory


class TestLoading:
    def test_load_of_a_missing_library_is_unsupported_with_its_path(self, tmp_path: Path) -> None:
        """`UnsupportedError`, with its path."""
        with pytest.raises(UnsupportedError, match=re.escape(f"cannot load libSystem: {tmp_path}")):
            load(str(tmp_path / "libSystem.dylib"))

    def test_load_of_a_file_that_is_no_library_is_unsupported(self, tmp_path: Path) -> None:
        """`UnsupportedError`, and the loader's own words."""
        (tmp_path / "libSystem.dylib").write_text("no library")
        with pytest.raises(UnsupportedError, match=r"cannot load libSystem: .*libSystem\.dylib"):
            load(str(tmp_path / "libSystem.dylib"))

    @pytest.mark.parametrize("missing", [*FUNCTIONS, "mach_task_self_"])
    def test_load_without_a_symbol_is_unsupported_with_its_name(
        self, missing: str, stub_directory: Path, tmp_path: Path
    ) -> None:
        """`UnsupportedError`, and its name: each single one is looked for."""
        library = tmp_path / "stub.so"
        stub = (stub_directory / "stub.so").read_bytes()
        # In place, so that no offset in the file moves.
        assert stub.count(b"\0" + missing.encode() + b"\0") >= 1
        library.write_bytes(stub.replace(b"\0" + missing.encode() + b"\0", b"\0" + b"_" * len(missing) + b"\0"))
        with pytest.raises(UnsupportedError, match=f"libSystem lacks a symbol: .*{missing}"):
            load(str(library))

    @pytest.mark.skipif(sys.platform == "darwin", reason="there it is no other system")
    def test_load_on_linux_names_what_is_missing(self) -> None:
        """On Linux the module imports, and loading says what is missing."""
        with pytest.raises(UnsupportedError, match="mach_task_self_"):
            load()

    def test_import_of_libsystem_loads_no_library(self) -> None:
        """No dlopen and no ctypes call before `load`."""
        code = (
            "import sys, ctypes\n"
            "def refuse(event, arguments):\n"
            "    assert not event.startswith('ctypes.dlopen'), arguments\n"
            "sys.addaudithook(refuse)\n"
            "import vitalsd.sources.darwin.processes\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


class TestThreadPorts:
    """The `simulator` fixture fails each of these if a reference or an array is still owed afterwards."""

    def test_thread_ports_after_the_body_are_released_once(self, simulator: Simulator) -> None:
        """Each once, and the array."""
        with simulator.lib.mach.thread_ports() as ports:
            assert simulator.arrays == 1
            assert simulator.references_owed == len(ports)

    def test_thread_ports_are_released_if_the_body_raises(self, simulator: Simulator) -> None:
        """And the error of the body is the one that is seen."""
        with pytest.raises(KeyboardInterrupt), simulator.lib.mach.thread_ports():
            raise KeyboardInterrupt

    @pytest.mark.parametrize("at", [1, 5, 9])
    def test_thread_ports_are_released_if_a_read_fails(self, simulator: Simulator, at: int) -> None:
        """Whichever thread it was, and nothing is returned."""
        simulator.fault("thread_info", KERN_FAILURE, at=at)
        threads = OwnWorkload()
        for i in range(8):
            threads.start_thread(f"t{i}")
        with (
            pytest.raises(MachError, match=r"thread_info\(THREAD_EXTENDED_INFO\) failed: .* failure \(0x5\)"),
            simulator.lib.mach.thread_ports() as ports,
        ):
            simulator.lib.mach.thread_infos(ports, ThreadRows())
        threads.close()

    def test_thread_ports_null_or_dead_are_not_released(self, simulator: Simulator) -> None:
        """A name of 0 or MACH_PORT_DEAD is nobody's; the others are released all the same."""
        simulator.hide_real_threads()
        simulator.reap_delay(5)
        for tid in range(1, 9):
            simulator.add_thread(tid << 40)
            simulator.end_thread(tid << 40, shown_as=tid % 4)
        simulator.fault("mach_port_deallocate", KERN_FAILURE, at=5)
        with simulator.lib.mach.thread_ports() as ports:
            assert len(ports) == 8
        assert simulator.references_owed == 0

    def test_thread_ports_after_a_failed_task_threads_are_none(self, simulator: Simulator) -> None:
        """``task_threads`` failed: the code is named and nothing is released."""
        simulator.fault("task_threads", KERN_RESOURCE_SHORTAGE)
        with (
            pytest.raises(MachError, match=re.escape("task_threads failed: (os/kern) resource shortage (0x6)")),
            simulator.lib.mach.thread_ports(),
        ):
            raise AssertionError("there is no list to work on")

    def test_thread_ports_after_a_failed_release_release_the_others(self, lawless_simulator: Simulator) -> None:
        """The failure is an error, and only that one reference is lost."""
        threads = OwnWorkload()
        for i in range(4):
            threads.start_thread(f"t{i}")
        lawless_simulator.fault("mach_port_deallocate", KERN_FAILURE, at=2)
        with pytest.raises(MachError, match="mach_port_deallocate failed"), lawless_simulator.lib.mach.thread_ports():
            pass
        assert (lawless_simulator.references_owed, lawless_simulator.arrays) == (1, 0)
        threads.close()

    def test_thread_ports_array_not_freed_is_an_error(self, lawless_simulator: Simulator) -> None:
        """With the ports released before it."""
        lawless_simulator.fault("vm_deallocate", KERN_FAILURE)
        with pytest.raises(MachError, match="vm_deallocate failed"), lawless_simulator.lib.mach.thread_ports():
            pass
        assert (lawless_simulator.references_owed, lawless_simulator.arrays) == (0, 1)


class TestHostPort:
    """The `simulator` fixture fails each of these if the host port or the array is still owed afterwards."""

    @pytest.mark.parametrize(
        ("method", "function"), [("busy_ticks", "host_processor_info"), ("memory", "host_statistics64")]
    )
    def test_host_port_after_a_failed_call_is_released(self, simulator: Simulator, method: str, function: str) -> None:
        """And the code is named."""
        simulator.fault(function, KERN_FAILURE)
        with pytest.raises(MachError, match=rf"{function} failed: .* failure \(0x5\)"):
            getattr(simulator.lib.statistics, method)()
        assert simulator.references_owed == 0

    @pytest.mark.parametrize("method", ["busy_ticks", "memory"])
    def test_host_port_that_is_not_released_is_an_error(self, lawless_simulator: Simulator, method: str) -> None:
        """With the array freed all the same."""
        lawless_simulator.fault("mach_port_deallocate", KERN_FAILURE)
        with pytest.raises(MachError, match="mach_port_deallocate failed"):
            getattr(lawless_simulator.lib.statistics, method)()
        assert (lawless_simulator.references_owed, lawless_simulator.arrays) == (1, 0)

    def test_host_port_that_the_kernel_refuses_is_an_error(self, simulator: Simulator) -> None:
        """MACH_PORT_NULL is not released."""
        simulator.fault("mach_host_self", 1)
        with pytest.raises(MachError, match="mach_host_self gives no port"):
            simulator.lib.statistics.memory()

    def test_processor_array_of_another_size_is_an_error(self, simulator: Simulator) -> None:
        """And is freed as long as it is."""
        simulator.fault("host_processor_info", SHORT_REPLY)
        with pytest.raises(MachError, match=r"host_processor_info answered \d+ words for \d+ processors"):
            simulator.lib.statistics.busy_ticks()
        assert simulator.arrays == 0


class TestErrors:
    @pytest.mark.parametrize(
        ("flavor", "info", "name"),
        [
            (TASK_ABSOLUTETIME_INFO, task_absolutetime_info, "TASK_ABSOLUTETIME_INFO"),
            (MACH_TASK_BASIC_INFO, mach_task_basic_info, "MACH_TASK_BASIC_INFO"),
        ],
    )
    def test_task_info_error_names_flavor_and_code(
        self, simulator: Simulator, flavor: int, info: type[ctypes.Structure], name: str
    ) -> None:
        """In words and as a number; a short reply in words of 4 bytes."""
        simulator.fault("task_info", 4, flavor=flavor)
        with pytest.raises(MachError, match=re.escape(f"{name}: task_info failed: (os/kern) invalid argument (0x4)")):
            simulator.lib.mach.task_info(info())
        simulator.clear_faults()
        words = ctypes.sizeof(info) // 4
        simulator.fault("task_info", SHORT_REPLY, flavor=flavor)
        with pytest.raises(MachError, match=f"{name}: task_info answered {words - 1} words of {words}"):
            simulator.lib.mach.task_info(info())

    @pytest.mark.parametrize(
        ("flavor", "text"),
        [
            (THREAD_EXTENDED_INFO, "thread_info(THREAD_EXTENDED_INFO) answered 27 words of 28"),
            (THREAD_IDENTIFIER_INFO, "thread_info(THREAD_IDENTIFIER_INFO) answered 5 words of 6"),
        ],
    )
    def test_thread_info_short_reply_is_an_error(self, simulator: Simulator, flavor: int, text: str) -> None:
        """Never a thread with half of its fields."""
        simulator.fault("thread_info", SHORT_REPLY, flavor=flavor)
        with pytest.raises(MachError, match=re.escape(text)), simulator.lib.mach.thread_ports() as ports:
            simulator.lib.mach.thread_infos(ports, ThreadRows())

    def test_task_info_after_a_short_reply_asks_for_the_full_count(self, simulator: Simulator) -> None:
        """The count the kernel wrote does not become the count asked for."""
        rows = ThreadRows()
        simulator.fault("thread_info", SHORT_REPLY)
        with pytest.raises(MachError), simulator.lib.mach.thread_ports() as ports:
            simulator.lib.mach.thread_infos(ports, rows)
        with simulator.lib.mach.thread_ports() as ports:
            assert os.getpid() in simulator.lib.mach.thread_infos(ports, rows)

    def test_proc_pidinfo_error_raises_by_errno_with_the_flavor(self, simulator: Simulator) -> None:
        """With the flavor in the text, and Python's own subclass where there is one."""
        with pytest.raises(ProcessLookupError, match=r"proc_pidinfo\(PROC_PIDTASKALLINFO\) failed"):
            simulator.lib.proc.info(2**30, proc_taskallinfo())
        simulator.fault("proc_pidinfo", errno.EPERM, flavor=PROC_PIDTASKALLINFO)
        with pytest.raises(PermissionError, match=r"proc_pidinfo\(PROC_PIDTASKALLINFO\) failed"):
            simulator.lib.proc.info(os.getpid(), proc_taskallinfo())
        with pytest.raises(OSError, match="proc_pid_rusage failed: Invalid argument"):
            simulator.lib.proc.rusage(os.getpid(), rusage_info_v6(), 99)
        simulator.fault("proc_listallpids", errno.ENOMEM)
        with pytest.raises(OSError, match="proc_listallpids failed"):
            simulator.lib.proc.pids()

    def test_proc_pidinfo_short_process_reply_is_an_error(self, simulator: Simulator) -> None:
        """In bytes, with the flavor."""
        simulator.fault("proc_pidinfo", SHORT_REPLY, flavor=PROC_PIDTASKALLINFO)
        with pytest.raises(MachError, match=re.escape("proc_pidinfo(PROC_PIDTASKALLINFO) answered 228 bytes of 232")):
            simulator.lib.proc.info(os.getpid(), proc_taskallinfo())

    def test_proc_pidinfo_short_or_refused_thread_reply_is_an_error(self, simulator: Simulator) -> None:
        """But one that has ended is an answer."""
        lib, pid, rows = simulator.lib, os.getpid(), ThreadRows()
        assert lib.proc.thread_infos(pid, [pid], rows) == [pid]
        assert lib.proc.thread_infos(pid, [2**40, pid, 2**32 + pid], rows) == [0, pid, 0]
        simulator.fault("proc_pidinfo", SHORT_REPLY, flavor=PROC_PIDTHREADID64INFO, every=1)
        with pytest.raises(MachError, match="answered 108 bytes of 112"):
            lib.proc.thread_infos(pid, [pid], rows)
        simulator.clear_faults()
        simulator.fault("proc_pidinfo", errno.EPERM, flavor=PROC_PIDTHREADID64INFO, every=1)
        with pytest.raises(PermissionError, match="PROC_PIDTHREADID64INFO"):
            lib.proc.thread_infos(pid, [pid], rows)

    def test_procargs_return_the_command_line_without_the_environment(self, simulator: Simulator) -> None:
        """Every word of it, empty ones too, and nothing of what follows; EINVAL whoever may not be read."""
        words = [b"cat", b"-u", b"", b"two words", "\u00fcml\u00e4ut".encode(), b""]
        with subprocess.Popen(
            [*words, "-"], executable="/bin/cat", env={"TOKEN": "secret"}, stdin=subprocess.PIPE
        ) as child:
            told = os.path.realpath("/bin/cat"), [*words, b"-"]
            eventually(lambda: simulator.lib.proc.command_line(child.pid) == told)
            simulator.caller_euid(os.geteuid() + 12345)
            with pytest.raises(OSError, match=r"sysctl\(KERN_PROCARGS2\)") as refused:
                simulator.lib.proc.command_line(child.pid)
            assert refused.value.errno == errno.EINVAL
            child.kill()

    def test_working_directory_of_our_own_process_is_that_of_getcwd(
        self, simulator: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Read it at each call, and decode a byte that is not UTF-8 as Python decodes file names."""
        assert simulator.lib.proc.working_directory(os.getpid()) == os.getcwd()
        directory = tmp_path / os.fsdecode(b"\xfc ml\xc3\xa4ut")
        directory.mkdir()
        monkeypatch.chdir(directory)
        assert simulator.lib.proc.working_directory(os.getpid()) == os.getcwd() == str(directory.resolve())

    def test_working_directory_of_a_child_is_the_one_it_changed_to(self, simulator: Simulator, tmp_path: Path) -> None:
        """Read it as of the call, not of the start; ESRCH for the zombie and after its parent has collected it."""
        lib = simulator.lib
        started, changed = tmp_path.resolve() / "started", tmp_path.resolve() / "changed"
        started.mkdir()
        changed.mkdir()
        code = "import os, sys; input(); os.chdir(sys.argv[1]); print(flush=True); input()"
        with subprocess.Popen(
            [sys.executable, "-c", code, changed], cwd=started, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            assert lib.proc.working_directory(child.pid) == str(started)
            child.stdin.write(b"\n")
            child.stdin.flush()
            child.stdout.readline()
            assert lib.proc.working_directory(child.pid) == str(changed)
            child.kill()
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # type: ignore[attr-defined, unused-ignore]
            with pytest.raises(ProcessLookupError, match=r"proc_pidinfo\(PROC_PIDVNODEPATHINFO\) failed"):
                lib.proc.working_directory(child.pid)
        with pytest.raises(ProcessLookupError, match=r"proc_pidinfo\(PROC_PIDVNODEPATHINFO\) failed"):
            lib.proc.working_directory(child.pid)

    def test_working_directory_of_another_users_process_is_eperm(self, simulator: Simulator) -> None:
        """Refuse each caller but the user of the process and root."""
        simulator.caller_euid(os.geteuid() + 12345)
        with pytest.raises(PermissionError, match=r"proc_pidinfo\(PROC_PIDVNODEPATHINFO\) failed"):
            simulator.lib.proc.working_directory(os.getpid())
        simulator.caller_euid(0)
        assert simulator.lib.proc.working_directory(os.getpid()) == os.getcwd()

    def test_working_directory_without_a_path_is_enoent(self, simulator: Simulator) -> None:
        """Reject the empty path with which the kernel reports success if it has no name for the directory."""
        simulator.fault("proc_pidinfo", NO_PATH, flavor=PROC_PIDVNODEPATHINFO)
        with pytest.raises(FileNotFoundError, match=r"proc_pidinfo\(PROC_PIDVNODEPATHINFO\) failed: No such file"):
            simulator.lib.proc.working_directory(os.getpid())

    def test_working_directory_of_a_call_that_fails_raises_its_error(self, simulator: Simulator) -> None:
        """Raise each errno as `OSError`, that of a file system too; a reply shorter than the struct is `MachError`."""
        for code in (errno.ESRCH, errno.EPERM, errno.EACCES, errno.EIO):
            simulator.fault("proc_pidinfo", code, flavor=PROC_PIDVNODEPATHINFO)
            with pytest.raises(OSError, match=r"proc_pidinfo\(PROC_PIDVNODEPATHINFO\) failed") as failed:
                simulator.lib.proc.working_directory(os.getpid())
            assert failed.value.errno == code
        simulator.fault("proc_pidinfo", SHORT_REPLY, flavor=PROC_PIDVNODEPATHINFO)
        short = "proc_pidinfo(PROC_PIDVNODEPATHINFO) answered 2348 bytes of 2352"
        with pytest.raises(MachError, match=re.escape(short)):
            simulator.lib.proc.working_directory(os.getpid())
        assert simulator.lib.proc.working_directory(os.getpid()) == os.getcwd()

    def test_port_name_of_32_bits_is_passed_whole(self, simulator: Simulator) -> None:
        """Names have 32 bits, and the upper half of them is not negative."""
        with simulator.lib.mach.thread_ports() as ports:
            found = simulator.lib.mach.thread_infos([0xFFFF_FF03, *ports, 0x8000_0000 | ports[0]], ThreadRows())
        assert (found[0], found[-1]) == (0, 0)
        assert 0 not in found[1:-1]

    def test_error_of_an_unknown_code_has_its_number(self, simulator: Simulator) -> None:
        """The library has no words for it."""
        library = ctypes.PyDLL(simulator.path)
        bind(library)
        assert str(mach_error(library, "task_info", 0x1234)) == "task_info failed: unknown error code (0x1234)"

    def test_sysctl_integer_of_another_size_is_an_error(self, simulator: Simulator) -> None:
        """The boot's UUID has 37 bytes."""
        with pytest.raises(MachError, match=r"sysctlbyname\(kern.bootsessionuuid\) answered 37 bytes"):
            simulator.lib.host.sysctl_int("kern.bootsessionuuid")


def test_list_of_children_that_fills_its_buffer_is_read_again(simulator: Simulator) -> None:
    """It is cut without a mark; an error is not an empty list."""
    children = [subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) for _ in range(70)]
    try:
        found = simulator.lib.proc.children(os.getpid())
        assert {child.pid for child in children} <= set(found)
        assert found == sorted(found)
        simulator.fault("proc_listchildpids", errno.EPERM)
        with pytest.raises(PermissionError, match="proc_listchildpids failed: Operation not permitted"):
            simulator.lib.proc.children(os.getpid())
    finally:
        for child in children:
            child.communicate()


def test_process_list_that_fills_its_buffer_is_read_again(simulator: Simulator) -> None:
    """Also if more are born than the estimate had room for: a list that fills its buffer is not believed."""
    pids = simulator.lib.proc.pids()
    assert pids == sorted(pids)
    assert {os.getpid(), os.getppid()} <= set(pids)
    # 32 are added to the estimate; a buffer of none would be an empty list.
    children = [subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) for _ in range(40)]
    try:
        simulator.pid_estimate(1)
        assert {child.pid for child in children} <= set(simulator.lib.proc.pids())
    finally:
        for child in children:
            child.communicate()
