"""The arithmetic between two snapshots."""

import math
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.snapshots import IDENTITY, SECOND, Thread, pairs, roster, snapshot, with_extras
from vitalsd.snapshot import Measurement, Snapshot, contradiction, measure

MS = 1_000_000


@given(pairs())
def test_measure_of_any_two_snapshots_is_finite_and_not_negative(pair: tuple[Snapshot, Snapshot]) -> None:
    """For any answers of the kernel, no CPU time is below zero and every rate is finite."""
    m = measure(*pair)
    assert m.elapsed_ns > 0
    assert m.suspended_ns >= 0
    assert min(m.cpu_ns, m.living_ns, m.exited_ns, m.cpu_error_ns, *m.thread_cpu_ns, 0) == 0
    assert len(m.thread_cpu_ns) == len(m.last.roster)
    for i in range(len(m.last.roster)):
        assert math.isfinite(m.thread_cpu_ns[i] / m.elapsed_ns)
        assert m.thread_error_ns(i) >= 0
    for part, whole in zip(m.thread_user_ns or (), m.thread_cpu_ns, strict=m.thread_user_ns is not None):
        assert part is None or 0 <= part <= whole
    assert m.user_ns is None or 0 <= m.user_ns <= m.cpu_ns


@given(pairs())
def test_measure_cpu_accounting_balances_to_the_nanosecond(pair: tuple[Snapshot, Snapshot]) -> None:
    """Process = living + exited + unattributed, and living is the sum over the threads, for any counters."""
    m = measure(*pair)
    assert m.cpu_ns == m.living_ns + m.exited_ns + m.unattributed_ns
    assert m.living_ns == sum(m.thread_cpu_ns)


lives = st.dictionaries(st.integers(1, 30), st.tuples(st.integers(0, SECOND), st.integers(0, SECOND)), max_size=10)


@given(stayed=lives, went=lives, came=lives, before=st.integers(0, SECOND))
def test_measure_of_exact_counters_has_nothing_unattributed(
    stayed: dict[int, tuple[int, int]],
    went: dict[int, tuple[int, int]],
    came: dict[int, tuple[int, int]],
    before: int,
) -> None:
    """With exact counters each nanosecond belongs to a living, a newborn or an exited thread."""
    a = [(tid, 1, cpu) for tid, (cpu, _) in stayed.items()]
    gone = [(tid + 100, 1, cpu) for tid, (cpu, _) in went.items()]
    b = [(tid, 1, cpu + ran) for tid, (cpu, ran) in stayed.items()]
    born = [(tid + 200, 2, ran) for tid, (_, ran) in came.items()]
    burnt = sum(ran for _, ran in (*stayed.values(), *went.values(), *came.values()))
    at_first = before + sum(cpu for _, _, cpu in a + gone)
    m = measure(
        snapshot(0, sorted(a + gone), cpu_ns=at_first), snapshot(SECOND, sorted(b + born), cpu_ns=at_first + burnt)
    )
    assert m.cpu_ns == burnt
    assert m.exited_ns == sum(ran for _, ran in went.values())
    assert m.unattributed_ns == 0
    assert {m.last.roster.tids[i] for i in m.born} == {tid + 200 for tid in came}
    assert m.warnings == ()


def test_measure_rate_is_over_the_measured_time() -> None:
    """300 ms of CPU time in 1200 ms measured is that, whatever window was asked for."""
    m = measure(snapshot(0, [(1, 1, 0)]), snapshot(1200 * MS, [(1, 1, 300 * MS)]))
    assert (m.elapsed_ns, m.cpu_ns, m.thread_cpu_ns) == (1200 * MS, 300 * MS, [300 * MS])


def test_measure_of_a_reused_tid_counts_its_own_time() -> None:
    """A thread is its tid and its birth: the newcomer's life counts for itself, not minus the other's."""
    m = measure(
        snapshot(0, [(7, 1, 900 * MS)]),
        snapshot(SECOND, [(7, 2, 950 * MS)], cpu_ns=1850 * MS),
    )
    assert m.thread_cpu_ns == [950 * MS]
    assert m.born == {0}
    assert (m.exited_ns, m.unattributed_ns) == (0, 0)


def test_measure_of_a_counter_that_went_back_is_null_with_a_warning() -> None:
    """Neither a thread nor the process ever has negative CPU time, and the answer warns."""
    m = measure(snapshot(0, [(1, 1, 50), (2, 1, 5)]), snapshot(SECOND, [(1, 1, 40), (2, 1, 6)], cpu_ns=7))
    assert (m.cpu_ns, m.thread_cpu_ns) == (0, [0, 1])
    assert m.unknown == {0}
    assert m.warnings == (
        "the CPU counter of thread 1 went backwards",
        "the CPU clock of the process went backwards and counts as 0",
    )


