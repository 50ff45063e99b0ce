"""
Watch one heartbeat of the page: count its silence, and look at its thread while it is silent.

`vitalsd.recording.hangs` calls it at each look at the page, and states how the silence is counted.
"""

import logging
from collections import Counter, deque
from typing import Literal, NamedTuple, Protocol

from vitalsd.contract.signals_page import HeartbeatSlot
from vitalsd.recording.hang_causes import IDLE, Cause, Evidence, HangCause
from vitalsd.sources.base import SourceError, ThreadLook

__all__ = ["Hang", "HeartbeatStatus", "HeartbeatWatch", "Look", "LookAt", "looked_at"]

log = logging.getLogger("vitalsd.recording.hangs")

FIRST_LESSONS = 8
"""Looks, one after the other, at where a thread sleeps that beats; later there is one each `LEARN_EVERY_NS`."""
LEARN_EVERY_NS = 5_000_000_000
"""Interval of the later ones, ns."""
LESSONS = 12
"""Number of the last ones that count."""


class LookAt(Protocol):
    """The type of `vitalsd.sources.base.Source.look_at`."""

    def __call__(self, tid: int, *, closely: bool = True) -> ThreadLook | None:
        """Look at a thread."""
        ...


class HeartbeatStatus(NamedTuple):
    """State of one heartbeat, for ``GET /heartbeats``."""

    name: str
    tid: int
    """Thread that beats; 0: unknown."""
    limit_ns: int
    state: Literal["beating", "silent", "paused"]
    """``silent``: for longer than the limit. ``paused``: also one that has not begun to beat."""
    silent_ns: int
    """Time since the last beat in which the sidecar was looking, ns."""
    cause: HangCause | None
    """Cause of the silence; ``None``: it does not hang, also if its thread has ended."""
    detail: str
    """More about the cause, or that its thread has ended; may be empty."""


class Hang(NamedTuple):
    """One hang. Heartbeat and start identify it: it is reported while it lasts, and once more when it is over."""

    wall_ns: int
    """Start, which is the last beat, as Unix time, ns."""
    monotonic_ns: int
    """Start on the clock of the sidecar, ns; it may be wrong by the time between two looks."""
    duration_ns: int
    """Length, ns: as the client noted it, or counted by looks. Of one that is ongoing: so far."""
    heartbeat: str
    cause: HangCause
    detail: str
    ongoing: bool


class Look(NamedTuple):
    """One look at the page."""

    now_ns: int
    wall_ns: int
    before_ns: int
    """Time of the look before it; the same as `now_ns` for the first one."""
    seen_ns: int
    """Time since then that counts as silence, ns."""
    most_ns: int
    """Most time between two looks that counts unless the sidecar proves that it waited for the interpreter lock, ns."""
    unseen_ns: int
    """Time since the look before that does not count as silence, ns."""
    is_locked: bool
    """Whether it proves that."""
    look_at: LookAt


