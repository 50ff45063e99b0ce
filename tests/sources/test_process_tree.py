"""The arithmetic of a process tree, with rows as a kernel could return them."""

import random

import pytest

from vitalsd.sources.process_tree import Member, ProcessLedger

TARGET = 100
SECOND = 10**9
TICK = 10_000_000


def row(pid: int, cpu_ns: int, reaped_ns: int = 0, *, parent: int = TARGET, young: bool = True, rss: int = 1) -> Member:
    """Return a row of a process that started at its pid."""
    return Member((pid, pid), parent, f"p{pid}", cpu_ns, reaped_ns, rss, 1, young)


def target(cpu_ns: int, reaped_ns: int = 0) -> Member:
    return row(TARGET, cpu_ns, reaped_ns, parent=1, young=False)


class TestGrowth:
    def test_first_reading_is_the_zero_of_the_counters(self) -> None:
        """Whatever the processes used before; each child is found with its CPU time."""
        tree = ProcessLedger().read([target(500, 70), row(101, 30)], SECOND, missed=False)
        assert (tree.cpu_ns, tree.reaped_ns, tree.gaps) == (0, 0, 0)
        assert (tree.process_count, tree.rss_bytes) == (2, 2)
        (child,) = tree.children
        assert (child.pid, child.start_key, child.name) == (101, 101, "p101")
        assert (child.cpu_ns, child.found_cpu_ns) == (30, 30)

    def test_young_child_counts_whole_and_late_found_child_from_now(self) -> None:
        """One that started since the reading before, and one that was there and was missed."""
        ledger = ProcessLedger()
        ledger.read([target(0)], SECOND, missed=False)
        tree = ledger.read([target(5), row(101, 7), row(102, 90, young=False)], SECOND, missed=False)
        assert (tree.cpu_ns, tree.gaps) == (5 + 7, 1)
        assert [child.found_cpu_ns for child in tree.children] == [0, 90]
        assert ledger.read([target(5), row(101, 7), row(102, 95, young=False)], SECOND, missed=False).cpu_ns == 12 + 5

    def test_counter_that_falls_adds_nothing(self) -> None:
        """The sum never decreases."""
        ledger = ProcessLedger()
        ledger.read([target(50, 50), row(101, 50)], SECOND, missed=False)
        assert ledger.read([target(40, 40), row(101, 40)], SECOND, missed=False).cpu_ns == 0

    def test_missed_reading_is_a_gap(self) -> None:
        """A descendant that could not be read, or too many of them."""
        ledger = ProcessLedger()
        assert ledger.read([target(0)], SECOND, missed=True).gaps == 1
        assert ledger.read([target(0)], SECOND, missed=False).gaps == 1


