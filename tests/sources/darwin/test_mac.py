"""
What only the kernel of a Mac can show; docs/macos-proof.md says why of each.

The contract suite (``tests/sources/test_source_contract.py``) runs on the same kernel.
"""

import ctypes
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from support.sidecars import eventually
from vitalsd.sidecar.socket_activation import inherited
from vitalsd.sidecar.tcp_listener import bind_tcp
from vitalsd.snapshot import Part, measure
from vitalsd.sources.base import AccessDeniedError, ExitStatus, KernelError, TargetGoneError
from vitalsd.sources.darwin.apple_headers import mach_task_basic_info, proc_taskallinfo, rusage_info_v6
from vitalsd.sources.darwin.libproc_source import LibprocSource
from vitalsd.sources.darwin.libsystem import load
from vitalsd.sources.darwin.mach_source import MachSource
from vitalsd.sources.programs import ProgramDigest

pytestmark = pytest.mark.mac


def burn(cpu_ns: int) -> None:
    begun = time.thread_time_ns()
    while time.thread_time_ns() - begun < cpu_ns:
        pass


def test_snapshots_during_thread_churn_leak_no_port_or_descriptor() -> None:
    """A thousand snapshots while threads come and go: as many as before, once the threads have ended."""
    lib = load()
    source = MachSource(lib=lib)
    source.snapshot(parts=Part.DETAIL)
    before = lib.mach.ports_in_use(), len(os.listdir("/dev/fd"))
    for _ in range(1000):
        thread = threading.Thread(target=time.sleep, args=(0.0005,))
        thread.start()
        source.snapshot(parts=Part.DETAIL)
        thread.join()
    time.sleep(0.5)  # the reaper is late
    source.snapshot()
    ports, descriptors = lib.mach.ports_in_use(), len(os.listdir("/dev/fd"))
    assert ports <= before[0] + 2
    assert descriptors == before[1]


def test_snapshots_leak_no_reference_on_a_living_thread() -> None:
    """References on a name coalesce, so a leak would not show in the number of ports."""
    lib = load()
    source = MachSource(lib=lib)
    with lib.mach.thread_ports() as ports:
        port = ports[0]
        before = lib.mach.send_references(port)
    for _ in range(100):
        source.snapshot()
    with lib.mach.thread_ports() as ports:
        assert lib.mach.send_references(port) == before


def test_command_line_of_the_own_process_is_read(tmp_path: Path) -> None:
    """The words of our own, as the interpreter got them; a framework build has another name for itself."""
    _, words = load().proc.command_line(os.getpid())
    assert [os.fsdecode(word) for word in words[1:]] == sys.orig_argv[1:]
    script = tmp_path / "app.py"
    script.write_text("import sys; print(flush=True); sys.stdin.readline()", encoding="utf-8")
    with subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert LibprocSource(child.pid, program_of=ProgramDigest(b"k" * 32)).identity().program != ""
        child.kill()


def test_working_directory_of_a_child_is_the_one_it_changed_to(tmp_path: Path) -> None:
    """Compare files and not names: the kernel resolves links, and ``os.getcwd`` may name another of two paths."""
    lib = load()
    assert os.path.samefile(lib.proc.working_directory(os.getpid()), os.curdir)
    code = "import os, sys; os.chdir(sys.argv[1]); print(flush=True); sys.stdin.readline()"
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        directory = lib.proc.working_directory(child.pid)
        child.kill()
    assert os.path.isabs(directory)
    assert os.path.samefile(directory, tmp_path)
    with pytest.raises(ProcessLookupError):
        lib.proc.working_directory(child.pid)


def test_ticks_agree_with_getrusage() -> None:
    """``hw.tbfrequency`` and getrusage agree, also in a process translated by Rosetta."""
    source = MachSource()
    burn(100_000_000)
    snapshot = source.snapshot()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used_ns = (usage.ru_utime + usage.ru_stime) * 1e9
    assert snapshot.warnings == ()
    assert 0.8 * used_ns <= snapshot.cpu_ns <= used_ns * 1.05


def test_mach_task_basic_info_excludes_living_threads() -> None:
    """The trap of MACH_TASK_BASIC_INFO, and the reason why the total is read elsewhere."""
    lib = load()
    info = mach_task_basic_info()
    lib.mach.task_info(info)
    before = info.user_time.seconds * 1_000_000 + info.user_time.microseconds
    source = MachSource(lib=lib)
    first = source.snapshot()
    burn(300_000_000)
    lib.mach.task_info(info)
    after = info.user_time.seconds * 1_000_000 + info.user_time.microseconds
    assert after - before < 150_000
    assert measure(first, source.snapshot()).cpu_ns > 250_000_000