class HeartbeatWatch:
    """
    One heartbeat, from look to look.

    Args:
        slot: the heartbeat as it was found.
        look: the look that found it.
        least_ns: least limit that looks can tell; a lower limit of the heartbeat counts as this one.
        is_inside: whether the sidecar runs in the process that beats.
        is_python: whether the process that beats is Python; ``None``: unknown.
    """

    def __init__(
        self, slot: HeartbeatSlot, look: Look, *, least_ns: int, is_inside: bool, is_python: bool | None
    ) -> None:
        self.slot = slot
        self._is_resting = slot.is_paused or slot.beat == 0
        self._least_ns = least_ns
        self._is_inside = is_inside
        self._is_python = is_python
        self._usual: deque[str] = deque(maxlen=LESSONS)
        """Wait channels in which looks found the thread between two beats."""
        self._lesson: str | None = None
        """The same as of the last look, which counts once another beat has come: the thread may have hung already."""
        self._lessons = 0
        self._learn_ns = 0
        """Time of the next such look."""
        self._bounds = (look.now_ns, look.now_ns)
        """The two looks between which the last beat came."""
        self._silent_ns = self._unseen_ns = 0
        self._evidence = Evidence()
        self._has_ended = False
        """Whether the thread that beat has ended."""
        self._warned_of = 0
        """The thread that has ended, as the last warning in the log says."""
        self._hang: Hang | None = None
        self._rest(look)

    @property
    def status(self) -> HeartbeatStatus:
        """Its state as of the last look."""
        slot, hang = self.slot, self._hang
        state: Literal["beating", "silent", "paused"] = "beating"
        detail = ""
        if self._is_resting:
            state = "paused"
        elif self._silent_ns > self._limit_ns:
            state = "silent"
            detail = hang.detail if hang else "its thread has ended" if self._has_ended else ""
        silent_ns = 0 if self._is_resting else self._silent_ns
        cause = hang.cause if hang else None
        return HeartbeatStatus(slot.name, slot.tid, slot.limit_ns, state, silent_ns, cause, detail)

    @property
    def _limit_ns(self) -> int:
        return max(self.slot.limit_ns, self._least_ns)

    def is_of(self, slot: HeartbeatSlot) -> bool:
        """Return whether `slot` is the same heartbeat, and not another one that reuses its place."""
        old = self.slot
        return old.name == slot.name and old.pid == slot.pid and old.owner_start == slot.owner_start

    def look(self, slot: HeartbeatSlot, look: Look) -> Hang | None:
        """Compare the heartbeat with the last look; return the hang that began, lasts or ended."""
        old, rested = self.slot, self._is_resting
        self.slot, self._is_resting = slot, slot.is_paused or slot.beat == 0
        if rested or self._is_resting:
            ended = self.end()
            self._rest(look)
            return ended
        if slot.tid != old.tid:  # another thread beats from now on
            self._usual.clear()
            self._lesson = None
            self._lessons = self._learn_ns = 0
            self._evidence, self._has_ended = Evidence(), False
        self._unseen_ns += look.unseen_ns
        if slot.beat != old.beat:
            return self._beaten(slot.gap_ns if slot.gap_end != old.gap_end else 0, look)
        self._silent_ns += look.seen_ns
        return self._go_on(look)

    def end(self) -> Hang | None:
        """End the hang, if there is one, as of the last look: the heartbeat rests or is closed, or its thread ended."""
        hang, self._hang = self._hang, None
        return hang and hang._replace(ongoing=False)

    def _rest(self, look: Look) -> None:
        """Begin to count at a look that found no beat."""
        self._begin((look.now_ns, look.now_ns), 0)
        if self._is_inside and not self._is_resting:
            self._add(look, closely=False)

    def _begin(self, bounds: tuple[int, int], unseen_ns: int) -> None:
        self._bounds = bounds
        self._silent_ns, self._unseen_ns = 0, unseen_ns
        if self._evidence.before is not None:
            self._evidence = Evidence()
        self._hang, self._has_ended = None, False

    def _beaten(self, noted_ns: int, look: Look) -> Hang | None:
        """
        Return the hang that a beat ended, and begin to count anew.

        Args:
            noted_ns: length of the gap that the client noted; 0: none.
            look: the look that found the beat.
        """
        evidence, seen = self._evidence, self._look_at(look, closely=False) if self._is_inside else None
        before = evidence.before
        evidence.is_locked |= look.is_locked
        is_stalled = before is not None and seen is not None and seen.monotonic_ns - before.monotonic_ns > look.most_ns
        if is_stalled and seen:  # of another interval the end, with the beats after the hang, must not count
            evidence.add(seen, look.most_ns)
        ended = self._over(noted_ns, look) if noted_ns or self._hang else None
        # The time without looks may lie after the beat.
        self._begin((look.before_ns, look.now_ns), look.unseen_ns)
        if is_stalled and ended is None:
            self._evidence = Evidence(before, is_locked=look.is_locked)
        if seen is not None:
            self._evidence.add(seen, look.most_ns)
        if self._lesson is not None and ended is None:
            self._usual.append(self._lesson)
        self._lesson = None
        if look.now_ns >= self._learn_ns:
            self._learn(look)
        return ended

    def _over(self, noted_ns: int, look: Look) -> Hang | None:
        length_ns = min(noted_ns, look.now_ns - self._bounds[0])  # more would be noise
        if self._hang is None and length_ns - self._unseen_ns <= self._limit_ns:
            return None
        if length_ns < self._silent_ns:
            length_ns = self._silent_ns + look.seen_ns // 2
        start_ns = max(self._bounds[0], min(self.slot.gap_end - self.slot.gap_ns, look.now_ns - length_ns))
        return self._as_hang(look, start_ns, length_ns, ongoing=False)

    def _go_on(self, look: Look) -> Hang | None:
        """Return the hang, if the silence, which goes on, is one."""
        if self._has_ended:
            return None
        if look.is_locked or 2 * self._silent_ns >= self._limit_ns:
            self._add(look, closely=True)
            if self._has_ended:
                self._warn()
                return self.end()
        elif self._is_inside:
            self._add(look, closely=False)
        if self._silent_ns <= self._limit_ns:
            return None
        # The clock of the client only chooses a moment between two looks.
        start_ns = max(self._bounds[0], min(self.slot.beat, self._bounds[1]))
        self._hang = self._as_hang(look, start_ns, self._silent_ns, ongoing=True)
        return self._hang

    def _warn(self) -> None:
        if self._warned_of != self.slot.tid:
            self._warned_of = self.slot.tid
            log.warning(
                "the thread %d of heartbeat %s has ended; close the heartbeat, or bind it to the thread that beats",
                self.slot.tid,
                self.slot.name,
            )

    def _as_hang(self, look: Look, start_ns: int, length_ns: int, *, ongoing: bool) -> Hang:
        """Return the hang of this silence; one that is reported already keeps its start."""
        cause = self._cause()
        wall_ns = look.wall_ns - (look.now_ns - start_ns)
        if self._hang is not None:
            wall_ns, start_ns = self._hang.wall_ns, self._hang.monotonic_ns
        return Hang(wall_ns, start_ns, length_ns, self.slot.name, cause.cause, cause.detail, ongoing)

    def _cause(self) -> Cause:
        if not self.slot.tid:
            return Cause("unknown", "the client did not say which thread beats")
        if self._evidence.before is None and self._hang is not None:  # another thread beats from now on
            return Cause(self._hang.cause, self._hang.detail)
        usual = [channel for channel in self._usual if channel in IDLE] or self._usual
        return self._evidence.cause(Counter(usual).most_common(1)[0][0] if usual else None, is_python=self._is_python)

    def _add(self, look: Look, *, closely: bool) -> None:
        """Add a look at the thread to the evidence."""
        seen = self._look_at(look, closely=closely)
        if seen is not None:
            self._evidence.add(seen, look.most_ns, is_locked=look.is_locked)

    def _look_at(self, look: Look, *, closely: bool) -> ThreadLook | None:
        if not self.slot.tid:
            return None
        try:
            seen = look.look_at(self.slot.tid, closely=closely)
        except SourceError:
            return None
        self._has_ended = seen is None
        return seen

    def _learn(self, look: Look) -> None:
        """Look where the thread sleeps between two beats, now and then."""
        self._lessons += 1
        if self._lessons >= FIRST_LESSONS:
            self._learn_ns = look.now_ns + LEARN_EVERY_NS
        seen = self._look_at(look, closely=True)
        if seen is not None:
            self._lesson = seen.wait_channel


def looked_at(look_at: LookAt, tid: int, *, closely: bool) -> ThreadLook | None:
    """Look at a thread; return ``None`` also if it cannot be read."""
    try:
        return look_at(tid, closely=closely)
    except SourceError:
        return None
