"""The descendants of real processes, with the kernel's own accounts of children and psutil as independent oracles."""

import os
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from support.browser import FLAGS
from support.family import Family
from support.paths import TESTS
from support.sidecars import eventually
from support.target import Target
from support.tools import program
from vitalsd.snapshot import Part, ProcessFigures, ProcessTree, Snapshot, measure
from vitalsd.sources.linux.children import Descendants
from vitalsd.sources.linux.cpu_counters import USER_TICK_NS
from vitalsd.sources.linux.process_files import ProcessFiles
from vitalsd.sources.linux.procfs import Stat
from vitalsd.sources.linux.source import LinuxSource

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

MS = 1_000_000
TREE = Part.FIGURES | Part.CHILDREN
LAST_PID = "/proc/sys/kernel/ns_last_pid"

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to act as another user, or for a namespace")


@pytest.fixture
def family() -> Iterator[Family]:
    with Family() as family:
        yield family


@pytest.fixture
def source(family: Family) -> Iterator[LinuxSource]:
    with closing(LinuxSource(family.pid)) as source:
        yield source


def tree_of(source: LinuxSource) -> ProcessTree:
    tree = source.snapshot(parts=TREE).tree
    assert tree is not None
    return tree


def pids(tree: ProcessTree) -> list[int]:
    return [child.pid for child in tree.children]


# Which processes


def test_tree_of_a_process_without_children_is_the_process_itself(source: LinuxSource) -> None:
    """The sums are those of the target, which is not among its children."""
    first, last = source.snapshot(parts=TREE), source.snapshot(parts=TREE)
    assert last.tree is not None
    assert (last.tree.children, last.tree.process_count, last.tree.gaps) == ((), 1, 0)
    assert last.tree.rss_bytes == last.rss_bytes
    assert last.tree.cpu_ns == last.cpu_ns - first.cpu_ns


def test_tree_lists_children_and_grandchildren_as_psutil_does(family: Family, source: LinuxSource) -> None:
    """By ascending pid, with name, memory and threads; found at the first reading and at later ones."""
    child = family.fork(family.pid)
    grandchild = family.fork(child)
    assert pids(tree_of(source)) == sorted([child, grandchild])
    late = family.fork(grandchild)
    sleepers = family.ask(family.pid, "sleepers 2")
    eventually(lambda: all(psutil.Process(pid).status() == psutil.STATUS_SLEEPING for pid in sleepers))
    tree = tree_of(source)
    oracle = psutil.Process(family.pid)
    assert pids(tree) == sorted([child, grandchild, late, *sleepers])
    assert pids(tree) == sorted(process.pid for process in oracle.children(recursive=True))
    for shown in tree.children:
        process = psutil.Process(shown.pid)
        assert (shown.name, shown.thread_count) == (process.name()[:15], process.num_threads())
        assert shown.rss_bytes == pytest.approx(process.memory_info().rss, rel=0.1)
    assert tree.process_count == 6
    assert tree.gaps == 0


def test_tree_after_a_child_has_ended_lacks_it(family: Family, source: LinuxSource) -> None:
    """A zombie is still listed, with the CPU time that it has used."""
    child = family.fork(family.pid)
    used_ns = family.ask(child, "burn 30")
    family.tell(child, "exit")
    eventually(lambda: psutil.Process(child).status() == psutil.STATUS_ZOMBIE)
    (zombie,) = tree_of(source).children
    assert zombie.pid == child
    assert zombie.cpu_ns >= used_ns
    family.ask(family.pid, f"wait {child}")
    assert tree_of(source).children == ()


def test_process_forked_twice_stays_a_member_if_it_was_seen(family: Family, source: LinuxSource) -> None:
    """Its parent ends while it is watched; one whose parent ended before belongs to init, and is not found."""
    child = family.fork(family.pid)
    grandchild = family.fork(child)
    unseen = family.ask(family.pid, "daemon")
    family.finish()
    tree_of(source)
    family.end(child, family.pid)
    eventually(lambda: psutil.Process(grandchild).ppid() != child)
    before, used_ns = tree_of(source), family.ask(grandchild, "burn 30")
    after = tree_of(source)
    assert pids(after) == [grandchild]
    assert unseen not in pids(after)
    assert after.cpu_ns - before.cpu_ns >= 30 * MS
    assert after.children[0].cpu_ns >= used_ns


