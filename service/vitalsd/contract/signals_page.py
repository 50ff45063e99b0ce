"""
Define the page of shared memory in which a client signals heartbeats and gauges to its sidecar.

The sidecar makes the page, and the client maps it. A beat is a store of 8 bytes, so it costs no system call and cannot
fail. docs/protocol.md describes the layout for clients in other languages. All words are unsigned 64-bit integers in
the byte order of the machine, aligned to 8 bytes; the value of a gauge is a double.

Linux: a memfd that is fully allocated and sealed against a change of its size, so that no store and no load ends a
process by SIGBUS. A client opens it by ``/proc/PID/fd/N``, which the kernel allows to the same user alone. macOS: a
POSIX shared memory object; its size can be set only once.
"""

import fcntl
import math
import mmap
import os
import re
import struct
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import NamedTuple

__all__ = [
    "GAUGES",
    "HEARTBEATS",
    "NAME",
    "PAGE_BYTES",
    "GaugeSlot",
    "HeartbeatSlot",
    "MappedPage",
    "PageError",
    "SignalsPage",
    "empty_page",
    "gauge_slots",
    "gauge_values",
    "heartbeat_slots",
    "name_words",
]

MAGIC = int.from_bytes(b"VITALSIG", "big")
"""First word of a page."""
VERSION = 1
"""Second word of a page."""
PAGE_BYTES = 8192
"""Size of a page, bytes."""
HEARTBEATS = 32
"""Number of heartbeats in a page."""
GAUGES = 32
"""Number of gauges in a page."""
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,31}", re.ASCII)
"""Form of a name: it has 1 to 32 bytes and is padded with zeros to four words."""

HEADER_WORDS = 16
SLOT_WORDS = 16
"""Words of a heartbeat."""
GAUGE_WORDS = 8
"""Words of a gauge."""

# Words of a heartbeat.
BEAT, GAP, GAP_END, LIMIT, OWNER, OWNER_START, STATE, HEARTBEAT_NAME = 0, 1, 2, 3, 4, 5, 6, 8
# Words of a gauge. A reader copies upwards, so a time that it finds belongs to a value that is stored already.
SET, VALUE, GAUGE_STATE, GAUGE_NAME = 0, 1, 2, 4

KINDS = (
    (HEADER_WORDS, SLOT_WORDS, HEARTBEATS, STATE),
    (HEADER_WORDS + HEARTBEATS * SLOT_WORDS, GAUGE_WORDS, GAUGES, GAUGE_STATE),
)
"""First word, words of a slot, number of slots and place of the state in a slot: of heartbeats, then of gauges."""

FREE, OPEN, PAUSED = 0, 1, 2
"""States of a slot. An open heartbeat with 0 in its word `BEAT` has not begun to beat."""

F_ADD_SEALS, F_GET_SEALS, SEALS = 1033, 1034, 0x1 | 0x2 | 0x4
"""fcntl(2): F_ADD_SEALS, F_GET_SEALS; F_SEAL_SEAL, F_SEAL_SHRINK and F_SEAL_GROW. macOS has none of them."""


LOCK_S = 0.05
"""A client that takes a slot waits at most this long for another one, s, which holds the lock for some µs."""


class PageError(OSError):
    """A page cannot be made or mapped; ``str(error)`` states why."""


class HeartbeatSlot(NamedTuple):
    """One heartbeat, as it is in the page."""

    slot: int
    """Its place in the page."""
    name: str
    is_paused: bool
    beat: int
    """
    Time of the last beat on the monotonic clock of the client, ns, which may have another zero than that of the sidecar
    (time namespaces); 0: it has not begun. The sidecar looks for a change only.
    """
    gap_ns: int
    """Length of the last gap that was longer than the limit, ns; 0: there was none."""
    gap_end: int
    """Value of `beat` at the end of that gap."""
    limit_ns: int
    pid: int
    """Process of the client that opened it, by its own pid namespace."""
    tid: int
    """Thread that beats, by the same namespace; 0: unknown."""
    owner_start: int
    """`Identity.start_key` of that process; 0: unknown."""


class GaugeSlot(NamedTuple):
    """One gauge, as it is in the page."""

    slot: int
    """Its place in the page."""
    name: str
    value: float
    set_at: int
    """Time at which it was set, on the monotonic clock of the client, ns; 0: never."""


def name_words(name: str) -> tuple[int, ...]:
    """Return a name as four words. Raise `ValueError` if it does not have the form of `NAME`."""
    if not isinstance(name, str) or not NAME.fullmatch(name):  # type: ignore[redundant-expr]
        raise ValueError(f"a name is a letter and up to 31 of A-Z a-z 0-9 . _ -; this is {name!r:.60}")
    return struct.unpack("=4Q", name.encode().ljust(32, b"\0"))