def test_mach_and_libproc_of_the_own_process_agree() -> None:
    """Mach and libproc: the same threads, names and, to a quantum, the same times."""
    mach, libproc = MachSource(), LibprocSource(os.getpid())
    assert mach.identity() == libproc.identity()
    a, b = mach.snapshot(parts=Part.DETAIL), libproc.snapshot(parts=Part.DETAIL)
    assert a.roster.tids == b.roster.tids
    assert a.roster.names == b.roster.names
    assert abs(a.cpu_ns - b.cpu_ns) < 50_000_000
    assert abs(a.uptime_ns - b.uptime_ns) < 50_000_000
    assert a.figures is not None
    assert b.figures is not None
    assert a.figures.footprint_bytes
    assert b.figures.footprint_bytes


def test_thread_id_equals_the_native_id_of_python() -> None:
    """``thread_id`` is what threading.get_native_id() says."""
    assert threading.get_native_id() in MachSource().snapshot().roster.tids


@pytest.mark.parametrize(
    ("code", "exit_status"),
    [
        ("", ExitStatus(True, "exit status 0")),
        ("sys.exit(3)", ExitStatus(False, "exit status 3")),
        ("os.kill(os.getpid(), 15)", ExitStatus(True, "killed by SIGTERM")),
        ("os.kill(os.getpid(), 9)", ExitStatus(False, "killed by SIGKILL")),
    ],
)
def test_exit_status_of_a_process_that_is_no_child_is_known(code: str, exit_status: ExitStatus) -> None:
    """kqueue(2) reports it to each process that may kill the target, in contrast to sys/event.h."""
    program = f"import os, sys; print(os.getpid(), flush=True); sys.stdin.readline(); {code}"
    script = ["sh", "-c", 'exec 3<&0; "$@" <&3 & wait; sleep 1', "sh", sys.executable, "-c", program]
    with subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        source = LibprocSource(int(parent.stdout.readline()))
        source.snapshot()
        parent.stdin.write("\n")
        parent.stdin.flush()
        for _ in range(2):
            assert last_error(source).exit_status == exit_status
        source.close()


def test_source_of_another_users_process_is_access_denied() -> None:
    """Reading launchd needs root; skipped for root, which is allowed to."""
    if os.geteuid() == 0:
        assert LibprocSource(1).identity().pid == 1
        return
    with pytest.raises(AccessDeniedError):
        LibprocSource(1)


def test_zombie_is_target_gone_though_rusage_answers() -> None:
    """Private knowledge of the kernel: proc_pid_rusage answers for a zombie, PROC_PIDTASKALLINFO does not."""
    with subprocess.Popen([sys.executable, "-c", "pass"], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.read()
        time.sleep(0.5)
        with pytest.raises(TargetGoneError):
            LibprocSource(child.pid)
        usage = rusage_info_v6()
        load().proc.rusage(child.pid, usage, 4)
        assert usage.ri_proc_exit_abstime > 0
        with pytest.raises(ProcessLookupError):
            load().proc.info(child.pid, proc_taskallinfo())


def sleeping(code: str = "") -> "subprocess.Popen[bytes]":
    """Start a process that runs `code`, prints a line and ends well when its standard input does."""
    program = f"import sys\n{code}\nprint(flush=True)\nsys.stdin.readline()"
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    return child


def last_error(source: LibprocSource) -> TargetGoneError:
    """Take snapshots until the target is gone."""
    while True:
        try:
            source.snapshot()
        except TargetGoneError as error:
            return error
        except KernelError:  # it is exiting
            pass


def test_stopped_process_has_state_stopped_and_waiting_threads() -> None:
    """SIGSTOP sets p_stat to SSTOP and suspends the task; no thread is TH_STATE_STOPPED."""
    with sleeping() as child, closing(LibprocSource(child.pid)) as source:
        try:
            os.kill(child.pid, signal.SIGSTOP)
            stopped = eventually(lambda: (taken := source.snapshot(parts=Part.DETAIL)).state == "stopped" and taken)
            assert "stopped" not in stopped.thread_figures.states
            os.kill(child.pid, signal.SIGCONT)
            assert eventually(lambda: source.snapshot().state != "stopped")
        finally:
            child.kill()


def test_exit_of_a_process_with_much_memory_keeps_its_status() -> None:
    """Libproc reports ESRCH from the beginning of the teardown; the status comes with NOTE_EXIT at its end."""
    with sleeping("kept = bytearray(b'x') * (256 << 20)") as child, closing(LibprocSource(child.pid)) as source:
        assert child.stdin is not None
        child.stdin.close()
        assert last_error(source).exit_status == ExitStatus(True, "exit status 0")


def test_inherited_listener_without_acceptconn_is_accepted() -> None:
    """Launchd's sockets listen; XNU has no SO_ACCEPTCONN to prove it."""
    with bind_tcp("127.0.0.1", 0) as listener, inherited(os.dup(listener.fileno())) as taken:
        assert taken.getsockname() == listener.getsockname()
        assert taken.proto == socket.IPPROTO_TCP


def test_readings_of_the_machine_leave_no_reference_on_the_host_port() -> None:
    """Each reading releases what it took, also of a library that is loaded anew."""
    lib = load()
    before = lib.statistics.references()
    for _ in range(100):
        MachSource().snapshot(parts=Part.FIGURES)
    assert lib.statistics.references() == before


def test_machine_figures_agree_with_what_the_system_says() -> None:
    """Load to a second's change, memory below what is installed; CPU grows by a burn, and nothing is unknown."""
    lib, source = load(), MachSource()
    first = source.snapshot(parts=Part.FIGURES)
    burn(500_000_000)
    last = source.snapshot(parts=Part.FIGURES)
    assert first.machine is not None
    assert last.machine is not None
    assert last.warnings == ()
    assert last.cpu_count == os.cpu_count()
    assert first.machine.busy_ns is not None
    assert last.machine.busy_ns is not None
    assert last.machine.busy_ns - first.machine.busy_ns >= 450_000_000
    assert last.machine.load_milli is not None
    assert abs(last.machine.load_milli / 1000 - os.getloadavg()[0]) < 0.5
    assert last.machine.memory_available_bytes is not None
    assert 0 < last.machine.memory_available_bytes < lib.host.sysctl_int("hw.memsize")
    assert last.machine.swap_used_bytes is not None
    assert last.machine.memory_pressure_level is not None


def test_wait_for_a_cpu_appears_with_more_threads_than_cores() -> None:
    """Three times as many processes as cores run, so ours waits; its wait and CPU time are at most the window."""
    source = MachSource()
    first = source.snapshot(parts=Part.FIGURES)
    burn(200_000_000)
    alone = measure(first, source.snapshot(parts=Part.FIGURES))
    code = "while True: pass"
    others = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3 * (os.cpu_count() or 1))]
    try:
        time.sleep(1)
        first = source.snapshot(parts=Part.FIGURES)
        burn(500_000_000)
        crowded = measure(first, source.snapshot(parts=Part.FIGURES))
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert alone.wait_ns is not None
    assert crowded.wait_ns is not None
    assert crowded.wait_ns > 100_000_000
    assert crowded.wait_ns + crowded.cpu_ns <= crowded.elapsed_ns * len(crowded.last.roster) + 60_000_000


