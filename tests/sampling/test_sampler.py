"""Windows and how callers share them, over a source that counts its reads, hangs or fails."""

import asyncio
import threading
import time
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

import pytest

from support.fake_process import IDENTITY, FakeSource, Process
from vitalsd.admission import OWNER, BusyError, Peer
from vitalsd.contract.limits import WINDOWS
from vitalsd.recording.recorder import NotRecordingError, RecorderConfig
from vitalsd.sampling.sampler import Sampler, sample
from vitalsd.sampling.target_pool import Stream, Targets
from vitalsd.sampling.windows import BUSY_WINDOW_COUNT, REUSE_PART
from vitalsd.snapshot import Identity, Part, Snapshot
from vitalsd.sources.base import KernelError, NoSuchProcessError, Source, TargetGoneError


class CountingSource(FakeSource):
    """A fake on the real clock. Its thread uses half a core; it records the threads that called it, and how often."""

    def __init__(self) -> None:
        super().__init__(Process(), step_ns=0)
        self.snapshots = 0
        self.callers: set[int] = set()
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.error: Exception | None = None

    def identity(self) -> Identity:
        self.callers.add(threading.get_ident())
        return super().identity()

    def snapshot(self, *, parts: Part = Part.NONE, names: bool = True) -> Snapshot:
        self.callers.add(threading.get_ident())
        self.snapshots += 1
        self.may_answer.wait(20)
        if self.error is not None:
            raise self.error
        self.process.monotonic_ns = time.monotonic_ns()
        self.process.threads[1, 1] = "main", self.process.monotonic_ns // 2
        return super().snapshot(parts=parts, names=names)

    def close(self) -> None:
        self.callers.add(threading.get_ident())
        super().close()


def conforms(source: CountingSource) -> Source:
    return source


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run a test on a loop that tolerates no exception that is never retrieved."""
    unseen: list[dict[str, Any]] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unseen.append(context))
        await asyncio.wait_for(main, 20)

    asyncio.run(watched())
    assert unseen == []


def test_window_under_a_busy_event_loop_keeps_its_length() -> None:
    """The second snapshot is taken when it is due, also while the loop is busy; only the answer is late."""

    async def main() -> None:
        sampler = Sampler(CountingSource)
        begun = time.monotonic()
        window = asyncio.create_task(sampler.window(200))
        while not sampler.snapshots_taken:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        time.sleep(1.5)
        m = await window
        assert time.monotonic() - begun > 1.5
        assert m.elapsed_ns < 1_000_000_000
        await sampler.close()

    run(main())


def test_window_has_the_requested_length_and_rate() -> None:
    """A window never ends early by more than a twentieth, and its figure is the source's rate."""

    async def main() -> None:
        source = CountingSource()
        sampler = Sampler(lambda: source)
        m = await sampler.window(100)
        assert m.elapsed_ns >= 95_000_000
        assert m.cpu_ns == pytest.approx(m.elapsed_ns / 2, abs=2)
        assert sampler.pid == IDENTITY.pid
        await sampler.close()
        assert source.closed

    run(main())


def test_snapshot_that_fails_is_not_counted() -> None:
    """Neither /info nor a scrape counts it, because it was not taken."""

    async def main() -> None:
        source = CountingSource()
        sampler = Sampler(lambda: source)
        await sampler.snapshot()
        source.error = KernelError("no")
        await asyncio.sleep(0.05)
        with pytest.raises(KernelError):
            await sampler.snapshot()
        assert (sampler.snapshots_taken, source.snapshots) == (1, 2)
        await sampler.close()

    run(main())


def test_windows_of_300_callers_share_few_snapshots() -> None:
    """300 callers at the same time cause fewer than ten snapshots, and get the same measurement."""

    async def main() -> None:
        source = CountingSource()
        sampler = Sampler(lambda: source)
        answers = await asyncio.gather(*(sampler.window(200) for _ in range(300)))
        assert source.snapshots < 10
        assert sampler.snapshots_taken == source.snapshots
        assert len({id(m) for m in answers}) < 5
        await sampler.close()

    run(main())


def test_windows_of_different_length_share_their_first_snapshot() -> None:
    """Windows of different length that start together begin with one snapshot and end each on its own."""

    async def main() -> None:
        sampler = Sampler(CountingSource)
        short, long = await asyncio.gather(sampler.window(100), sampler.window(200))
        assert short.first is long.first
        assert long.elapsed_ns - short.elapsed_ns >= 80_000_000
        await sampler.close()

    run(main())


