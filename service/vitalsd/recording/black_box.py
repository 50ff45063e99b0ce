"""
The flight recorder on disk, while it is being written: who writes what, when, and what if the disk does not.

A snapshot goes to the `vitalsd.recording.journal` of the run, and every few seconds a thread moves what is there to the
`vitalsd.recording.run_writer`. So a killed process loses nothing, and only a power failure may lose the last seconds.
What has
no place in the tail, such as the first snapshot of a segment, or where there is no shared memory each, goes to the
file at once; a kill may come before that, and take one snapshot, or what waited for a slow disk.
"""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from threading import Lock

from vitalsd.contract.application import Application
from vitalsd.discovery.atomic_file import is_gone
from vitalsd.recording.journal import Row, Tail
from vitalsd.recording.run_directory import RunDirectory
from vitalsd.recording.run_files import tail_link
from vitalsd.recording.run_writer import RunFile, row_of
from vitalsd.recording.series import Event, Mark, Segment
from vitalsd.recording.sqlite import sqlite3
from vitalsd.snapshot import Identity
from vitalsd.worker_thread import Worker

__all__ = ["BlackBox"]

log = logging.getLogger("vitalsd.recording.black_box")

RUN_BYTES = 16 << 20
MAX_PENDING = 64
"""Snapshots, marks and events that wait for a slow disk; beyond that they are dropped and counted."""
MAX_WAIT_S = 0.05
OPEN_WAIT_S = 1.0
FOLD_NS = 5_000_000_000
"""Between two times that the tail is written to disk. The longer the cheaper, for the thread that does it wakes up."""
RETRY_NS = 2_000_000_000
"""After a failure to open the file."""


