"""Read how a process of macOS ended that is not a child of ours."""

import select
from contextlib import suppress

from vitalsd.sources.base import ExitStatus

__all__ = ["ExitWatch"]

NOTE_EXITSTATUS = 0x04000000  # sys/event.h; the select module has not got it


class ExitWatch:
    """
    A queue in which the kernel reports the exit status of a process: ``EVFILT_PROC`` of kqueue(2).

    According to sys/event.h only a parent gets the status, but every process that may kill the target gets it
    (bsd/kern/kern_event.c, filt_procattach, xnu-11417). If there is no queue, the status stays unknown. Platform limit:
    the kernel sends no note to other processes while a debugger traces the target (filt_procevent).

    Args:
        pid: of the process. Make the watch before the identity of the process is read, see `drop_if_fired`.
    """

    def __init__(self, pid: int) -> None:
        self._queue: select.kqueue | None = None  # type: ignore[name-defined, unused-ignore]
        with suppress(AttributeError, OSError):  # another system, or the process is gone or another user's
            queue = select.kqueue()  # type: ignore[attr-defined, unused-ignore]
            try:
                flags = select.KQ_NOTE_EXIT | NOTE_EXITSTATUS  # type: ignore[attr-defined, unused-ignore]
                add = select.KQ_EV_ADD  # type: ignore[attr-defined, unused-ignore]
                event = select.kevent(pid, select.KQ_FILTER_PROC, add, flags)  # type: ignore[attr-defined, unused-ignore]
                queue.control([event], 0)
            except OSError:
                queue.close()
                raise
            self._queue = queue

    def drop_if_fired(self) -> None:
        """Close the queue if it already has a note: that is of an earlier process with the same pid."""
        if self._queue is not None and self._queue.control(None, 1, 0):
            self.close()

    @property
    def is_expected(self) -> bool:
        """Whether the kernel reports the exit here."""
        return self._queue is not None

    def exit_status(self, timeout_s: float) -> ExitStatus | None:
        """Return how the process ended, once; ``None`` if no note comes within `timeout_s` seconds."""
        if self._queue is None:
            return None
        try:
            for event in self._queue.control(None, 1, timeout_s):
                if event.fflags & NOTE_EXITSTATUS:
                    return ExitStatus.of(event.data)
        except OSError:
            self.close()
        return None

    def close(self) -> None:
        """Close the queue. A second call does nothing."""
        if self._queue is not None:
            self._queue.close()
            self._queue = None