class TestReaped:
    def test_child_seen_while_it_lived_counts_only_the_rest(self) -> None:
        """It had used 40 when it was last read, and 45 when the target waited for it."""
        ledger = ProcessLedger()
        ledger.read([target(0)], SECOND, missed=False)
        ledger.read([target(0), row(101, 40)], SECOND, missed=False)
        tree = ledger.read([target(0, 45)], SECOND, missed=False)
        assert (tree.cpu_ns, tree.reaped_ns, tree.gaps) == (45, 5, 0)

    def test_child_born_and_reaped_between_two_readings_is_counted_and_a_gap(self) -> None:
        ledger = ProcessLedger()
        ledger.read([target(0)], SECOND, missed=False)
        tree = ledger.read([target(0, 30)], SECOND, missed=False)
        assert (tree.cpu_ns, tree.reaped_ns, tree.gaps) == (30, 30, 1)

    def test_zombie_is_not_listed_and_not_counted_twice(self) -> None:
        """Its last row has the whole CPU time, which the target is booked when it waits, readings later."""
        ledger = ProcessLedger()
        ledger.read([target(0)], SECOND, missed=False)
        ledger.read([target(0), row(101, 40)], SECOND, missed=False)
        for _ in range(3):
            tree = ledger.read(
                [target(0), row(101, 45)._replace(thread_count=0, is_living=False)], SECOND, missed=False
            )
            assert (tree.cpu_ns, tree.process_count, tree.children) == (45, 1, ())
        tree = ledger.read([target(0, 45)], SECOND, missed=False)
        assert (tree.cpu_ns, tree.reaped_ns, tree.gaps) == (45, 0, 0)

    def test_zombie_whose_time_is_booked_with_another_rounding_is_no_gap(self) -> None:
        """Two times in ticks, each rounded down to ns, are less than their sum by up to 1 ns."""
        ledger = ProcessLedger()
        ledger.read([target(0)], SECOND, missed=False)
        ledger.read([target(0), row(101, 45)._replace(thread_count=0, is_living=False)], SECOND, missed=False)
        tree = ledger.read([target(0, 46)], SECOND, missed=False)
        assert (tree.cpu_ns, tree.gaps) == (46, 0)

    def test_child_reaped_after_the_row_of_its_parent_was_read_is_not_counted_twice(self) -> None:
        """It vanishes in one reading, and its parent shows it in the next."""
        ledger = ProcessLedger()
        ledger.read([target(0)], SECOND, missed=False)
        ledger.read([target(0), row(101, 40)], SECOND, missed=False)
        ledger.read([target(0, 0)], SECOND, missed=False)
        tree = ledger.read([target(0, 45)], SECOND, missed=False)
        assert (tree.cpu_ns, tree.reaped_ns, tree.gaps) == (45, 5, 0)

    def test_rest_of_a_child_that_is_booked_late_is_from_the_reading_before(self) -> None:
        """It used 1 s in the second in which it vanished, and the next reading comes 1 ms later."""
        ledger = ProcessLedger(cpu_count=1)
        ledger.read([target(0)], SECOND, missed=False)
        ledger.read([target(0), row(101, SECOND)], SECOND, missed=False)
        ledger.read([target(0)], SECOND, missed=False)
        tree = ledger.read([target(0, 2 * SECOND)], SECOND // 1000, missed=False)
        assert (tree.cpu_ns, tree.gaps) == (2 * SECOND, 0)

    def test_child_booked_late_to_a_parent_that_ends_counts_once(self) -> None:
        """The target waits for the parent 1 ms later, before any reading shows the booking."""
        ledger = ProcessLedger()
        ledger.read([target(0)], SECOND, missed=False)
        ledger.read([target(0), row(101, 10), row(102, 200, parent=101)], SECOND, missed=False)
        ledger.read([target(0), row(101, 10)], SECOND, missed=False)
        tree = ledger.read([target(0, 210 + SECOND)], SECOND // 1000, missed=False)
        assert (tree.cpu_ns, tree.reaped_ns, tree.gaps) == (210 + SECOND, SECOND, 0)

    def test_child_that_is_never_booked_does_not_hide_a_later_one(self) -> None:
        """Where the kernel books nothing, as for a parent that ignores SIGCHLD on Linux."""
        ledger = ProcessLedger()
        ledger.read([target(0)], SECOND, missed=False)
        ledger.read([target(0), row(101, 40)], SECOND, missed=False)
        gaps = [ledger.read([target(0)], SECOND, missed=False).gaps for _ in range(3)]
        assert gaps == [0, 1, 1]  # it could still have been booked in the second
        assert ledger.read([target(0, 30)], SECOND, missed=False).cpu_ns == 70

    def test_chain_that_ended_counts_at_its_nearest_living_ancestor(self) -> None:
        """A shell and the program that it ran; the shell waited for it, and the target for the shell."""
        ledger = ProcessLedger()
        ledger.read([target(0)], SECOND, missed=False)
        ledger.read([target(0), row(101, 10), row(102, 200, parent=101)], SECOND, missed=False)
        tree = ledger.read([target(0, 12 + 210)], SECOND, missed=False)
        assert (tree.cpu_ns, tree.reaped_ns, tree.gaps) == (222, 12, 0)

    def test_reaped_by_a_descendant_is_not_of_the_target(self) -> None:
        """`reaped_ns` is what the target itself waited for."""
        ledger = ProcessLedger()
        ledger.read([target(0)], SECOND, missed=False)
        ledger.read([target(0), row(101, 10)], SECOND, missed=False)
        tree = ledger.read([target(0), row(101, 10, 30)], SECOND, missed=False)
        assert (tree.cpu_ns, tree.reaped_ns, tree.gaps) == (40, 0, 1)

    def test_child_that_used_more_than_all_cores_could_is_not_counted(self) -> None:
        """It was used before the reading before: the target waited for a child of another user that ran for a day."""
        ledger = ProcessLedger(cpu_count=2)
        ledger.read([target(0)], SECOND, missed=True)
        tree = ledger.read([target(0, 86_400 * SECOND)], SECOND, missed=False)
        assert (tree.cpu_ns, tree.reaped_ns, tree.gaps) == (0, 0, 2)
        assert ledger.read([target(0, 86_402 * SECOND)], SECOND, missed=False).cpu_ns == 2 * SECOND

    def test_booked_time_that_a_vanished_child_cannot_have_used_is_a_gap(self) -> None:
        """One thread cannot use 2 s in 1 s, so there was another child."""
        ledger = ProcessLedger(cpu_count=4)
        ledger.read([target(0)], SECOND, missed=False)
        ledger.read([target(0), row(101, 40)], SECOND, missed=False)
        tree = ledger.read([target(0, 40 + 2 * SECOND)], SECOND, missed=False)
        assert (tree.cpu_ns, tree.gaps) == (40 + 2 * SECOND, 1)

    def test_booked_time_in_ticks_is_not_counted_twice(self) -> None:
        """Linux cuts 15 ms to a tick of 10; with the next child it books what is left of both."""
        ledger = ProcessLedger(grain_ns=2 * TICK)
        ledger.read([target(0)], SECOND, missed=False)
        ledger.read([target(0), row(101, 15_000_000)], SECOND, missed=False)
        ledger.read([target(0, TICK), row(102, 15_000_000)], SECOND, missed=False)
        tree = ledger.read([target(0, 3 * TICK)], SECOND, missed=False)
        assert (tree.cpu_ns, tree.gaps) == (30_000_000, 0)

    @pytest.mark.parametrize("parent", [0, 1])
    def test_member_that_ends_outside_of_the_tree_is_a_gap(self, parent: int) -> None:
        """Its parent had ended, so launchd or init waited for it."""
        ledger = ProcessLedger()
        ledger.read([target(0)], SECOND, missed=False)
        ledger.read([target(0), row(101, 40, parent=parent)], SECOND, missed=False)
        assert ledger.read([target(0)], SECOND, missed=False).gaps == 1

    def test_reused_pid_is_another_child(self) -> None:
        """The same pid with a later start: the first one ended, and the new one counts from its start."""
        ledger = ProcessLedger()
        ledger.read([target(0)], SECOND, missed=False)
        ledger.read([target(0), row(101, 40)], SECOND, missed=False)
        again = row(101, 3)._replace(key=(101, 7000))
        assert ledger.read([target(0, 40), again], SECOND, missed=False).cpu_ns == 43


SETTLED = {
    "a child that was watched counts with the rest": (4.0, [3.5], 0.5, 0),
    "a child that was not seen counts whole": (0.5, [], 0.5, 1),
    "a chain counts with the rest of both": (5.75, [3.5, 2.0], 0.25, 0),
    "more than a watched thread could use is of another child": (5.0, [3.5], 1.5, 1),
    "more than the cores could use is from before": (4.0, [], 0.0, 1),
    "nothing booked means that SIGCHLD is ignored": (0.0, [3.5], 0.0, 1),
    "nothing happened": (0.0, [], 0.0, 0),
}


class TestSettled:
    """Readings in which each parent was read after it was charged, in steps of a tick."""

    @pytest.mark.parametrize(("charged", "watched", "seconds", "gaps"), SETTLED.values(), ids=SETTLED.keys())
    def test_charged_target_counts_what_is_new(
        self, charged: float, watched: list[float], seconds: float, gaps: int
    ) -> None:
        """One reading of one second on two cores; each watched process is a child of the one before, and has ended."""
        ledger = ProcessLedger(2, 2 * TICK)
        chain = [row(101 + i, int(cpu_s * SECOND), parent=100 + i) for i, cpu_s in enumerate(watched)]
        ledger.read([target(0), *chain], SECOND, missed=False)
        tree = ledger.read([target(0, int(charged * SECOND))], SECOND, missed=False, is_settled=True)
        assert (tree.cpu_ns, tree.reaped_ns, tree.gaps) == (seconds * SECOND, seconds * SECOND, gaps)

    def test_child_that_was_not_booked_does_not_hide_a_later_one(self) -> None:
        """The gap is in the reading of its end, and nothing of it but the grain is expected later."""
        ledger = ProcessLedger(2, 2 * TICK)
        ledger.read([target(0), row(101, SECOND)], SECOND, missed=False)
        assert ledger.read([target(0)], SECOND, missed=False, is_settled=True).gaps == 1
        tree = ledger.read([target(0, SECOND)], SECOND, missed=False, is_settled=True)
        assert tree.cpu_ns == SECOND - 2 * TICK

    def test_many_short_children_add_up_to_their_time(self) -> None:
        """Each is read after 5 ms and ends after 6; what the steps of the parent's charge hide is made up for later."""
        ledger, charged_ns, reaped_ns = ProcessLedger(1, 2 * TICK), 0, 0
        ledger.read([target(0)], SECOND, missed=False)
        for pid in range(101, 201):
            child = row(pid, 5_000_000)
            ledger.read([target(0, reaped_ns), child], SECOND, missed=False, is_settled=True)
            charged_ns += 6_000_000
            reaped_ns = charged_ns // TICK * TICK
            tree = ledger.read([target(0, reaped_ns)], SECOND, missed=False, is_settled=True)
            assert abs(tree.cpu_ns - charged_ns) <= 2 * TICK
        assert tree.gaps == 0

    def test_parents_that_end_pass_on_what_the_steps_hid(self) -> None:
        """Each has a child that was seen for 9 ms and of which its parent shows nothing; the target shows both."""
        ledger, charged_ns, reaped_ns = ProcessLedger(1, 2 * TICK), 0, 0
        ledger.read([target(0)], SECOND, missed=False)
        for pid in range(101, 201, 2):
            middle, child = row(pid, 0), row(pid + 1, 9_000_000, parent=pid)
            for descendants in ([middle, child], [middle]):
                ledger.read([target(0, reaped_ns), *descendants], SECOND, missed=False, is_settled=True)
            charged_ns += 9_000_000
            reaped_ns = charged_ns // TICK * TICK
            tree = ledger.read([target(0, reaped_ns)], SECOND, missed=False, is_settled=True)
            assert abs(tree.cpu_ns - charged_ns) <= 2 * TICK


def test_sum_of_a_random_tree_is_what_its_processes_used() -> None:
    """
    Grow, end and reap processes at random, and read the tree in between.

    The sum is exact: all CPU time since the first reading, of the living and of those that were waited for.
    """
    chance = random.Random(27)
    for _ in range(200):
        ledger, used = ProcessLedger(), 0
        rows = {TARGET: target(0)}
        ledger.read(list(rows.values()), SECOND, missed=False)
        unread: set[int] = set()
        pid = TARGET
        for _ in range(60):
            what, who = chance.choice(["run", "run", "fork", "end", "read"]), chance.choice(list(rows))
            if what == "run":
                used += 10
                rows[who] = rows[who]._replace(cpu_ns=rows[who].cpu_ns + 10)
            elif what == "fork":
                pid += 1
                rows[pid] = row(pid, 0, parent=who)
                unread.add(pid)
            elif what == "end" and who != TARGET and all(each.parent != who for each in rows.values()):
                ended = rows.pop(who)
                parent = rows[ended.parent]
                booked_ns = parent.reaped_ns + ended.cpu_ns + ended.reaped_ns
                rows[ended.parent] = parent._replace(reaped_ns=booked_ns)
            elif what == "read":
                rows_now = [each._replace(is_young=number in unread) for number, each in rows.items()]
                assert ledger.read(rows_now, SECOND, missed=False).cpu_ns == used
                unread.clear()
