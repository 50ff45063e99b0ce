"""
`vitalsd doctor --tape`, and the player that gives its replies again: here with tapes of the simulator.

A tape from a Mac belongs into ``tests/data/tapes``; `test_tape_plays_as_snapshots` then plays it in each run.
"""

import io
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from itertools import pairwise
from pathlib import Path

import pytest

from support import as_platform
from support.darwin.simulator import Simulator
from support.darwin.tape_player import EndOfTapeError, TapePlayer
from support.paths import DATA
from support.sidecars import environment
from support.target import OwnWorkload
from support.workload import ChildWorkload
from vitalsd.snapshot import Part, ProcessTree, Snapshot, measure
from vitalsd.sources.base import NoSuchProcessError, ProcessEntry
from vitalsd.sources.darwin.functions import FUNCTIONS
from vitalsd.sources.darwin.libproc_source import LibprocSource
from vitalsd.sources.darwin.libsystem import LibSystem, load
from vitalsd.sources.darwin.mach_source import MachSource
from vitalsd.sources.darwin.processes import holdings, list_processes
from vitalsd.sources.darwin.tape import ARGUMENTS, Tape
from vitalsd.sources.programs import ProgramDigest

TAPES = sorted((DATA / "tapes").glob("*.tape"))
SECRETS = ("thread-of-mine", "argument-of-mine", "variable-of-mine", "directory-of-mine")


@pytest.fixture
def as_on_tape(monkeypatch: pytest.MonkeyPatch) -> Callable[[TapePlayer], LibSystem]:
    """Play a tape as its own process: with its pid, and no CPU time to compare its ticks with."""

    def play(player: TapePlayer) -> LibSystem:
        monkeypatch.setattr(os, "getpid", lambda: player.pid)
        monkeypatch.setattr(resource, "getrusage", lambda _: resource.struct_rusage([0] * 16))
        return player.lib()

    return play


def scene(lib: LibSystem, pid: int) -> tuple[list[Snapshot], list[ProcessEntry], dict[str, int]]:
    """Read this process, the process `pid` and the list of all; and a pid that no process has."""
    taken = []
    with closing(MachSource(lib=lib)) as own:
        taken += [own.snapshot(parts=Part.DETAIL | Part.CHILDREN), own.snapshot()]
    with closing(LibprocSource(pid, lib=lib, program_of=ProgramDigest(b"k" * 32))) as other:
        taken += [other.snapshot(parts=Part.DETAIL | Part.CHILDREN), other.snapshot()]
    with pytest.raises(NoSuchProcessError):
        LibprocSource(2**31 - 2, lib=lib)
    lib.host.uuid()
    return taken, list(list_processes(lib)), holdings(lib)


