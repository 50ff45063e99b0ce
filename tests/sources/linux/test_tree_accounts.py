"""Accounts of a process tree, over a simulated kernel whose processes use known amounts of CPU time."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitalsd.sources.linux.cpu_counters import USER_TICK_NS
from vitalsd.sources.linux.tree_accounts import GRAIN_NS, Member, TreeAccounts

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

    It knows nothing of how the accounts work: `truth_ns` is all that the family of the target has used.
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
    """Read the simulated kernel into accounts, as `Descendants` reads the real one."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.accounts = TreeAccounts(cpu_count=1)
        self.members: dict[int, Member] = {}
        self.read_ns = 0
        self._observe(first=True)
        self.begun_ns = kernel.truth_ns

    def read(self) -> None:
        """Read all members and the new descendants, and count them."""
        self._observe(first=False)

    def _observe(self, *, first: bool) -> None:
        kernel = self.kernel
        ended = [self.members.pop(pid) for pid in set(self.members) - set(kernel.processes)]
        for pid in self._family():
            process = kernel.processes[pid]
            member = self.members.setdefault(pid, Member(pid, process.born_ns))
            member.parent = process.parent
            member.cpu_ns = process.user_ns + process.system_ns
            reaped = process.reaped_user_ns // USER_TICK_NS + process.reaped_system_ns // USER_TICK_NS
            member.reaped_ns = reaped * USER_TICK_NS
        target = self.members[TARGET]
        others = [member for pid, member in self.members.items() if pid != TARGET]
        if first:
            self.accounts.begin([target, *others])
        else:
            self.accounts.count(target, others, ended, kernel.now_ns - self.read_ns, missed=False)
        self.read_ns = kernel.now_ns

    def _family(self) -> Iterator[int]:
        """Yield the members, and whatever has one of them as a parent."""
        found = [pid for pid in self.kernel.processes if pid in self.members or pid == TARGET]
        for pid in found:
            yield pid
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
def test_accounts_of_a_tree_without_orphans_equal_the_truth(data: st.DataObject) -> None:
    """What ends between two readings is charged to a living ancestor, so nothing is lost, seen or unseen."""
    kernel = Kernel(orphans=False)
    for _ in advance(data, kernel, unit_ns=USER_TICK_NS, ignored=False):
        break
    observer = Observer(kernel)
    for _ in advance(data, kernel, unit_ns=USER_TICK_NS, ignored=False):
        before_ns = observer.accounts.cpu_ns
        observer.read()
        assert observer.accounts.cpu_ns == kernel.truth_ns - observer.begun_ns
        assert before_ns <= observer.accounts.cpu_ns
        assert observer.accounts.reaped_ns <= observer.accounts.cpu_ns


@given(st.data(), st.booleans())
def test_accounts_of_any_tree_never_exceed_the_truth(data: st.DataObject, ignored: bool) -> None:
    """Orphans, and children of a process that ignores SIGCHLD, make the sums lower bounds."""
    kernel = Kernel(orphans=True)
    observer = Observer(kernel)
    for _ in advance(data, kernel, unit_ns=USER_TICK_NS, ignored=ignored):
        observer.read()
        assert observer.accounts.cpu_ns <= kernel.truth_ns


@given(st.data())
def test_accounts_of_rounded_times_differ_from_the_truth_by_the_grain(data: st.DataObject) -> None:
    """Ticks make an error of at most two of them for each process that had children, also after many readings."""
    kernel = Kernel(orphans=False)
    observer = Observer(kernel)
    for _ in advance(data, kernel, unit_ns=1_234_567, ignored=False):
        observer.read()
        error_ns = observer.accounts.cpu_ns - kernel.truth_ns
        assert abs(error_ns) <= GRAIN_NS * (kernel.last_pid - TARGET + 1)


# Single cases