class BlackBox:
    """
    Writes one run. Never raises to the sampler: what goes wrong is in `error`, and the log says it once.

    The file is there when the constructor returns, unless the disk takes longer than a second.

    Args:
        directory: where the file goes.
        identity: the process being recorded.
        interval_ns: intended distance of two snapshots.
        retention_ns: how far back the file reaches.
        max_bytes: of this run; the oldest segments go when it is passed.
        application: what the client says it is.
    """

    def __init__(
        self,
        directory: RunDirectory,
        identity: Identity,
        *,
        interval_ns: int,
        retention_ns: int,
        max_bytes: int = RUN_BYTES,
        application: Application = Application(),
    ) -> None:
        self.error: str | None = None
        self.dropped = 0
        """Snapshots, marks and events that did not get to disk."""
        self._counting = Lock()
        """Held while `dropped` changes: sampler, event loop and writer do that."""
        self.run_id: str | None = None
        self._directory = directory
        self._identity = identity
        self._interval_ns = interval_ns
        self._open = partial(
            RunFile,
            directory,
            interval_ns=interval_ns,
            retention_ns=retention_ns,
            max_bytes=max_bytes,
            application=application,
        )
        self._ended: tuple[str, bool] | None = None
        """As `end` has it: of a file that follows one that was deleted since it is known at once."""
        self._file: RunFile | None = None
        self._tail: Tail | None = None
        self._segment: Segment | None = None
        """The one that is on disk, for the rows to come."""
        self._segment_id = 0
        self._retry_ns = 0
        self._number = 0
        """Of the last snapshot, from 1; in the file it is the id of its row."""
        self._fold_after = max(1, FOLD_NS // max(1, interval_ns))
        self._folding = False
        self._given = self._taken = 0
        """Snapshots that went to the writer, and those it is through with."""
        self._caught_up: Future[None] | None = None
        self._gap = False
        """A snapshot was dropped since the last one that was given to the writer."""
        self._busy_since_ns: int | None = None
        """With what the writer was busy at the snapshot before."""
        self._worker = Worker("vitalsd-blackbox")
        wait((self._worker.submit(partial(self._guard, lambda file: None)),), OPEN_WAIT_S)

    def append(self, segment: Segment, position: int) -> None:
        """
        Write the snapshot that `segment` has at `position`.

        Returns at once, unless the one before is still on its way to the disk: then it waits for it up to half
        an interval. So a killed process loses one snapshot at most, and a slow disk delays but never stops the
        sampler. One that hangs is waited for no more once that is clear.
        """
        self._number += 1
        waits = self._given != self._taken
        stuck = (waits or self._folding) and self._stuck()
        if waits and not stuck:
            if self._caught_up is None or self._caught_up.done():
                self._caught_up = self._worker.submit(lambda: None)
            wait((self._caught_up,), min(MAX_WAIT_S, self._interval_ns / 2e9))
        if self._given != self._taken or self._gap or not self._keep(segment, position):
            # Of what was dropped, what each thread burnt is missing: then a segment begins.
            self._gap = not self._post(partial(self._take, self._number, segment, position, self._gap))
            self._given += not self._gap

    @property
    def is_behind(self) -> bool:
        """Whether the disk is slow."""
        return self._worker.pending >= 2

    def mark(self, mark: Mark) -> "Future[None] | None":
        """
        Write a mark, and what came before it; returns at once.

        Returns:
            What is done when it is written; ``None`` if it was dropped.
        """
        if self._is_full():
            return None
        return self._worker.submit(partial(self._note, RunFile.mark, mark))

    def event(self, event: Event) -> None:
        """Write an event, and what came before it; returns at once."""
        self._post(partial(self._note, RunFile.event, event))

    def identify(self, identity: Identity) -> None:
        """Write who the process is by now; returns at once."""
        self._identity = identity
        self._post(self._fold)

    async def hangs(self) -> bool:
        """Whether the disk does not answer."""
        return await self._worker.hangs()

    def pause(self, timeout_s: float) -> bool:
        """Before a fork: let the write under way end and none begin until `resume`; False if it takes longer."""
        return self._worker.pause(timeout_s)

    def resume(self) -> None:
        """After a `pause` that was granted; in the child likewise."""
        self._worker.resume()

    def forget(self) -> None:
        """In a forked child: let go of the lock, which else would say that a run whose writer died goes on."""
        if self._file is not None:
            self._file.forget()

    def end(self, ended: str, *, crashed: bool) -> None:
        """
        Write how the run ended, though marks may follow; returns at once.

        Args:
            ended: in words.
            crashed: the target died, and as far as anybody can say not of its own will.
        """
        self._post(partial(self._end, ended, crashed))

    def close(self, ended: str, *, crashed: bool = False, timeout_s: float = 1.0) -> None:
        """Write how the run ended, see `end`, and finish the file."""
        self._worker.submit(lambda: self._close(ended, crashed))
        self._worker.stop(0 if self._worker.overdue else timeout_s)

    def flush(self, timeout_s: float = 5.0) -> None:
        """Wait until all that was given so far is on disk, or cannot be."""
        self._worker.submit(self._fold).result(timeout_s)

    def _keep(self, segment: Segment, position: int) -> bool:
        """Put a snapshot into the tail; False if it must go to the disk."""
        tail, file = self._tail, self._file
        if tail is None or file is None or segment is not self._segment:
            return False
        if tail.size_bytes and file.on_disk == self._number - 1 and not tail.clear():
            self._tail = None  # until a segment begins
            tail.close()
            return False
        if not tail.append(row_of(self._number, self._segment_id, segment, position)):
            return False
        if not self._folding and self._number - file.on_disk >= self._fold_after:
            self._folding = True
            self._worker.post(self._fold)
        return True

    def _post(self, call: Callable[[], None]) -> bool:
        if self._is_full():
            return False
        self._worker.post(call)
        return True

    def _is_full(self) -> bool:
        full = self._worker.pending >= MAX_PENDING
        if full:
            self._drop()
        return full

    def _drop(self) -> None:
        with self._counting:
            self.dropped += 1

    def _stuck(self) -> bool:
        """Whether the writer has been at the same write for too long: seen twice, or the whole process was stopped."""
        before_ns, self._busy_since_ns = self._busy_since_ns, self._worker.busy_since_ns
        if not self._worker.overdue or before_ns != self._busy_since_ns:
            return False
        self._off("the disk does not answer")
        return True

    def _off(self, why: object) -> None:
        reason = f"the black box is off: {why}"
        if self.error is None:
            log.warning("%s (%s)", reason, self._directory.path)
        self.error = reason

    # On the writer's thread

    def _take(self, number: int, segment: Segment, position: int, anew: bool) -> None:
        self._look()
        begins = anew or segment is not self._segment
        if not self._guard(self._write, number, segment, position, begins):
            self._drop()
            self._segment = None
        elif begins:
            self._guard(RunFile.trim)
        self._taken += 1

    def _note(self, write: Callable[..., object], what: Mark | Event) -> None:
        self._look()
        if not self._guard(write, what):
            self._drop()
        self._fold()

    def _end(self, ended: str, crashed: bool) -> None:
        self._look()
        self._ended = ended, crashed
        self._guard(lambda file: file.end(self._waiting(file), ended, crashed=crashed))

    def _look(self) -> None:
        """Let go of a file that somebody has deleted: what follows goes to a new one."""
        if self._file is not None and is_gone(self._file.path):
            self._let_go()

    def _fold(self) -> None:
        """Write to disk what is in the tail, and who the process is by now. What fails is done the next time."""
        self._look()
        if self._file is not None and self._file.identity != self._identity:
            self._guard(RunFile.identify, self._identity)
        if self._tail is not None:
            self._guard(lambda file: file.insert(self._waiting(file)))
        self._folding = False

    def _guard(self, write: Callable[..., object], *what: object) -> bool:
        """Call `write` with the file, which is opened if need be, and `what`; False if that failed."""
        try:
            if self._file is None:
                if time.monotonic_ns() < self._retry_ns:
                    return False
                self._file = self._open(self._identity, lives=self._ended is None)
                self.run_id = self._file.path.stem
                if self._ended is not None:
                    self._file.end((), self._ended[0], crashed=self._ended[1])
            write(self._file, *what)
            self.error = None
        except (OSError, sqlite3.Error) as error:
            self._off(error)
            self._retry_ns = time.monotonic_ns() + RETRY_NS
            return False
        return True

    def _write(self, file: RunFile, number: int, segment: Segment, position: int, begins: bool) -> None:
        if begins:
            if self._tail is None:
                with suppress(OSError):
                    self._tail = Tail(tail_link(file.path), self._directory.memory)
            self._segment_id = file.begin(self._waiting(file), number, segment, position)
        else:
            file.insert([*self._waiting(file), row_of(number, self._segment_id, segment, position)])
        self._segment = segment

    def _waiting(self, file: RunFile) -> Sequence[Row]:
        """What is in the tail and not on disk."""
        tail = self._tail
        return [row for row in tail.rows() if row.id > file.on_disk] if tail is not None else []

    def _let_go(self) -> None:
        if self._tail is not None:
            self._tail.remove()
            self._tail = None
        if self._file is not None:
            self._file.close()
            self._file = None
        self._segment = None

    def _close(self, ended: str, crashed: bool) -> None:
        file, tail = self._file, self._tail
        if file is not None:
            if file.identity != self._identity:
                self._guard(RunFile.identify, self._identity)
            if self._guard(lambda file: file.end(self._waiting(file), ended, crashed=crashed)) and tail is not None:
                tail.remove()
            file.close()
            self._file = None
        if tail is not None:
            tail.close()