def test_windows_in_sequence_do_not_overlap() -> None:
    """The second of two windows in a row does not begin before the first one ended."""

    async def main() -> None:
        sampler = Sampler(CountingSource)
        first = await sampler.window(50)
        second = await sampler.window(50)
        assert second.first.monotonic_ns >= first.last.monotonic_ns - 2_500_000
        assert second.last is not first.last
        await sampler.close()

    run(main())


def test_windows_started_one_by_one_are_shared_without_refusal() -> None:
    """However many ask for windows of one length, and whenever, a few dozen are open and no caller is refused."""

    async def main() -> None:
        source = CountingSource()
        sampler = Sampler(lambda: source)
        asking, most = [], 0
        for _ in range(400):
            asking.append(asyncio.ensure_future(sampler.window(1000)))
            await asyncio.sleep(0.002)
            most = max(most, len(sampler._windows))
        answers = await asyncio.gather(*asking)
        assert most <= BUSY_WINDOW_COUNT + 2 * REUSE_PART
        assert source.snapshots <= 2 * most + 10
        assert all(m.elapsed_ns > 900_000_000 for m in answers)
        await sampler.close()

    run(main())


def test_windows_beyond_64_distinct_ones_are_refused() -> None:
    """The 65th different window is refused, a caller that joins an open one is not, and later there is room."""

    async def main() -> None:
        sampler = Sampler(CountingSource)
        open_ones = [asyncio.ensure_future(sampler.window(500 + i)) for i in range(WINDOWS)]
        while len(sampler._windows) < WINDOWS:
            await asyncio.sleep(0.001)
        with pytest.raises(BusyError, match="64 different windows"):
            await sampler.window(400)
        await asyncio.gather(*open_ones)
        await sampler.window(10)
        await sampler.close()

    run(main())


def test_snapshots_of_a_slow_kernel_queue_at_most_one() -> None:
    """While one snapshot is being taken at most one more waits for its turn, however many callers come."""

    async def main() -> None:
        source = CountingSource()
        sampler = Sampler(lambda: source)
        await sampler.identity()
        source.may_answer.clear()
        asking = []
        for _ in range(50):
            asking.append(asyncio.ensure_future(sampler.window(10)))
            await asyncio.sleep(0.002)
        assert sampler.worker.pending <= 1
        source.may_answer.set()
        await asyncio.gather(*asking)
        await sampler.close()

    run(main())


def test_stream_at_the_window_limit_skips_and_counts_a_window() -> None:
    """An open stream stays open: it has windows when there is room again, and counts those that it missed."""

    async def main() -> None:
        sampler = Sampler(CountingSource)
        crowd = [asyncio.ensure_future(sampler.window(600 + i)) for i in range(WINDOWS)]
        while len(sampler._windows) < WINDOWS:
            await asyncio.sleep(0.001)
        stream = Stream(sampler, 20)
        assert (await anext(stream)).elapsed_ns > 0
        assert stream.dropped > 0
        await asyncio.gather(*crowd)
        await stream.close()
        await sampler.close()

    run(main())


def test_source_calls_run_on_one_thread() -> None:
    """Opening, reading and closing happen on one thread that is not the event loop's."""

    async def main() -> None:
        source = CountingSource()
        sampler = Sampler(lambda: source)
        await asyncio.gather(*(sampler.window(20) for _ in range(20)))
        await sampler.close()
        assert len(source.callers) == 1
        assert threading.get_ident() not in source.callers

    run(main())


def test_hung_kernel_read_delays_no_other_target() -> None:
    """While one target's read hangs the loop turns and other targets answer; closing does not wait for it."""

    async def main() -> None:
        stuck, healthy = CountingSource(), CountingSource()
        stuck.may_answer.clear()
        sources = {1: stuck, 2: healthy}
        targets = Targets(Sampler(CountingSource), sources.__getitem__)

        async def ask(pid: int) -> None:
            async with targets.target(pid) as sampler:
                await sampler.window(20)

        waiting = asyncio.create_task(ask(1))
        while not stuck.snapshots:
            await asyncio.sleep(0.005)
        await asyncio.wait_for(ask(2), 5)
        begun = time.monotonic()
        await asyncio.sleep(0.01)
        assert time.monotonic() - begun < 5
        assert not waiting.done()
        stuck.may_answer.set()
        await waiting
        await targets.close()

    run(main())


