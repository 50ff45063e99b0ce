"""Snapshots made by hand or by hypothesis, for tests of what is built on them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import strategies as st

from vitalsd.snapshot import Identity, Snapshot, ThreadRoster

SECOND_NS = 1_000_000_000

IDENTITY = Identity(
    platform="linux",
    pid=4242,
    name="ryll",
    boot_id="0a1b2c3d-0000-0000-0000-000000000000",
    start_key=1234,
    started_unix_ns=1_700_000_000 * SECOND_NS,
)


@dataclass
class Process:
    """A process that only exists here: advance it, then take its snapshot."""

    threads: dict[tuple[int, int], tuple[str, int]] = field(default_factory=lambda: {(1, 1): ("main", 0)})
    """(tid, birth) -> (name, CPU ns)"""
    monotonic_ns: int = 100 * SECOND_NS
    asleep_ns: int = 0
    set_ns: int = 0
    """By which the wall clock was set."""
    exited_ns: int = 0
    rss_bytes: int = 1 << 20
    image: int = 1
    state: str = "sleeping"
    _roster: ThreadRoster = field(default_factory=ThreadRoster)

    def pass_time(self, elapsed_ns: int, burnt_ns: Sequence[int] = ()) -> None:
        """Let time pass in which the threads, in order, burn so much."""
        self.monotonic_ns += elapsed_ns
        for (key, (name, cpu_ns)), ns in zip(list(sorted(self.threads.items())), burnt_ns, strict=False):
            self.threads[key] = name, cpu_ns + ns

    def end_thread(self, key: tuple[int, int]) -> None:
        """A thread exits; what it burnt is the process's for ever."""
        self.exited_ns += self.threads.pop(key)[1]

    def snapshot(self) -> Snapshot:
        """What a source would return: the same roster while nothing of it changes."""
        rows = sorted(self.threads.items())
        self._roster = ThreadRoster(
            tuple(tid for (tid, _), _ in rows),
            tuple(birth for (_, birth), _ in rows),
            tuple(name for _, (name, _) in rows),
        ).sharing(self._roster)
        living_ns = sum(cpu_ns for _, (_, cpu_ns) in rows)
        return Snapshot(
            monotonic_ns=self.monotonic_ns,
            boottime_ns=self.monotonic_ns + self.asleep_ns,
            wall_ns=1_700_000_500 * SECOND_NS + self.monotonic_ns + self.asleep_ns + self.set_ns,
            uptime_ns=self.monotonic_ns,
            skew_ns=1000,
            cpu_ns=living_ns + self.exited_ns,
            cpu_grain_ns=1,
            exited_cpu_ns=(self.exited_ns, self.exited_ns),
            rss_bytes=self.rss_bytes,
            vm_bytes=10 * self.rss_bytes,
            state=self.state,
            image=self.image,
            roster=self._roster,
            thread_cpu_ns=[cpu_ns for _, (_, cpu_ns) in rows],
            thread_grain_ns=1,
            thread_lag_ns=0,
            source="fake",
        )


NAMES = st.text(max_size=8)


@st.composite
def lives(draw: st.DrawFn, *, max_steps: int = 80) -> list[Snapshot]:
    """A process's snapshots, one to many, while threads burn, idle, are born, renamed and exit."""
    process = Process()
    found = [process.snapshot()]
    for step in range(draw(st.integers(0, max_steps))):
        kind = draw(st.sampled_from(["burn", "burn", "idle", "all", "born", "exit", "rename", "exec"]))
        keys = sorted(process.threads)
        burnt = [0] * len(keys)
        if kind == "burn":
            burnt[draw(st.integers(0, len(keys) - 1))] = draw(st.integers(0, 2**33))
        elif kind == "all":
            burnt = [draw(st.integers(0, 2**31)) for _ in keys]
        elif kind == "born":
            process.threads[draw(st.integers(1, 9)), step + 2] = draw(NAMES), draw(st.integers(0, 2**40))
        elif kind == "exit" and len(keys) > 1:
            process.end_thread(draw(st.sampled_from(keys)))
        elif kind == "rename":
            key = draw(st.sampled_from(keys))
            process.threads[key] = draw(NAMES), process.threads[key][1]
        elif kind == "exec":
            process.image += 1
        process.rss_bytes = draw(st.integers(0, 2**40))
        process.pass_time(draw(st.integers(1_000_000, 10 * SECOND_NS)), burnt)
        found.append(process.snapshot())
    return found


def same(a: Snapshot, b: Snapshot) -> bool:
    """Whether two snapshots say the same, leaving out what is not recorded."""

    def values(s: Snapshot) -> tuple[object, ...]:
        return (
            (s.monotonic_ns, s.boottime_ns, s.wall_ns, s.uptime_ns, s.skew_ns, s.cpu_ns, s.cpu_grain_ns),
            (s.exited_cpu_ns, s.rss_bytes, s.vm_bytes),
            (s.roster, list(s.thread_cpu_ns)),
            (s.thread_grain_ns, s.thread_lag_ns, s.source),
        )

    return values(a) == values(b)