@as_root
@pytest.mark.parametrize("name", ["app-vitalsd-test.scope", "vitalsd-test.scope"])
def test_process_forked_twice_is_found_in_the_group_of_the_application(family: Family, name: str) -> None:
    """Where the desktop has made a control group for the application; other groups have processes of others."""
    mount = Path("/sys/fs/cgroup/unified")
    group = (mount if mount.is_dir() else mount.parent) / f"{name[:-6]}-{os.getpid()}.scope"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made: {error.strerror}")
    try:
        (group / "cgroup.procs").write_text(str(family.pid))
        early = family.ask(family.pid, "daemon")
        family.finish()
        with closing(LinuxSource(family.pid)) as source:
            expected = [early] if name.startswith("app-") else []
            assert pids(tree_of(source)) == expected
            late = family.ask(family.pid, "daemon")
            family.finish()
            tree = tree_of(source)
            assert pids(tree) == (sorted([early, late]) if expected else [])
            assert tree.gaps == 0
        # Seen from a process that another one of the group has started, the group is another application's.
        child = family.fork(family.pid)
        with closing(LinuxSource(child)) as source:
            assert tree_of(source).children == ()
    finally:
        family.__exit__(None, None, None)
        eventually(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


@pytest.mark.skipif(not os.access(LAST_PID, os.W_OK), reason=f"{LAST_PID} is not writable here")
@pytest.mark.parametrize("budget", [0, 400])
def test_foreign_process_with_the_pid_of_a_child_is_no_child(family: Family, budget: int) -> None:
    """The kernel gives the pid of a child that has ended to a child of this test, and then to another child."""
    with closing(LinuxSource(family.pid, fd_budget=budget)) as source:
        reuse_pid_of_child(family, source)


def reuse_pid_of_child(family: Family, source: LinuxSource) -> None:
    child, later = family.fork(family.pid), family.fork(family.pid)
    time.sleep(0.03)  # A process with the same number and the same start, to 10 ms, is the same one to any reader.
    old = next(each for each in tree_of(source).children if each.pid == child)
    family.end(child, family.pid)
    for _ in range(50):
        Path(LAST_PID).write_text(str(child - 1), encoding="ascii")
        foreign = subprocess.Popen(["sleep", "60"])
        tree = tree_of(source)
        foreign.kill()
        foreign.wait()
        assert pids(tree) == [later]
        if foreign.pid == child:
            break
    else:
        pytest.fail("the kernel never gave the number again")
    Path(LAST_PID).write_text(str(later), encoding="ascii")  # Only then it is seen to have begun anew.
    family.fork(family.pid)
    tree_of(source)
    for _ in range(50):
        Path(LAST_PID).write_text(str(child - 1), encoding="ascii")
        if family.fork(family.pid) == child:
            break
    new = next(each for each in tree_of(source).children if each.pid == child)
    assert new.start_key > old.start_key


def test_tree_of_300_children_has_256_and_is_incomplete(family: Family, source: LinuxSource) -> None:
    """What is beyond the limit is said to be missing, and no descriptor is left when the source is closed."""
    before = set(os.listdir("/proc/self/fd"))
    family.ask(family.pid, "sleepers 300")
    first, last = source.snapshot(parts=TREE), source.snapshot(parts=TREE)
    assert last.tree is not None
    assert len(last.tree.children) == 256
    assert last.tree.process_count == 257
    m = measure(first, last)
    assert m.tree is not None
    assert not m.tree.complete
    source.close()
    assert set(os.listdir("/proc/self/fd")) < before


def test_children_of_this_process_cost_no_descriptor_each() -> None:
    """Descriptors of this process belong to the host program."""
    children = [subprocess.Popen(["sleep", "60"]) for _ in range(20)]
    try:
        with closing(LinuxSource()) as source:
            source.snapshot(parts=Part.FIGURES)
            before = set(os.listdir("/proc/self/fd"))
            tree = tree_of(source)
            assert set(pids(tree)) >= {child.pid for child in children}
            assert len(set(os.listdir("/proc/self/fd")) - before) <= 1
    finally:
        for child in children:
            child.kill()
            child.wait()


def test_threads_of_a_child_are_no_children(start: Callable[..., Target]) -> None:
    """They have ids of their own, which the kernel gave after the reading before."""
    with closing(LinuxSource()) as source:
        before = pids(tree_of(source))
        target = start("--idle", "5")
        assert sorted(set(pids(tree_of(source))) - set(before)) == [target.pid]


@as_root
def test_child_of_another_user_is_a_child(family: Family, source: LinuxSource) -> None:
    """As a set-user-ID program is; its clock and its times are open to every user."""
    child = family.fork(family.pid)
    family.ask(child, "setuid")
    before = tree_of(source)
    family.ask(child, "burn 30")
    after = tree_of(source)
    assert pids(after) == [child]
    assert after.cpu_ns - before.cpu_ns >= 30 * MS
    assert after.gaps == before.gaps


@as_root
def test_child_that_hidepid_hides_is_announced_and_leaves_a_gap() -> None:
    """Nothing of it is shown while it lives; when it has ended, its parent is charged for it."""
    code = """
        import os, sys
        sys.path.insert(0, sys.argv[1])
        from support.stranger import become_nobody, mount_proc
        from support.family import spin
        from vitalsd.snapshot import Part
        from vitalsd.sources.linux.source import LinuxSource
        LinuxSource().close()
        mount_proc(2)
        reader, writer = os.pipe()
        if not os.fork():
            os.close(writer)
            os.read(reader, 1)
            spin(50)
            os._exit(0)
        become_nobody(keep_reading_files=False)
        source = LinuxSource()
        first = source.snapshot(parts=Part.FIGURES | Part.CHILDREN)
        os.close(writer)
        os.wait()
        last = source.snapshot(parts=Part.FIGURES | Part.CHILDREN)
        print(len(first.tree.children), last.tree.gaps - first.tree.gaps, last.tree.reaped_ns)
        print(*first.warnings, sep="\\n")
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(TESTS)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    count, gaps, reaped_ns = map(int, out[0].split())
    assert (count, gaps) == (0, 1)
    assert reaped_ns >= 40 * MS
    assert "children: /proc hides the processes of other users (hidepid); one may be missing" in out


@contextmanager
def shell_in_namespace(code: str) -> Iterator[psutil.Process]:
    """Run a shell in a pid namespace with a procfs of its own, until it has printed a line."""
    inside = subprocess.Popen(
        ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", code], stdout=subprocess.PIPE
    )
    try:
        assert inside.stdout is not None
        inside.stdout.readline()
        (shell,) = psutil.Process(inside.pid).children()
        eventually(lambda: all(child.name() == "sleep" for child in shell.children()))
        yield shell
    finally:
        inside.kill()
        inside.wait()
        assert inside.stdout is not None
        inside.stdout.close()


@as_root
def test_children_in_another_pid_namespace_are_read_without_clocks() -> None:
    """Through its procfs, where only a look at all processes shows which are new."""
    with (
        shell_in_namespace("sleep 60 & sleep 60 & echo; wait") as shell,
        closing(LinuxSource(1, root=f"/proc/{shell.pid}/root/proc")) as source,
    ):
        tree = tree_of(source)
        assert [child.name for child in tree.children] == ["sleep", "sleep"]
        assert all(child.cpu_ns % USER_TICK_NS == 0 for child in tree.children)
        assert max(pids(tree)) < 100
        shell.children()[0].kill()
        eventually(lambda: len(tree_of(source).children) == 1)


@as_root
def test_child_in_another_pid_namespace_with_the_pid_of_this_process_is_a_child() -> None:
    """A sidecar leaves itself out; there, its number is another process's."""
    code = f"echo {os.getpid() - 1} > {LAST_PID}; sleep 60 & echo; wait"
    with (
        shell_in_namespace(code) as shell,
        closing(LinuxSource(1, root=f"/proc/{shell.pid}/root/proc")) as source,
    ):
        assert pids(tree_of(source)) == [os.getpid()]


# CPU time


def used_in(source: LinuxSource, first: Snapshot) -> Any:
    """What the tree has used since a snapshot."""
    return measure(first, source.snapshot(parts=TREE))


def test_storm_of_short_children_is_within_ten_percent_of_its_parents_account(
    family: Family, source: LinuxSource
) -> None:
    """No reading sees most of them alive. What the kernel charges to the spawner is the reference."""
    first = source.snapshot(parts=TREE)
    family.tell(family.pid, "storm 1.5")
    for _ in range(3):
        time.sleep(0.5)
        source.snapshot(parts=TREE)
    count, charged_ns = family.finish()
    m = used_in(source, first)
    assert count > 20
    assert m.tree is not None
    assert m.reaped_ns == pytest.approx(charged_ns, rel=0.1)
    assert m.tree.cpu_ns == pytest.approx(charged_ns + m.cpu_ns, rel=0.1)
    assert not m.tree.complete


def test_child_that_was_watched_counts_once(family: Family, source: LinuxSource) -> None:
    """When its parent waits for it, the kernel charges its whole life; what was seen is not counted again."""
    tree_of(source)
    child = family.fork(family.pid)
    for _ in range(4):
        family.ask(child, "burn 100")
        tree_of(source)
    first = source.snapshot(parts=TREE)
    charged_ns = family.end(child, family.pid)
    m = used_in(source, first)
    assert charged_ns >= 400 * MS
    assert m.reaped_ns is not None
    assert m.reaped_ns <= 100 * MS
    assert m.tree is not None
    assert m.tree.cpu_ns <= m.elapsed_ns * (os.cpu_count() or 1)
    assert m.tree.complete
    assert m.last.tree.cpu_ns == pytest.approx(charged_ns + m.last.cpu_ns, abs=100 * MS)


def test_child_that_was_not_watched_has_no_figure_and_a_warning(family: Family, source: LinuxSource) -> None:
    """More than the core could use in the window is from before it."""
    child = family.fork(family.pid)
    family.ask(child, "burn 600")
    first = replace(source.snapshot(parts=Part.FIGURES), figures=ProcessFigures(reaped_ns=0), cpu_count=1)
    charged_ns = family.end(child, family.pid)
    last = replace(source.snapshot(parts=Part.FIGURES), figures=ProcessFigures(reaped_ns=charged_ns), cpu_count=1)
    m = measure(first, last)
    assert m.elapsed_ns < 500 * MS
    assert m.reaped_ns is None
    assert any("more than the window has: null" in warning for warning in m.warnings)


def test_living_children_count_with_what_they_used_in_the_window(family: Family, source: LinuxSource) -> None:
    """Of one born in the window everything counts, of the others what they used in it; each has its own figure."""
    old = family.fork(family.pid)
    family.ask(old, "burn 100")
    first = source.snapshot(parts=TREE)
    old_ns = -first.tree.children[0].cpu_ns  # type: ignore[union-attr]
    old_ns += family.ask(old, "burn 40")
    new = family.fork(family.pid)
    new_ns = family.ask(new, "burn 60")
    m = used_in(source, first)
    assert m.tree is not None
    each = {child.pid: cpu_ns for child, cpu_ns in m.tree.children}
    assert each[old] == pytest.approx(old_ns, abs=5 * MS)
    assert each[new] == pytest.approx(new_ns, abs=5 * MS)
    assert m.tree.cpu_ns == m.cpu_ns + sum(each.values())
    assert m.tree.complete
    assert m.reaped_ns == 0


def test_children_of_a_parent_that_ignores_sigchld_are_a_lower_bound(family: Family, source: LinuxSource) -> None:
    """The kernel charges it with nothing; what was seen stays counted, and the window is incomplete."""
    family.ask(family.pid, "ignore")
    tree_of(source)
    child = family.fork(family.pid)
    family.ask(child, "burn 100")
    first = source.snapshot(parts=TREE)
    family.ask(child, "burn 50")
    assert family.end(child, family.pid) == 0
    m = used_in(source, first)
    assert m.reaped_ns == 0
    assert m.tree is not None
    assert m.tree.cpu_ns == m.cpu_ns
    assert not m.tree.complete
    assert m.last.tree.cpu_ns >= 100 * MS


class LateFiles(ProcessFiles):
    """Files of a process that waits for a child just after its ``stat`` has been read."""

    def leader_stat(self) -> Stat:
        stat = super().leader_stat()
        if self.endings:
            self.endings.pop()()
        return stat

    endings: list[Callable[[], object]] | None = None


@pytest.fixture
def late(family: Family) -> Iterator[tuple[LateFiles, Callable[[int], ProcessTree]]]:
    """The files, and a function that reads the descendants at a second."""
    files = LateFiles(family.pid, "/proc", has_pidfd=False)
    descendants = Descendants(files, has_clocks=True, fd_budget=10)
    yield files, lambda second: descendants.read(0, 0, (second * 1000 * MS, second * 1000 * MS), [], closely=False)
    descendants.close()
    files.close()


def test_child_that_ends_within_a_reading_counts_once(
    family: Family, late: tuple[LateFiles, Callable[[int], ProcessTree]]
) -> None:
    """Its parent was read before it was charged, and is read again when the end of the child is seen."""
    child, (files, read) = family.fork(family.pid), late
    read(0)
    used_ns = family.ask(child, "burn 200")
    before = read(1)
    files.endings = [lambda: family.end(child, family.pid)]
    during, after = read(2), read(3)
    assert pids(before) == [child]
    assert during.children == ()
    assert before.cpu_ns == pytest.approx(used_ns, abs=50 * MS)
    assert during.cpu_ns - before.cpu_ns <= 50 * MS
    assert after.cpu_ns == during.cpu_ns
    assert after.gaps == before.gaps


def test_children_that_end_in_each_attempt_to_read_count_once(
    family: Family, late: tuple[LateFiles, Callable[[int], ProcessTree]]
) -> None:
    """Each attempt lacks another one, so the last reading of the target is from before it was charged for all."""
    files, read = late
    read(0)
    children = [family.fork(family.pid) for _ in range(10)]
    for child in children:
        family.ask(child, "burn 100")
    before = read(1)
    files.endings = [partial(family.end, child, family.pid) for child in children]
    during = read(2)
    assert 0 < len(during.children) < len(before.children) - 2
    assert during.cpu_ns - before.cpu_ns <= 50 * MS
    while files.endings:
        files.leader_stat()
    after = read(3)
    assert after.children == ()
    assert after.cpu_ns == pytest.approx(family.ask(family.pid, "wait 0"), abs=50 * MS)
    assert after.cpu_ns == read(4).cpu_ns


def test_tree_during_forks_and_exits_never_exceeds_what_the_kernel_charged(family: Family, source: LinuxSource) -> None:
    """Watched children end at any moment of a reading; none counts twice."""
    first = source.snapshot(parts=TREE)
    for _ in range(3):
        family.tell(family.pid, "storm 0.4")
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            source.snapshot(parts=TREE)
        _, _ = family.finish()
    m = used_in(source, first)
    charged_ns = family.ask(family.pid, "wait 0")
    assert m.tree is not None
    assert m.tree.cpu_ns - m.cpu_ns <= charged_ns + 2 * USER_TICK_NS
    assert m.tree.cpu_ns - m.cpu_ns == pytest.approx(charged_ns, rel=0.1)


# A real application


@contextmanager
def chromium() -> Iterator[subprocess.Popen[bytes]]:
    executable = program("chromium", "google-chrome", "chromium-browser", package="chromium")
    flags = [flag for flag in FLAGS if flag != "--remote-debugging-pipe"]
    with tempfile.TemporaryDirectory(prefix="vitalsd-browser-", ignore_cleanup_errors=True) as profile:
        browser = subprocess.Popen(
            [executable, *flags, f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield browser
        finally:
            for process in psutil.Process(browser.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            browser.kill()
            browser.wait()


def test_processes_of_chromium_are_one_application() -> None:
    """The same processes as psutil finds, with their names, and the CPU time of all."""
    with chromium() as browser:
        oracle = psutil.Process(browser.pid)

        def settled() -> LinuxSource | None:
            """A new source, because one that has seen a process keeps it when its parent ends, and psutil does not."""
            before = {process.pid for process in oracle.children(recursive=True)}
            source = LinuxSource(browser.pid)
            tree = tree_of(source)
            after = {process.pid for process in oracle.children(recursive=True)}
            if len(before) >= 4 and before == after == set(pids(tree)):
                return source
            source.close()
            return None

        with closing(eventually(settled, 50)) as source:
            first = source.snapshot(parts=TREE)
            time.sleep(0.3)
            m = used_in(source, first)
        assert m.tree is not None
        assert m.last.tree.process_count >= 5
        assert m.last.tree.rss_bytes > 2 * m.last.rss_bytes
        assert m.tree.cpu_ns >= m.cpu_ns