def test_window_cancelled_by_one_caller_serves_the_others() -> None:
    """If one of several callers of a window is cancelled, the others get their answer."""

    async def main() -> None:
        source = CountingSource()
        sampler = Sampler(lambda: source)
        callers = [asyncio.create_task(sampler.window(100)) for _ in range(10)]
        await asyncio.sleep(0.03)
        for caller in callers[::2]:
            caller.cancel()
        answers = await asyncio.gather(*callers, return_exceptions=True)
        assert all(isinstance(answer, asyncio.CancelledError) for answer in answers[::2])
        assert not any(isinstance(answer, BaseException) for answer in answers[1::2])
        assert source.snapshots < 5
        await sampler.close()

    run(main())


def test_window_without_callers_that_fails_logs_nothing() -> None:
    """If the target exits after all callers have gone, no error is logged."""

    async def main() -> None:
        source = CountingSource()
        sampler = Sampler(lambda: source)
        caller = asyncio.create_task(sampler.window(60))
        await asyncio.sleep(0.02)
        caller.cancel()
        source.error = TargetGoneError("target 1 has exited")
        await asyncio.sleep(0.1)
        await sampler.close()
        import gc

        gc.collect()
        await asyncio.sleep(0)

    run(main())


def test_window_of_a_target_that_exits_fails_for_all_callers() -> None:
    """All callers that wait get the reason, and so do later ones."""

    async def main() -> None:
        source = CountingSource()
        sampler = Sampler(lambda: source)
        callers = [asyncio.create_task(sampler.window(60)) for _ in range(5)]
        await asyncio.sleep(0.02)
        source.error = TargetGoneError("target 1 has exited")
        answers = await asyncio.gather(*callers, return_exceptions=True)
        assert [str(answer) for answer in answers] == ["target 1 has exited"] * 5
        with pytest.raises(TargetGoneError):
            await sampler.window(10)
        await sampler.close()

    run(main())


def test_caller_that_gets_the_end_finds_it_in_the_record() -> None:
    """The record ends with the first read that finds the target gone, not with its next own one, and once."""

    async def main() -> None:
        source = CountingSource()
        sampler = Sampler(lambda: source, recording=RecorderConfig(3600))
        await sampler.window(10)
        source.error = TargetGoneError("target 1 has exited")
        with pytest.raises(TargetGoneError):
            await sampler.window(10)
        assert sampler.recorder.record is not None
        assert [event.kind for event in sampler.recorder.record.events] == ["exited"]
        with pytest.raises(TargetGoneError):
            await sampler.window(10)
        await sampler.close()
        assert [event.kind for event in sampler.recorder.record.events] == ["exited"]

    run(main())


def test_window_without_a_caller_is_dropped() -> None:
    """Its place is free at once, and its second snapshot is not taken."""

    async def main() -> None:
        source = CountingSource()
        sampler = Sampler(lambda: source)
        for _ in range(3):
            asking = [asyncio.ensure_future(sampler.window(60_000 - i)) for i in range(WINDOWS)]
            while len(sampler._windows) < WINDOWS:
                await asyncio.sleep(0.005)
            for each in asking:
                each.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
            assert (len(sampler._windows), sampler._windows.callers) == (0, 0)
        await sampler.window(10)
        await sampler.close()

    run(main())


def test_window_of_two_callers_survives_one_that_leaves() -> None:
    """The other caller gets the measurement of the shared window."""

    async def main() -> None:
        sampler = Sampler(CountingSource)
        await sampler.window(10)
        first, second = (asyncio.ensure_future(sampler.window(200)) for _ in range(2))
        while not sampler._windows:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        assert len(sampler._windows) == 1
        first.cancel()
        assert (await second).elapsed_ns >= 190_000_000
        assert sampler._windows.callers == 0
        await sampler.close()

    run(main())