def test_child_counts_while_it_lives_and_once_when_it_was_waited_for() -> None:
    """The CPU time of a zombie is that which the parent gets; no call books it twice."""
    source = MachSource()
    tree = source.snapshot(parts=Part.FIGURES | Part.CHILDREN).tree
    assert tree is not None
    time.sleep(0.05)  # the emulation knows the start of a child to 10 ms only
    code = "import time\nwhile time.process_time() < 0.3: pass"
    with sleeping(code) as child:
        assert child.stdin is not None
        living = source.snapshot(parts=Part.FIGURES | Part.CHILDREN).tree
        assert living is not None
        assert child.pid in [each.pid for each in living.children]
        child.stdin.close()
        time.sleep(0.5)
        zombie = source.snapshot(parts=Part.FIGURES | Part.CHILDREN).tree
        assert zombie is not None
        assert child.pid not in [each.pid for each in zombie.children]
    time.sleep(0.05)  # it also knows CPU times of children to 10 ms only, which a child must have had time to use
    reaped = source.snapshot(parts=Part.FIGURES | Part.CHILDREN)
    assert reaped.tree is not None
    assert reaped.figures is not None
    assert reaped.figures.reaped_ns is not None
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert abs(reaped.figures.reaped_ns - (usage.ru_utime + usage.ru_stime) * 1e9) < 25_000_000
    assert living.cpu_ns - tree.cpu_ns >= 300_000_000
    assert reaped.tree.reaped_ns - tree.reaped_ns < 50_000_000
    assert reaped.tree.gaps == tree.gaps


def test_no_framework_is_loaded_for_the_machine() -> None:
    """IOKit and CoreFoundation would be loaded into the measured program."""
    if not hasattr(ctypes.CDLL(None), "_dyld_image_count"):
        pytest.skip("the simulated libSystem has no dyld, which lists the loaded libraries")
    code = (
        "import ctypes\n"
        "from vitalsd.snapshot import Part\n"
        "from vitalsd.sources.darwin.mach_source import MachSource\n"
        "dyld = ctypes.CDLL(None)\n"
        "dyld._dyld_get_image_name.restype = ctypes.c_char_p\n"
        "def images(): return {dyld._dyld_get_image_name(i) for i in range(dyld._dyld_image_count())}\n"
        "before = images()\n"
        "MachSource().snapshot(parts=Part.DETAIL | Part.CHILDREN)\n"
        "print(sorted(name for name in images() - before if b'.framework' in name))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
