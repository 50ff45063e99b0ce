"""Detect the exit of a process that is not a child of ours: at once where the kernel reports it."""

import asyncio
import contextlib
import os
import select
import sys
from collections.abc import Iterator

from vitalsd.sources.process_identity import IdentityUnknownError, ProcessIdentityReader

__all__ = ["death_of"]

POLL_S = 1.0
"""Interval at which the start time is read where the kernel reports no exit, s."""


async def death_of(pid: int, start: int, kernel: ProcessIdentityReader, *, poll: bool = False) -> None:
    """
    Return once the run of `pid` that began at `start` has exited, reaped or not.

    A pidfd (Linux) or kqueue (macOS) reports it within a millisecond. Where neither can be opened, the start time is
    read once a second.

    Args:
        pid: the process.
        start: its `Identity.start_key`.
        kernel: reads the start time of a process.
        poll: whether only to poll, because `pid` is not of our pid namespace.
    """
    if not poll:
        with contextlib.suppress(OSError), _exit_descriptor(pid) as fd:
            # The descriptor is opened by pid, which may be that of another process now: check after opening.
            if _lives(pid, start, kernel):
                await _readable(fd)
    while _lives(pid, start, kernel):
        await asyncio.sleep(POLL_S)


def _lives(pid: int, start: int, kernel: ProcessIdentityReader) -> bool:
    try:
        return kernel.start_key(pid) == start
    except IdentityUnknownError:
        return True


@contextlib.contextmanager
def _exit_descriptor(pid: int) -> Iterator[int]:
    """Open a descriptor that becomes readable when `pid` exits. Raise `OSError`: there can be none."""
    if sys.platform == "linux":
        fd = os.pidfd_open(pid)
        try:
            yield fd
        finally:
            os.close(fd)
    elif sys.platform == "darwin":
        with contextlib.closing(select.kqueue()) as queue:
            exits = select.kevent(pid, select.KQ_FILTER_PROC, select.KQ_EV_ADD, select.KQ_NOTE_EXIT)
            queue.control([exits], 0)
            yield queue.fileno()
    else:
        raise OSError("this system does not report it")


async def _readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    news = asyncio.Event()
    loop.add_reader(fd, news.set)
    try:
        await news.wait()
    finally:
        loop.remove_reader(fd)