def test_windows_of_one_kind_of_client_take_no_slot_of_another() -> None:
    """While TCP has 64 windows and one other user has 32, the Unix socket and another user still have theirs."""

    async def main() -> None:
        sampler = Sampler(CountingSource)
        crowd = [(Peer("tcp"), WINDOWS), (Peer("other", 1002), WINDOWS // 2)]
        asking = [
            asyncio.ensure_future(sampler.window(5000 + 100 * number + i, peer=peer))
            for number, (peer, share) in enumerate(crowd)
            for i in range(share)
        ]
        while len(sampler._windows) < WINDOWS * 3 // 2:
            await asyncio.sleep(0.005)
        for peer, _ in crowd:
            with pytest.raises(BusyError):
                await sampler.window(20, peer=peer)
        for peer in (OWNER, Peer("other", 1003)):
            await sampler.window(20, peer=peer)
        for each in asking:
            each.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        await sampler.close()

    run(main())


def ask(targets: Targets, pid: int, window_ms: int = 10, peer: Peer = OWNER) -> Coroutine[Any, Any, None]:
    async def asked() -> None:
        async with targets.target(pid, peer) as sampler:
            await sampler.window(window_ms)

    return asked()


def test_target_beyond_the_limit_is_refused() -> None:
    """Beyond the limit a new target is BusyError, while one that is open already may still be asked."""

    async def main() -> None:
        targets = Targets(Sampler(CountingSource), lambda _: CountingSource(), limit=2)
        async with targets.target(1), targets.target(2):
            with pytest.raises(BusyError, match="2 other processes"):
                await ask(targets, 3)
            await ask(targets, 1)
        await targets.close()

    run(main())


def test_target_beyond_the_limit_evicts_the_one_idle_for_longest() -> None:
    """A target that hangs or is in use is not closed for a new one."""

    async def main() -> None:
        opened = {pid: CountingSource() for pid in range(1, 6)}
        targets = Targets(Sampler(CountingSource), opened.__getitem__, limit=3)
        opened[1].may_answer.clear()
        stuck = asyncio.create_task(ask(targets, 1))
        while not opened[1].snapshots:
            await asyncio.sleep(0.005)
        stuck.cancel()
        await ask(targets, 2)
        await ask(targets, 3)
        await ask(targets, 2)
        async with targets.target(4):
            await asyncio.sleep(0.05)
            assert [pid for pid, source in opened.items() if source.closed] == [3]
            async with targets.target(2), targets.target(5):
                with pytest.raises(BusyError):
                    await ask(targets, 3)
                async with targets.target(2, Peer("tcp")):
                    pass
        opened[1].may_answer.set()
        await targets.close()


def test_target_is_refused_while_reads_of_as_many_as_the_limit_hang() -> None:
    """Each of them keeps a thread, in use or not."""

    async def main() -> None:
        opened = {pid: CountingSource() for pid in range(1, 4)}
        targets = Targets(Sampler(CountingSource), opened.__getitem__, limit=2)
        for pid in (1, 2):
            opened[pid].may_answer.clear()
            stuck = asyncio.create_task(ask(targets, pid))
            while not opened[pid].snapshots:
                await asyncio.sleep(0.005)
            stuck.cancel()
            await asyncio.sleep(0)
        with pytest.raises(BusyError, match="reads of 2 other processes hang"):
            await ask(targets, 3, peer=Peer("tcp"))
        for source in opened.values():
            source.may_answer.set()
        while any(pooled.is_busy for pooled in targets._pooled.values()):
            await asyncio.sleep(0.005)
        await ask(targets, 3)
        await targets.close()

    run(main())


def test_target_idle_is_closed_and_a_used_one_is_not() -> None:
    """A target without a caller for a while gives its descriptors back."""

    async def main() -> None:
        source = CountingSource()
        targets = Targets(Sampler(CountingSource), lambda _: source, idle_s=0.05)
        async with targets.target(1) as sampler:
            await sampler.window(10)
            await asyncio.sleep(0.15)
            assert not source.closed
        for _ in range(200):
            if source.closed:
                break
            await asyncio.sleep(0.01)
        assert source.closed
        await targets.close()

    run(main())


def test_pid_after_target_gone_is_opened_again() -> None:
    """After TargetGoneError the same pid may be another process: the dead one's source is not kept."""

    async def main() -> None:
        opened: list[CountingSource] = []

        def open_source(pid: int) -> Source:
            opened.append(CountingSource())
            if len(opened) == 1:
                opened[0].error = TargetGoneError(f"target {pid} has exited")
            return opened[-1]

        targets = Targets(Sampler(CountingSource), open_source)
        with pytest.raises(TargetGoneError):
            await ask(targets, 7)
        await asyncio.sleep(0.01)
        await ask(targets, 7)
        assert [source.error is None for source in opened] == [False, True]
        await targets.close()
        assert all(source.closed for source in opened)

    run(main())


def pool_of_live_pids() -> tuple[Targets, list[CountingSource]]:
    """Targets of which any pid can be opened, and the sources that were."""
    opened: list[CountingSource] = []

    def open_source(pid: int) -> Source:
        opened.append(CountingSource())
        return opened[-1]

    return Targets(Sampler(CountingSource), open_source), opened


def test_pid_reused_while_idle_is_opened_again() -> None:
    """A caller that asks for a live process does not get the end of the one before it, of the same pid."""

    async def main() -> None:
        targets, opened = pool_of_live_pids()
        await ask(targets, 7)
        opened[0].error = TargetGoneError("target 7 has exited")
        await asyncio.gather(ask(targets, 7), ask(targets, 7))
        assert len(opened) == 2
        opened[1].error = KernelError("no")
        with pytest.raises(KernelError):
            await ask(targets, 7)
        await targets.close()
        assert all(source.closed for source in opened)

    run(main())


def test_pid_reused_while_in_use_is_opened_again() -> None:
    """A caller waits for a long window of the dead one: the next caller gets the living one all the same."""

    async def main() -> None:
        targets, opened = pool_of_live_pids()
        waiting = asyncio.create_task(ask(targets, 7, 300))
        await asyncio.sleep(0.05)
        opened[0].error = TargetGoneError("target 7 has exited")
        await ask(targets, 7)
        with pytest.raises(TargetGoneError):
            await waiting
        await targets.close()
        assert [source.closed for source in opened] == [True, True]

    run(main())


def test_target_stays_open_for_a_caller_that_waits_for_its_opening() -> None:
    """Its first asker left while it opened; the second counts, and a third process does not take its place."""

    async def main() -> None:
        may_open = threading.Event()

        def open_source(pid: int) -> Source:
            if pid == 1:
                may_open.wait(5)
            return CountingSource()

        targets = Targets(Sampler(CountingSource), open_source, limit=1)
        first = asyncio.create_task(ask(targets, 1))
        await asyncio.sleep(0.05)
        first.cancel()
        second = asyncio.create_task(ask(targets, 1, 100))

        async def insist() -> None:
            while True:
                try:
                    return await ask(targets, 2)
                except BusyError:
                    await asyncio.sleep(0)

        third = asyncio.create_task(insist())
        await asyncio.sleep(0.05)
        may_open.set()
        await second
        await third
        await targets.close()

    run(main())


def test_caller_in_a_window_gets_an_error_when_the_sampler_closes() -> None:
    """The next process of a name takes the place of one that has exited: no window is left without an answer."""

    async def main() -> None:
        sampler = Sampler(CountingSource)
        waiting = asyncio.create_task(sampler.window(5000))
        await asyncio.sleep(0.05)
        await sampler.close()
        with pytest.raises(TargetGoneError):
            await waiting
        for ask_late in (sampler.window(10), sampler.snapshot()):
            with pytest.raises(TargetGoneError):
                await asyncio.wait_for(ask_late, 5)
        await sampler.close()

    run(main())


def test_target_that_cannot_be_opened_takes_no_slot() -> None:
    """A pid that does not exist is asked for again and again and never fills the list."""

    async def main() -> None:
        def open_source(pid: int) -> Source:
            raise NoSuchProcessError(f"no process has pid {pid}")

        targets = Targets(Sampler(CountingSource), open_source, limit=1)
        for pid in range(1, 6):
            with pytest.raises(NoSuchProcessError, match=str(pid)):
                await ask(targets, pid)
            await asyncio.sleep(0.01)
        await targets.close()

    run(main())


def test_default_target_by_its_pid_opens_nothing() -> None:
    """Asking for the sidecar's own target by number opens nothing anew."""

    async def main() -> None:
        def open_source(pid: int) -> Source:
            raise AssertionError(pid)

        default = Sampler(CountingSource)
        await default.identity()
        targets = Targets(default, open_source)
        async with targets.target(IDENTITY.pid) as same, targets.target(None) as default_again:
            assert same is default_again is default
        await targets.close()

    run(main())


def test_sampler_close_ends_its_threads() -> None:
    """No sampler thread outlives its targets."""
    before = set(threading.enumerate())

    async def main() -> None:
        targets = Targets(Sampler(CountingSource), lambda _: CountingSource())
        await asyncio.gather(*(ask(targets, pid) for pid in range(1, 9)))
        await targets.close()

    run(main())
    assert {thread for thread in threading.enumerate() if thread.name.startswith("vitalsd")} <= before


def test_window_end_has_current_thread_names() -> None:
    """A snapshot of the recorder, with names that may be old, begins a window and does not end one."""

    class Renaming(CountingSource):
        def snapshot(self, *, parts: Part = Part.NONE, names: bool = True) -> Snapshot:
            taken = super().snapshot(parts=parts, names=names)
            return replace(taken, roster=replace(taken.roster, names=("now" if names else "before",)))

    async def main() -> None:
        sampler = Sampler(Renaming, recording=RecorderConfig(0.011))
        for _ in range(5):
            measurement = await sampler.window(200)
            assert measurement.last.roster.names == ("now",)
        assert sampler.recorder.record is not None
        assert "before" in {name for taken in sampler.recorder.record.snapshots() for name in taken.roster.names}
        await sampler.close()

    run(main())


class Contradicting(CountingSource):
    """After `after` snapshots its thread has used an hour of CPU, which its process has not."""

    def __init__(self, after: int = 3) -> None:
        super().__init__()
        self.after = after

    def snapshot(self, *, parts: Part = Part.NONE, names: bool = True) -> Snapshot:
        taken = super().snapshot(parts=parts, names=names)
        if self.snapshots <= self.after:
            return taken
        (used_ns,) = taken.thread_cpu_ns
        return replace(taken, thread_cpu_ns=[used_ns + 3600 * 10**9])


def test_counters_that_violate_an_invariant_are_an_event_and_reread() -> None:
    """Once, and no window spans it: its thread has no figure, and its process has."""
    sources: list[Contradicting] = []

    def open_source() -> Source:
        sources.append(Contradicting())
        return sources[0]

    async def main() -> None:
        sampler = Sampler(open_source, recording=RecorderConfig(0.02))
        measurement = await sampler.window(200)
        assert measurement.unknown == {0}
        assert measurement.cpu_ns > 0
        assert sampler.recorder.record is not None
        (event,) = (each for each in sampler.recorder.record.events if each.kind != "missed")  # a busy machine
        assert event.kind == "inconsistent"
        assert event.detail.startswith("thread 1 used 36000")
        assert (await sampler.window(50)).unknown == set()
        await sampler.close()

    run(main())
    assert sources[0].restarts == 1


def test_counters_that_stay_inconsistent_are_one_event() -> None:
    """No event follows until two snapshots agree, so that events do not fill the record."""

    class Wrong(CountingSource):
        def snapshot(self, *, parts: Part = Part.NONE, names: bool = True) -> Snapshot:
            taken = super().snapshot(parts=parts, names=names)
            return replace(taken, thread_cpu_ns=[self.snapshots * 10**12])

    async def main() -> None:
        sampler = Sampler(Wrong, recording=RecorderConfig(0.01))
        assert (await sampler.window(200)).unknown == {0}
        assert sampler.recorder.record is not None
        assert len([event for event in sampler.recorder.record.events if event.kind == "inconsistent"]) == 1
        await sampler.close()

    run(main())


def test_recording_missing_has_a_reason() -> None:
    """The reason says whether there is no recorder, or no process to record yet."""

    def absent() -> Source:
        raise NoSuchProcessError("no process of yours is named x; waiting for one")

    async def main() -> None:
        for recording, reason in ((None, "--record-interval 0"), (RecorderConfig(), "nothing has been recorded yet")):
            sampler = Sampler(absent, recording=recording)
            with pytest.raises(NoSuchProcessError):
                await sampler.identity()
            with pytest.raises(NotRecordingError, match=reason):
                await sampler.recorder.mark_async("x")
            assert reason in sampler.recorder.why_not_recorded
            await sampler.close()

    run(main())


def test_recorder_of_a_released_target_records_nothing() -> None:
    """A beat of the recorder that falls due while the target is being released is left out."""

    class SlowToClose(CountingSource):
        def snapshot(self, *, parts: Part = Part.NONE, names: bool = True) -> Snapshot:
            assert not self.closed
            return super().snapshot(parts=parts, names=names)

        def close(self) -> None:
            super().close()
            time.sleep(0.05)

    async def main() -> None:
        sampler = Sampler(SlowToClose, recording=RecorderConfig(0.01))
        await sampler.identity()
        await asyncio.sleep(0.05)
        await sampler.close()

    unraised: list[threading.ExceptHookArgs] = []
    before, threading.excepthook = threading.excepthook, unraised.append
    try:
        run(main())
    finally:
        threading.excepthook = before
    assert unraised == []


def test_sample_blocks_for_the_window_and_measures_it() -> None:
    """`sample` blocks for the window and measures it."""
    source = CountingSource()
    m = sample(conforms(source), 30)
    assert m.elapsed_ns >= 30_000_000
    assert source.snapshots == 2