def heartbeat_slots(content: bytes) -> Iterator[HeartbeatSlot]:
    """Yield the heartbeats of a page that are open or paused. Raise `ValueError`: it is not a page, or has noise."""
    words = _words(content)
    # The sidecar does this four times a second: one slice finds the slots that are taken.
    states = words[HEADER_WORDS + STATE : HEADER_WORDS + HEARTBEATS * SLOT_WORDS : SLOT_WORDS].tolist()
    for index, state in enumerate(states):
        if state == FREE:
            continue
        at = HEADER_WORDS + index * SLOT_WORDS
        slot = words[at : at + SLOT_WORDS].tolist()
        if state not in (OPEN, PAUSED) or not slot[LIMIT]:
            raise ValueError(f"heartbeat {index} has no state or no limit")
        yield HeartbeatSlot(
            slot=index,
            name=_name(words[at + HEARTBEAT_NAME : at + HEARTBEAT_NAME + 4]),
            is_paused=state == PAUSED,
            beat=slot[BEAT],
            gap_ns=slot[GAP],
            gap_end=slot[GAP_END],
            limit_ns=slot[LIMIT],
            pid=slot[OWNER] >> 32,
            tid=slot[OWNER] & 0xFFFFFFFF,
            owner_start=slot[OWNER_START],
        )


def gauge_slots(content: bytes) -> Iterator[GaugeSlot]:
    """Yield the gauges of a page that are open. Raise `ValueError`: it is not a page, or has noise."""
    words = _words(content)
    begin = HEADER_WORDS + HEARTBEATS * SLOT_WORDS
    # As for heartbeats, one slice finds the slots that are taken: most programs have no gauge.
    states = words[begin + GAUGE_STATE : begin + GAUGES * GAUGE_WORDS : GAUGE_WORDS].tolist()
    for index, state in enumerate(states):
        if state == FREE:
            continue
        if state != OPEN:
            raise ValueError(f"gauge {index} has no state")
        at = begin + index * GAUGE_WORDS
        slot = words[at : at + GAUGE_WORDS]
        (value,) = struct.unpack_from("=d", content, 8 * (at + VALUE))
        yield GaugeSlot(index, _name(slot[GAUGE_NAME : GAUGE_NAME + 4]), value, slot[SET])


def gauge_values(slots: Iterable[GaugeSlot]) -> tuple[tuple[str, float], ...]:
    """
    Return names and values of the gauges that have a value, by ascending name.

    A gauge that was never set, or that a client set to what is no finite number, has none. Of two with one name, which
    two clients have opened, the one that was set last counts.
    """
    known = [slot for slot in slots if slot.set_at and math.isfinite(slot.value)]
    newest = {slot.name: slot.value for slot in sorted(known, key=lambda slot: slot.set_at)}
    return tuple(sorted(newest.items()))


def _words(content: bytes) -> "memoryview[int]":
    if len(content) != PAGE_BYTES:
        raise ValueError(f"the page has {len(content)} bytes instead of {PAGE_BYTES}")
    words = memoryview(content).cast("Q")
    if words[0] != MAGIC or words[1] != VERSION:
        raise ValueError("the page does not begin with its magic number and version")
    return words


def _name(words: "memoryview[int]") -> str:
    name = words.tobytes().rstrip(b"\0").decode("ascii", "replace")
    if not NAME.fullmatch(name):
        raise ValueError(f"a name {name!r:.60}")
    return name