@pytest.mark.parametrize("stated", [{"thread_grain_ns": 10 * MS}, {"thread_lag_ns": 5 * MS}, {"skew_ns": 5 * MS}])
def test_measure_of_a_thread_above_its_process_is_null(stated: dict[str, int]) -> None:
    """Beyond the stated errors of both figures; the process's total stays, and the rest is unattributed."""
    for excess_ns, unknown in ((9 * MS, set()), (11 * MS, {1})):
        first = snapshot(0, [(1, 1, 0), (2, 1, 0)], **stated)
        threads: list[Thread] = [(1, 1, 3 * MS), (2, 1, 30 * MS + excess_ns)]
        m = measure(first, snapshot(SECOND, threads, cpu_ns=30 * MS, **stated))
        assert m.unknown == unknown
        assert m.cpu_ns == 30 * MS == m.living_ns + m.exited_ns + m.unattributed_ns
        assert (m.thread_cpu_ns[1] == 0) is bool(unknown)
        expected = "thread 2 used 41.0 ms of CPU while the process used 30.0 ms"
        assert (m.contradiction, m.warnings) == ((expected, (expected,)) if unknown else (None, ()))
        assert contradiction(m.first, m.last) == m.contradiction


def test_measure_of_idle_threads_in_a_busy_process_is_null() -> None:
    """Beyond the stated errors: 3 threads of a lag of 4 ms may hide 12 ms. Nothing counts as exited either."""
    threads: list[Thread] = [(1, 1, 7), (2, 1, 7), (3, 1, 7)]
    first = snapshot(0, threads, thread_lag_ns=4 * MS)
    hidden = measure(first, snapshot(SECOND, threads, cpu_ns=12 * MS, thread_lag_ns=4 * MS))
    assert (hidden.unknown, hidden.contradiction) == (frozenset(), None)
    last = snapshot(SECOND, threads, cpu_ns=13 * MS, thread_lag_ns=4 * MS)
    m = measure(first, last)
    assert m.unknown == {0, 1, 2}
    assert (m.cpu_ns, m.living_ns, m.exited_ns) == (13 * MS - 21, 0, 0)
    assert m.contradiction == contradiction(first, last) == "no thread used CPU while the process used 13.0 ms"


def test_contradiction_of_idle_threads_beside_a_birth_is_none() -> None:
    """A thread that is new may have been made by one that came and went."""
    first = snapshot(0, [(1, 1, 7)])
    m = measure(first, snapshot(SECOND, [(1, 1, 7), (2, 5, 0)], cpu_ns=500 * MS))
    assert (m.unknown, m.exited_ns) == (frozenset(), 500 * MS - 7)


def test_measure_across_a_reread_has_no_thread_figures() -> None:
    """The threads have no figure, and the process's total stays."""
    m = measure(snapshot(0, [(1, 1, 5)]), snapshot(SECOND, [(1, 1, 9)], reading=1))
    assert (set(m.unknown), m.thread_cpu_ns, m.cpu_ns) == ({0}, [0], 4)
    assert "contradicted each other" in m.warnings[0]


@given(pairs())
def test_contradiction_equals_that_of_measure(pair: tuple[Snapshot, Snapshot]) -> None:
    """Found with less arithmetic where the threads are the same."""
    first, last = pair
    assert contradiction(first, last) == measure(first, last).contradiction
    same = replace(last, roster=first.roster, thread_cpu_ns=first.thread_cpu_ns[:])
    same = replace(same, thread_figures=None)
    assert contradiction(first, same) == measure(replace(first, thread_figures=None), same).contradiction


@given(pairs())
def test_measure_of_an_equal_copy_of_a_roster_is_the_same(pair: tuple[Snapshot, Snapshot]) -> None:
    """Identity of rosters saves time and decides nothing."""

    def figures(m: Measurement) -> dict[str, object]:
        return {each.name: getattr(m, each.name) for each in fields(m) if each.name != "last"}

    first = pair[0]
    last = replace(first, monotonic_ns=pair[1].monotonic_ns, cpu_ns=pair[1].cpu_ns)
    copy = replace(last, roster=replace(last.roster))
    assert copy.roster is not first.roster
    assert figures(measure(first, copy)) == figures(measure(first, last))
    assert contradiction(first, copy) == contradiction(first, last)


