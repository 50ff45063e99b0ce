"""The sums of a process tree, over a simulated kernel whose processes use known amounts of CPU time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from vitalsd.snapshot import ProcessTree
from vitalsd.sources.process_tree import Member, ProcessLedger

TICK_NS = 10_000_000
GRAIN_NS = 2 * TICK_NS
INIT = 1
TARGET = 2
SECOND_NS = 1_000_000_000


@dataclass
class Simulated:
    """A process of the simulated kernel."""

    pid: int
    parent: int
    born_ns: int
    user_ns: int = 0
    system_ns: int = 0
    reaped_user_ns: int = 0
    reaped_system_ns: int = 0
    is_zombie: bool = False


@dataclass
class Kernel:
    """
    Simulate processes with two kinds of CPU time, as wait4(2) passes them on; only `burn` passes time.

    It knows nothing of how the ledger works: `truth_ns` is all that the family of the target has used.
    """

    orphans: bool
    """Whether a process may exit before its children, which then go to init."""
    now_ns: int = SECOND_NS
    truth_ns: int = 0
    processes: dict[int, Simulated] = field(default_factory=dict)
    last_pid: int = TARGET

    def __post_init__(self) -> None:
        self.processes = {TARGET: Simulated(TARGET, INIT, 0)}

    def children(self, pid: int) -> list[Simulated]:
        return [process for process in self.processes.values() if process.parent == pid]

    def running(self) -> list[Simulated]:
        return [process for process in self.processes.values() if not process.is_zombie]

    def fork(self, parent: Simulated) -> None:
        self.last_pid += 1
        self.processes[self.last_pid] = Simulated(self.last_pid, parent.pid, self.now_ns)

    def burn(self, process: Simulated, user_ns: int, system_ns: int) -> None:
        process.user_ns += user_ns
        process.system_ns += system_ns
        self.truth_ns += user_ns + system_ns
        self.now_ns += user_ns + system_ns

    def exit(self, process: Simulated) -> None:
        if process.pid == TARGET or (self.children(process.pid) and not self.orphans):
            return
        for child in self.children(process.pid):
            child.parent = INIT
            if child.is_zombie:
                del self.processes[child.pid]
        process.is_zombie = True
        if process.parent == INIT:
            del self.processes[process.pid]

    def reap(self, zombie: Simulated, *, is_ignored: bool) -> None:
        """Let the parent wait for a child; if it ignores SIGCHLD, it is not charged."""
        parent = self.processes[zombie.parent]
        del self.processes[zombie.pid]
        if not is_ignored:
            parent.reaped_user_ns += zombie.user_ns + zombie.reaped_user_ns
            parent.reaped_system_ns += zombie.system_ns + zombie.reaped_system_ns


class Observer:
    """Read the simulated kernel into a ledger, as a source reads a real one."""

    def __init__(self, kernel: Kernel, cpu_count: int = 1) -> None:
        self.kernel = kernel
        self.ledger = ProcessLedger(cpu_count, GRAIN_NS)
        self.read_ns = 0
        self.tree = self.read()
        self.begun_ns = kernel.truth_ns

    def read(self, meanwhile: Callable[[], None] | None = None) -> ProcessTree:
        """
        Read all members and the new descendants.

        Args:
            meanwhile: called after each row, so that a parent may wait for its child after its row was read.
        """
        members = {key[0] for key in self.ledger.members}
        now_ns, rows = self.kernel.now_ns, []
        for process in self._family(members):
            rows.append(self._row(process))
            if meanwhile:
                meanwhile()
        self.tree = self.ledger.read(rows, now_ns - self.read_ns, missed=False, is_settled=meanwhile is None)
        self.read_ns = now_ns
        return self.tree

    def _row(self, process: Simulated) -> Member:
        reaped = process.reaped_user_ns // TICK_NS + process.reaped_system_ns // TICK_NS
        return Member(
            key=(process.pid, process.born_ns),
            parent=process.parent,
            name="",
            cpu_ns=process.user_ns + process.system_ns,
            reaped_ns=reaped * TICK_NS,
            rss_bytes=0,
            thread_count=1,
            is_young=process.born_ns >= self.read_ns,
        )

    def _family(self, members: set[int]) -> Iterator[Simulated]:
        """Yield the members, and whatever has one of them as a parent."""
        found = [pid for pid in self.kernel.processes if pid in members or pid == TARGET]
        for pid in found:
            if pid in self.kernel.processes:
                yield self.kernel.processes[pid]
                found += [child.pid for child in self.kernel.children(pid) if child.pid not in found]


STEPS = ["fork", "burn", "burn", "exit", "reap", "reap", "read"]


def advance(data: st.DataObject, kernel: Kernel, *, unit_ns: int, ignored: bool) -> Iterator[None]:
    """Let something happen to the processes; yield where a reading is due."""
    for step in data.draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=60)):
        zombies = [process for process in kernel.processes.values() if process.is_zombie]
        if step == "read":
            yield
        elif step == "reap" and zombies:
            is_ignored = ignored and data.draw(st.booleans())
            kernel.reap(data.draw(st.sampled_from(zombies)), is_ignored=is_ignored)
        elif step == "fork":
            kernel.fork(data.draw(st.sampled_from(kernel.running())))
        elif step == "exit":
            kernel.exit(data.draw(st.sampled_from(kernel.running())))
        elif step == "burn":
            times = st.integers(0, SECOND_NS // unit_ns)
            process = data.draw(st.sampled_from(kernel.running()))
            kernel.burn(process, data.draw(times) * unit_ns, data.draw(times) * unit_ns)
    yield


@given(st.data())
def test_sum_of_a_tree_without_orphans_equals_the_truth(data: st.DataObject) -> None:
    """What ends between two readings is charged to a living ancestor, so nothing is lost, seen or unseen."""
    kernel = Kernel(orphans=False)
    for _ in advance(data, kernel, unit_ns=TICK_NS, ignored=False):
        break
    observer = Observer(kernel)
    for _ in advance(data, kernel, unit_ns=TICK_NS, ignored=False):
        before, tree = observer.tree, observer.read()
        assert tree.cpu_ns == kernel.truth_ns - observer.begun_ns
        assert before.cpu_ns <= tree.cpu_ns
        assert tree.reaped_ns <= tree.cpu_ns


@given(st.data())
def test_sum_of_a_tree_whose_parents_are_charged_within_readings_equals_the_truth(data: st.DataObject) -> None:
    """A child that vanishes after the row of its parent was read is booked in the next reading, and counts once."""
    kernel = Kernel(orphans=False)
    observer = Observer(kernel, cpu_count=0)

    def reap() -> None:
        zombies = [process for process in kernel.processes.values() if process.is_zombie]
        is_waiting = data.draw(st.booleans())
        if zombies and is_waiting:
            kernel.reap(data.draw(st.sampled_from(zombies)), is_ignored=False)

    for _ in advance(data, kernel, unit_ns=TICK_NS, ignored=False):
        assert observer.read(reap).cpu_ns <= kernel.truth_ns
    assert observer.read().cpu_ns == kernel.truth_ns


@given(st.data(), st.booleans(), st.booleans())
def test_sum_of_any_tree_never_exceeds_the_truth(data: st.DataObject, ignored: bool, settled: bool) -> None:
    """Orphans, and children of a process that ignores SIGCHLD, make the sums lower bounds."""
    kernel = Kernel(orphans=True)
    observer = Observer(kernel)
    for _ in advance(data, kernel, unit_ns=TICK_NS, ignored=ignored):
        assert observer.read(None if settled else lambda: None).cpu_ns <= kernel.truth_ns


@given(st.data())
def test_sum_of_rounded_times_differs_from_the_truth_by_the_grain(data: st.DataObject) -> None:
    """Ticks make an error of at most two of them for each process that had children, also after many readings."""
    kernel = Kernel(orphans=False)
    observer = Observer(kernel)
    for _ in advance(data, kernel, unit_ns=1_234_567, ignored=False):
        error_ns = observer.read().cpu_ns - kernel.truth_ns
        assert abs(error_ns) <= GRAIN_NS * (kernel.last_pid - TARGET + 1)