def counted(target: Member, ended: list[Member], elapsed_ns: int = SECOND_NS, cpu_count: int = 2) -> TreeAccounts:
    """The accounts after one reading."""
    accounts = TreeAccounts(cpu_count)
    accounts.count(target, [], ended, elapsed_ns, missed=False)
    return accounts


def parent(reaped_s: float) -> Member:
    return Member(TARGET, 0, INIT, reaped_ns=int(reaped_s * SECOND_NS), is_new=False)


def watched(cpu_s: float) -> Member:
    """A child that was read when it had used that much."""
    return Member(3, 0, TARGET, counted_cpu_ns=int(cpu_s * SECOND_NS), is_new=False)


CASES = {
    "a child that was watched counts with the rest": (parent(4), [watched(3.5)], 0.5, 0),
    "a child that was not seen counts whole": (parent(0.5), [], 0.5, 1),
    "more than a watched thread could use is of another child": (parent(5), [watched(3.5)], 1.5, 1),
    "more than the cores could use is from before": (parent(4), [], 0, 1),
    "nothing booked means that SIGCHLD is ignored": (parent(0), [watched(3.5)], 0, 1),
    "nothing happened": (parent(0), [], 0, 0),
}


@pytest.mark.parametrize(("target", "ended", "seconds", "gaps"), CASES.values(), ids=CASES.keys())
def test_accounts_of_a_charged_parent_count_what_is_new(
    target: Member, ended: list[Member], seconds: float, gaps: int
) -> None:
    """One reading of one second on two cores."""
    accounts = counted(target, ended)
    assert (accounts.cpu_ns, accounts.reaped_ns) == (seconds * SECOND_NS, seconds * SECOND_NS)
    assert accounts.gaps == gaps


def test_accounts_of_a_child_of_init_that_ends_have_a_gap() -> None:
    """What it used since it was read last is booked outside of the tree."""
    orphan = watched(1)
    orphan.parent = INIT
    assert counted(parent(0), [orphan]).gaps == 1


def test_accounts_of_a_chain_that_ends_at_once_charge_the_nearest_living_ancestor() -> None:
    """A grandchild and its parent end between two readings: both were counted, and the target is charged for both."""
    child, grandchild = watched(1), Member(4, 0, 3, counted_cpu_ns=2 * SECOND_NS, is_new=False)
    accounts = counted(parent(3.25), [grandchild, child])
    assert (accounts.cpu_ns, accounts.gaps) == (SECOND_NS // 4, 0)


def test_accounts_of_many_short_children_add_up_to_their_time() -> None:
    """Each is read after 5 ms and ends after 6; what the steps of the parent's charge hide is made up for later."""
    target, accounts, charged_ns = parent(0), TreeAccounts(cpu_count=1), 0
    for _ in range(100):
        child = Member(3, 0, TARGET, cpu_ns=5_000_000)
        accounts.count(target, [child], [], SECOND_NS, missed=False)
        charged_ns += 6_000_000
        target.reaped_ns = charged_ns // USER_TICK_NS * USER_TICK_NS
        accounts.count(target, [], [child], SECOND_NS, missed=False)
        assert abs(accounts.cpu_ns - charged_ns) <= GRAIN_NS
    assert accounts.gaps == 0


def test_accounts_of_parents_that_end_pass_on_what_the_steps_hid() -> None:
    """Each has a child that was seen for 9 ms and of which its parent shows nothing; the target shows both."""
    target, accounts, charged_ns = parent(0), TreeAccounts(cpu_count=1), 0
    for _ in range(50):
        middle, child = Member(3, 0, TARGET), Member(4, 0, 3, cpu_ns=9_000_000)
        accounts.count(target, [middle, child], [], SECOND_NS, missed=False)
        accounts.count(target, [middle], [child], SECOND_NS, missed=False)
        charged_ns += 9_000_000
        target.reaped_ns = charged_ns // USER_TICK_NS * USER_TICK_NS
        accounts.count(target, [], [middle], SECOND_NS, missed=False)
        assert abs(accounts.cpu_ns - charged_ns) <= GRAIN_NS