def test_roster_shares_what_is_equal_with_the_one_before() -> None:
    """The same object if all is equal; the same columns of ids and starts if a thread was renamed."""
    before = roster([(1, 1, 0), (2, 1, 0)])
    assert roster([(1, 1, 0), (2, 1, 0)]).sharing(before) is before
    renamed = roster([(1, 1, 0), (2, 1, 0)], ["main", "render"]).sharing(before)
    assert renamed.names == ("main", "render")
    assert renamed.tids is before.tids
    assert renamed.births is before.births
    assert (renamed == before, renamed.has_same_threads(before)) == (False, True)
    reused = roster([(1, 1, 0), (2, 9, 0)])
    assert reused.sharing(before) is reused
    assert not reused.has_same_threads(before)


def test_measure_across_an_exec_treats_every_thread_as_new() -> None:
    """The old leader's counter is not subtracted from the thread that took its id over."""
    first = snapshot(0, [(1, 1, 500), (2, 1, 700)], image=("old",))
    m = measure(first, snapshot(SECOND, [(1, 1, 800)], cpu_ns=1500, image=("new",)))
    assert m.born == {0}
    assert m.thread_cpu_ns == [0]
    assert m.cpu_ns == 300
    assert "executed another program" in m.warnings[0]


def test_measure_with_an_unknown_image_is_no_exec() -> None:
    """If the kernel does not show the image, nothing is claimed about it."""
    m = measure(snapshot(0, [(1, 1, 5)], image=None), snapshot(SECOND, [(1, 1, 9)], image=("new",)))
    assert m.thread_cpu_ns == [4]
    assert m.warnings == ()


def test_measure_across_sleep_excludes_it_with_a_warning() -> None:
    """Rates are over the time awake; a difference between the clocks below 20 ms is no sleep."""
    first = snapshot(0, [(1, 1, 0)])
    slept = measure(first, snapshot(SECOND, [(1, 1, 5)], boottime_ns=9 * SECOND))
    assert (slept.elapsed_ns, slept.suspended_ns) == (SECOND, 8 * SECOND)
    assert slept.warnings == ("the machine slept 8.0 s inside the window",)
    assert measure(first, snapshot(SECOND, [(1, 1, 5)], boottime_ns=SECOND + 19 * MS)).suspended_ns == 0


@pytest.mark.parametrize("later", [0, -1])
def test_measure_of_a_window_without_length_raises(later: int) -> None:
    """No rate is made from two snapshots of the same instant or in the wrong order."""
    with pytest.raises(ValueError, match="before first"):
        measure(snapshot(5, []), snapshot(5 + later, []))


def test_measure_user_and_system_time_add_up_to_cpu_time() -> None:
    """User and system time of a thread add up to its CPU time even though ticks are coarser."""
    threads: list[Thread] = [(1, 1, 0)]
    first = with_extras(snapshot(0, threads), user_ns=0, system_ns=0)
    last = with_extras(snapshot(SECOND, [(1, 1, 30 * MS)]), user_ns=10 * MS, system_ns=20 * MS)
    m = measure(first, last)
    assert m.thread_user_ns == [30 * MS]
    assert m.user_ns == 10 * MS


def test_measure_warnings_of_both_snapshots_appear_once() -> None:
    """A warning of both snapshots is in the answer once."""
    m = measure(snapshot(0, [], warnings=("a", "b")), snapshot(1, [], warnings=("b", "c")))
    assert m.warnings == ("a", "b", "c")


def test_identity_of_a_reused_pid_differs() -> None:
    """The same pid started at another tick has another start_id."""
    assert IDENTITY.start_id == "4242-217667-0b7e5a4e"
    assert IDENTITY._replace(start_key=1).start_id != IDENTITY.start_id


@given(st.data())
def test_measure_of_a_thread_that_ran_while_read_is_within_its_error(data: st.DataObject) -> None:
    """A thread runs or does not: between its reading and its snapshot's instant it may have run all the time."""
    skew_ns = [data.draw(st.integers(0, 1_000_000)) for _ in range(2)]
    read_early_ns = [data.draw(st.integers(0, each)) for each in skew_ns]
    burnt_meanwhile_ns = [data.draw(st.integers(0, each)) for each in read_early_ns]
    burnt_between_ns = data.draw(st.integers(1, 50_000_000))
    read_ns = burnt_meanwhile_ns[0] + burnt_between_ns
    first = snapshot(SECOND, [(1, 1, 0)], skew_ns=skew_ns[0])
    last = snapshot(SECOND + 60_000_000, [(1, 1, read_ns)], skew_ns=skew_ns[1])
    m = measure(first, last)
    true_ns = burnt_between_ns + burnt_meanwhile_ns[1]
    assert abs(m.thread_cpu_ns[0] - true_ns) <= m.thread_error_ns(0)
    assert abs(m.cpu_ns - true_ns) <= m.cpu_error_ns
