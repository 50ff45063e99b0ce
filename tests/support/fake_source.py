"""A process that exists only here, and the source that reads it: the protocol without a kernel."""

from dataclasses import dataclass, field

from vitalsd.snapshot import Extras, Identity, Snapshot, ThreadExtras, ThreadRoster
from vitalsd.sources.base import SourceError, TargetGone

__all__ = ["FakeProcess", "FakeSource"]

SECOND_NS = 1_000_000_000


@dataclass
class FakeThread:
    name: str
    birth: int
    cpu_ns: int = 0


@dataclass
class FakeProcess:
    """Advance it by hand; time passes only with `pass_time` and `burn`."""

    pid: int = 4242
    now_ns: int = 100 * SECOND_NS
    slept_ns: int = 0
    wall_step_ns: int = 0
    exited_ns: int = 0
    gone: bool = False
    threads: dict[int, FakeThread] = field(default_factory=lambda: {4242: FakeThread("main", 0)})
    newest_tid: int = 4242
    failure: SourceError | None = None
    """Raised by the next snapshot."""

    def start_thread(self, name: str) -> int:
        self.pass_time(1000)
        self.newest_tid += 1
        tid = self.newest_tid
        self.threads[tid] = FakeThread(name, self.now_ns)
        self.threads[self.pid].cpu_ns += 20_000  # as the thread that makes it
        return tid

    def rename_thread(self, tid: int, name: str) -> None:
        self.threads[tid].name = name

    def burn(self, tid: int, cpu_ns: int) -> int:
        self.pass_time(cpu_ns)
        self.threads[tid].cpu_ns += cpu_ns
        return cpu_ns

    def end_thread(self, tid: int) -> None:
        self.exited_ns += self.threads.pop(tid).cpu_ns

    def pass_time(self, ns: int) -> None:
        self.now_ns += ns

    def sleep(self, ns: int) -> None:
        """The machine sleeps."""
        self.slept_ns += ns

    def kill(self) -> None:
        self.gone = True

    def close(self) -> None:
        pass


class FakeSource:
    """See `vitalsd.sources.base.Source`."""

    def __init__(self, process: FakeProcess, *, platform: str = "macos") -> None:
        self._process = process
        self._start_ns = 40 * SECOND_NS
        self._roster = ThreadRoster()
        self._identity = Identity(
            platform=platform,
            pid=process.pid,
            name="fake",
            boot_id="00000000-0000-4000-8000-000000000000",
            start_key=self._start_ns // 1000,
            started_unix_ns=1_700_000_000 * SECOND_NS,
        )
        self.closed = False
        self.restarts = 0

    def identity(self) -> Identity:
        return self._identity

    def restart(self) -> None:
        self.restarts += 1

    def close(self) -> None:
        self.closed = True

    def snapshot(self, *, extras: bool = False, names: bool = True) -> Snapshot:
        if self.closed:
            raise ValueError("the source is closed")
        process = self._process
        failure, process.failure = process.failure, None
        if failure:
            raise failure
        if process.gone:
            raise TargetGone(f"target {process.pid} has exited")
        process.pass_time(1000)
        tids = tuple(sorted(process.threads))
        threads = [process.threads[tid] for tid in tids]
        births = tuple(thread.birth for thread in threads)
        self._roster = ThreadRoster(tids, births, tuple(thread.name for thread in threads)).sharing(self._roster)
        cpu_ns = [thread.cpu_ns for thread in threads]
        boottime_ns = process.now_ns + process.slept_ns
        return Snapshot(
            monotonic_ns=process.now_ns,
            boottime_ns=boottime_ns,
            wall_ns=1_700_000_000 * SECOND_NS + boottime_ns + process.wall_step_ns,
            uptime_ns=boottime_ns - self._start_ns,
            skew_ns=1000,
            cpu_ns=sum(cpu_ns) + process.exited_ns,
            cpu_grain_ns=1,
            exited_cpu_ns=(process.exited_ns, process.exited_ns),
            rss_bytes=64 << 20,
            vm_bytes=128 << 20,
            state="waiting",
            image=1,
            roster=self._roster,
            thread_cpu_ns=cpu_ns,
            thread_grain_ns=1,
            thread_lag_ns=0,
            source="fake",
            extras=self._extras(cpu_ns) if extras else None,
        )

    def _extras(self, cpu_ns: list[int]) -> Extras:
        threads = ThreadExtras(
            user_ns=cpu_ns,
            system_ns=[0] * len(cpu_ns),
            states=["waiting"] * len(cpu_ns),
            priorities=[31] * len(cpu_ns),
        )
        total_ns = sum(cpu_ns) + self._process.exited_ns
        return Extras(threads=threads, user_ns=total_ns, system_ns=0, footprint_bytes=32 << 20)