class SignalsPage:
    """
    The page of a sidecar, which makes and reads it.

    Args:
        is_memfd: whether it is a memfd, which exists on Linux only, or else a POSIX shared memory object.

    Raises:
        PageError: the system gives no shared memory.
    """

    def __init__(self, *, is_memfd: bool = sys.platform == "linux") -> None:
        self._pid = os.getpid()
        self.cleared = 0
        """Number of calls of `clear`."""
        self._fd = -1
        self._map: mmap.mmap | None = None
        self.reference: Mapping[str, str] = {}
        """How a client finds it, as in the ready line and the runtime file: ``path`` on Linux, ``shm`` on macOS."""
        try:
            if is_memfd:
                self._make_memfd()
            else:
                self._make_shared_memory()
        except (OSError, ImportError, AttributeError) as error:
            self.close()
            raise PageError(f"no shared memory for heartbeats and gauges: {error}") from None

    def _make_memfd(self) -> None:
        if sys.platform != "linux":
            raise PageError("a memfd exists on Linux only")
        self._fd = os.memfd_create("vitalsd-signals", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.fchmod(self._fd, 0o600)
        _write_header(self._fd)
        fcntl.fcntl(self._fd, F_ADD_SEALS, SEALS)
        self.reference = {"path": f"/proc/{self._pid}/fd/{self._fd}"}

    def _make_shared_memory(self) -> None:
        posixshmem = import_module("_posixshmem")  # as multiprocessing.shared_memory does

        name = f"/vitalsd-{self._pid}-{os.urandom(6).hex()}"
        self._fd = posixshmem.shm_open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        self.reference = {"shm": name}
        os.ftruncate(self._fd, PAGE_BYTES)
        self._map = mmap.mmap(self._fd, PAGE_BYTES)
        self._map[:] = empty_page()

    def read(self) -> bytes:
        """Return the content. Raise `OSError`."""
        if self._map is not None:  # macOS: pread(2) does not read shared memory
            return self._map[:]
        return os.pread(self._fd, PAGE_BYTES, 0)

    def clear(self) -> None:
        """Free all slots: the process that had them has ended. Raise `OSError`."""
        self.cleared += 1
        if self._map is not None:
            self._map[:] = empty_page()
        elif self._fd >= 0:
            os.pwrite(self._fd, empty_page(), 0)

    def free(self, content: bytes, now: bytes) -> None:
        """Free the slots of a program that another one has replaced: those that are the same in `content` and `now`."""
        freed = bytearray(now)
        words = memoryview(freed).cast("Q")
        for first, width, count, state in KINDS:
            for at in range(first, first + width * count, width):
                place = slice(8 * at, 8 * (at + width))
                if words[at + state] != FREE and content[place] == now[place]:
                    self._write_word(at + state, FREE)

    def _write_word(self, word: int, value: int) -> None:
        content = struct.pack("=Q", value)
        if self._map is not None:
            self._map[8 * word : 8 * word + 8] = content
        elif self._fd >= 0:
            os.pwrite(self._fd, content, 8 * word)

    def close(self) -> None:
        """Release it; clients that have mapped it write on without effect. A second call does nothing."""
        if self._map is not None:
            self._map.close()
            self._map = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if "shm" in self.reference and os.getpid() == self._pid:
            posixshmem = import_module("_posixshmem")

            with suppress(OSError):
                posixshmem.shm_unlink(self.reference["shm"])
        self.reference = {}


def empty_page() -> bytes:
    """Return the content of a page without heartbeats and gauges."""
    return struct.pack("=2Q", MAGIC, VERSION).ljust(PAGE_BYTES, b"\0")


def _write_header(fd: int) -> None:
    """Write the whole page, so that the kernel allocates all of it."""
    if os.pwrite(fd, empty_page(), 0) != PAGE_BYTES:
        raise OSError("the page was not written whole")


class MappedPage:
    """
    The page of a sidecar, mapped by a client.

    Args:
        reference: `SignalsPage.reference`.

    Raises:
        PageError: it cannot be opened, is not a page, or could shrink while it is mapped.
    """

    def __init__(self, reference: Mapping[str, str]) -> None:
        self.reference = dict(reference)
        try:
            with _standard_descriptors_taken():
                fd = _open_page(reference)
                try:
                    if "path" in reference and fcntl.fcntl(fd, F_GET_SEALS) & SEALS != SEALS:
                        raise PageError("it could shrink while it is mapped: it is not a sealed memfd")
                    if os.fstat(fd).st_size < PAGE_BYTES:
                        raise PageError("it is too small")
                    self.words = memoryview(mmap.mmap(fd, PAGE_BYTES)).cast("Q")
                    """All words of the page."""
                finally:
                    os.close(fd)
            if self.words[0] != MAGIC or self.words[1] != VERSION:
                raise PageError("it does not begin with the magic number and version of this vitalsd")
        except (OSError, ImportError, ValueError) as error:
            raise PageError(f"the page of the sidecar for heartbeats cannot be mapped: {error}") from None

    @property
    def is_open(self) -> bool:
        """Whether the sidecar still has the page: after its end it cannot be opened again."""
        try:
            os.close(_open_page(self.reference))
        except (OSError, ImportError):
            return False
        return True

    @contextmanager
    def locked(self) -> Iterator[None]:
        """
        Exclude other processes while a slot is taken, for at most `LOCK_S`; macOS has no lock for a page.

        A record lock, because a forked child does not inherit it.
        """
        fd = -1
        try:
            with suppress(OSError, ImportError):
                fd = _open_page(self.reference)
                _lock(fd, time.monotonic() + LOCK_S)
            yield
        finally:
            if fd >= 0:
                os.close(fd)

    def free_slot(self, *, gauge: bool) -> int | None:
        """Return the first word of a slot that is not taken; ``None``: all are taken. Call it `locked`."""
        first, width, count, state = KINDS[gauge]
        places = range(first, first + width * count, width)
        return next((at for at in places if self.words[at + state] == FREE), None)


def _lock(fd: int, deadline: float) -> None:
    while time.monotonic() < deadline:
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            time.sleep(0.002)
        else:
            return


@contextmanager
def _standard_descriptors_taken() -> Iterator[None]:
    """Take the free ones of the descriptors 0 to 2: a mapping keeps a descriptor, which no ``printf`` must hit."""
    taken: list[int] = []
    try:
        while (fd := os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)) <= 2:
            taken.append(fd)
        os.close(fd)
        yield
    finally:
        for each in taken:
            os.close(each)


def _open_page(reference: Mapping[str, str]) -> int:
    if "path" in reference:
        return os.open(reference["path"], os.O_RDWR | os.O_CLOEXEC)
    if "shm" in reference:
        posixshmem = import_module("_posixshmem")

        return int(posixshmem.shm_open(reference["shm"], os.O_RDWR, 0o600))
    raise PageError("this sidecar has none")