@pytest.fixture
def secretive(tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A process with each of `SECRETS` about it."""
    directory = tmp_path / SECRETS[3]
    directory.mkdir()
    code = "import sys; print(flush=True); sys.stdin.readline()"
    with subprocess.Popen(
        [sys.executable, "-c", code, SECRETS[1]],
        env=os.environ | {"SECRET": SECRETS[2]},
        cwd=directory,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def test_tape_has_no_name_path_argument_variable_or_user(
    simulator: Simulator, secretive: "subprocess.Popen[bytes]", threads: OwnWorkload
) -> None:
    """Neither as text nor as the hexadecimal of a reply; lengths and counts are as they were."""
    threads.start_thread("thread-of-mine")
    file = io.StringIO()
    lib = load(simulator.path, Tape(file, os.getpid()))
    taken, entries, _ = scene(lib, secretive.pid)
    assert SECRETS[0] in taken[0].roster.names
    assert lib.proc.command_line(secretive.pid)[1][-1] == SECRETS[1].encode()
    assert SECRETS[3] in lib.proc.working_directory(secretive.pid)
    assert entries
    tape = file.getvalue()
    for secret in (
        *SECRETS,
        sys.executable,
        os.path.basename(sys.executable),
        lib.host.sysctl("kern.bootsessionuuid").decode(),
    ):
        assert secret not in tape
        assert secret.encode().hex() not in tape
    assert len(SECRETS[0]) * "78" in tape


def test_tape_has_user_501_in_place_of_each_user(simulator: Simulator) -> None:
    """Root's processes are of 501, too."""
    file = io.StringIO()
    lib = load(simulator.path, Tape(file, os.getpid()))
    uids = [entry.uids for entry in list_processes(lib)]
    assert frozenset({os.geteuid()}) in uids
    player = TapePlayer(file.getvalue().splitlines())
    assert {entry.uids for entry in list_processes(player.lib())} == {frozenset({501})}


def test_tape_plays_as_it_was_recorded(
    simulator: Simulator,
    child: ChildWorkload,
    threads: OwnWorkload,
    as_on_tape: Callable[[TapePlayer], LibSystem],
) -> None:
    """The same numbers, ids and errors; names of the same length; and no reply is left over."""
    threads.start_thread("render")
    file = io.StringIO()
    recorded, entries, held = scene(load(simulator.path, Tape(file, os.getpid())), child.pid)
    player = TapePlayer(file.getvalue().splitlines())
    played, listed, held_again = scene(as_on_tape(player), child.pid)
    for was, is_ in zip(recorded, played, strict=True):
        for field in (
            "cpu_ns",
            "exited_cpu_ns",
            "rss_bytes",
            "vm_bytes",
            "state",
            "thread_cpu_ns",
            "boottime_ns",
            "wait_ns",
            "wait_error_ns",
            "cpu_count",
            "machine",
        ):
            assert getattr(is_, field) == getattr(was, field), field
        assert is_.roster.has_same_threads(was.roster)
        assert is_.figures == was.figures
        assert _nameless(is_.tree) == _nameless(was.tree)
        assert [len(name) for name in is_.roster.names] == [len(name) for name in was.roster.names]
        assert set("".join(is_.roster.names)) <= {"x"}
    assert [entry.pid for entry in listed] == [entry.pid for entry in entries]
    assert held_again == held
    assert not any(player.left(name) for name in ARGUMENTS)


def _nameless(tree: ProcessTree | None) -> ProcessTree | None:
    return tree and tree._replace(children=tuple(child._replace(name="") for child in tree.children))


def test_tape_covers_every_function_of_the_library(simulator: Simulator, child: ChildWorkload) -> None:
    """The table of the tape is that of the library, and a run calls all of it but the text of an error."""
    assert ARGUMENTS.keys() == FUNCTIONS.keys()
    file = io.StringIO()
    scene(load(simulator.path, Tape(file, os.getpid())), child.pid)
    called = {json.loads(line).get("call") for line in file.getvalue().splitlines()}
    assert FUNCTIONS.keys() - called == {"mach_error_string"}


def test_tape_of_another_format_is_refused() -> None:
    """A file of another format, or of none."""
    for line in ('{"tape": 99, "pid": 1}', "{}"):
        with pytest.raises(ValueError, match="no tape of format"):
            TapePlayer([line])


@pytest.fixture(scope="module")
def tape_of_doctor(simulated_libsystem: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tape of a whole ``doctor`` over the simulated kernel."""
    directory = tmp_path_factory.mktemp("doctor")
    path = directory / "doctor.tape"
    command = [*as_platform.program(simulated_libsystem), "doctor", "--json", "--tape", str(path)]
    done = subprocess.run(command, env=environment(directory), capture_output=True, text=True, timeout=100)
    assert json.loads(done.stdout)["platform"] == "macos", done.stderr
    return path


@pytest.mark.parametrize("tape", [None, *TAPES], ids=lambda path: path.stem if path else "simulator")
def test_tape_plays_as_snapshots(
    tape: Path | None, tape_of_doctor: Path, as_on_tape: Callable[[TapePlayer], LibSystem]
) -> None:
    """To its end: no total falls, ids ascend, and the threads used no more than the process, to the error."""
    player = TapePlayer((tape or tape_of_doctor).read_text("ascii").splitlines())
    taken: list[Snapshot] = []
    with closing(MachSource(lib=as_on_tape(player))) as source:
        while player.left("task_threads"):
            with suppress(EndOfTapeError):  # a list that was made to count references, and not to read the threads
                taken.append(source.snapshot())
    assert len(taken) > 50
    for before, after in pairwise(taken):
        assert after.cpu_ns >= before.cpu_ns
        assert after.exited_cpu_ns[0] <= after.exited_cpu_ns[1]
        m = measure(before, after)
        slack_ns = m.cpu_error_ns + len(after.roster) * (after.thread_lag_ns + after.thread_grain_ns)
        assert sum(m.thread_cpu_ns) <= m.cpu_ns + slack_ns
        assert list(after.roster.tids) == sorted(set(after.roster.tids))


def test_tape_of_linux_is_refused(tmp_path: Path) -> None:
    """With the reason; and a file that is there is not overwritten."""
    command = [sys.executable, "-P", "-m", "vitalsd", "doctor", "--tape", str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "vitalsd: --tape records the calls of macOS, and this is linux\n")
    assert not (tmp_path / "x").exists()


def test_tape_does_not_overwrite_a_file(tmp_path: Path, simulated_libsystem: Path) -> None:
    """It would be gone before anything is examined."""
    path = tmp_path / "kept"
    path.write_text("kept", encoding="ascii")
    command = [*as_platform.program(simulated_libsystem), "doctor", "--tape", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == f"vitalsd: cannot write {path}: File exists\n"
    assert path.read_text("ascii") == "kept"
