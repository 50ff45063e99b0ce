"""
The spool on disk: which report is in which state, what is known of it, and which process is sending it.

A state is a directory, a report a file in it, and a change of state rename(2). See `vitalsd_client.spool`.
"""

import errno
import fcntl
import json
import logging
import os
import re
import secrets
import stat
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeGuard

from vitalsd.contract.report_archive import MANIFEST
from vitalsd.discovery.atomic_file import draft, sync_directory
from vitalsd.discovery.directories import EndpointError, private_directory

__all__ = ["STATES", "Entry", "SpoolError", "State", "States", "Use", "first_note"]

ORPHAN_S = 3600.0
"""A file in ``new/`` this old was left by a writer that died."""

LATEST_S = 253_402_300_799
"""The end of the year 9999, Unix time."""

FAR_S = 1e15
"""Beyond this, some 30 million years, a clock counts as this. So every sum of clocks is a number that JSON has."""

CLOCK = "clock"
"""Name of the file with the last use of the spool and the steps of the clock."""

USE_S = 60.0
"""A use so soon after the last one is not written down: each time costs two syncs of the disk."""

NO_LOCKS = frozenset((errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.EBADF))
"""What flock(2) says where the file system has no locks, as NFS without lockd and some of FUSE."""

_claims: dict[tuple[int, int, int], object] = {}
"""The reports that a thread of this process has now, by pid, device and inode: where there are no locks, nothing else
keeps two threads from sending one report. A forked child has another pid, so it inherits no claim."""

NAME = re.compile(r"([0-9a-f]{32})\.(zip|json)", re.ASCII)
DRAFT = re.compile(rf"({NAME.pattern}|{CLOCK})\.[0-9a-f]{{16}}", re.ASCII)
"""Name of a file in ``new/``: that which it gets when it is whole, and 64 random bits."""
MAILDIR = frozenset(("cur", "new", "tmp"))
MAX_MANIFEST_BYTES = 1 << 20
State = Literal["pending", "done", "failed"]
STATES: tuple[State, ...] = ("pending", "done", "failed")


class SpoolError(Exception):
    """The spool cannot keep or give the report; ``str(error)`` says why."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A report in the spool."""

    report_id: str
    state: State
    size: int
    """Bytes; 0 once it is done."""
    added: float
    """Unix time, s."""
    url: str | None
    attempts: int
    not_before: float
    """Unix time, s, of the next attempt; 0: any time."""
    asked: bool
    """The server asked for that time."""
    note: str
    """The receipt, or what went wrong the last time."""


@dataclass(frozen=True, slots=True)
class Use:
    """One use of the spool."""

    before: float
    """Unix time, s, of the use before; of this one if there was none."""
    age_clock: float
    """Clock for ages, s: Unix time without the steps that were seen since the spool was made."""


class States:
    """
    The directories of one spool.

    Args:
        directory: made with mode 0700 if it is not there. One that others can write is refused, and so is one that
            another program keeps its files in. Files that are not reports of vitalsd are neither sent nor removed.

    Raises:
        SpoolError: it cannot be used.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._unwritten: dict[str, dict[str, Any]] = {}
        self._last_use: tuple[float, float] | None = None
        try:
            private_directory(directory)
            _check_kind(directory)
            for name in ("new", *STATES):
                private_directory(directory / name)
        except EndpointError as error:
            raise SpoolError(str(error)) from None
        except OSError as error:
            raise SpoolError(f"cannot look into {directory}: {error.strerror}") from None

    def path(self, state: State, report_id: str, suffix: str) -> Path:
        return self.directory / state / f"{report_id}.{suffix}"

    def entries(self, state: State) -> list[Entry]:
        suffix = "json" if state == "done" else "zip"
        found = []
        try:
            names = os.listdir(self.directory / state)
        except OSError as error:
            raise SpoolError(f"cannot look into {self.directory / state}: {error.strerror}") from None
        for name in names:
            match = NAME.fullmatch(name)
            if match is not None and match[2] == suffix:
                with suppress(OSError):  # another process has just moved it on
                    if self._is_report(state, match[1]):
                        found.append(self.entry(state, match[1]))
        return found

    def all(self) -> list[Entry]:
        """Return pending reports, then done, then failed; in each the oldest first. Raises `SpoolError`."""
        found = [entry for state in STATES for entry in self.entries(state)]
        return sorted(found, key=lambda entry: (STATES.index(entry.state), entry.added, entry.report_id))

    def find(self, report_id: str) -> Entry | None:
        """Look a report up in the listing: an id never becomes a path. Raises `SpoolError`."""
        return next((entry for entry in self.all() if entry.report_id == report_id), None)

    def entry(self, state: State, report_id: str) -> Entry:
        found = os.lstat(self.path(state, report_id, "json" if state == "done" else "zip"))
        if not stat.S_ISREG(found.st_mode):
            raise FileNotFoundError
        note = self.note_of(state, report_id)
        url = note.get("url")
        return Entry(
            report_id=report_id,
            state=state,
            size=0 if state == "done" else found.st_size,
            added=_number(note.get("added"), min(max(0.0, found.st_mtime), LATEST_S)),
            url=url if isinstance(url, str) else None,
            attempts=int(_number(note.get("attempts"), 0)),
            not_before=_number(note.get("not_before"), 0),
            asked=note.get("asked") is True,
            note=str(note.get("receipt") or note.get("error") or ""),
        )

    def note_of(self, state: State, report_id: str) -> dict[str, Any]:
        """Read what is known of a report besides itself. A damaged note costs a delay, never the report."""
        if report_id in self._unwritten:
            return self._unwritten[report_id]
        with suppress(OSError, ValueError, RecursionError):
            fd = os.open(
                self.path(state, report_id, "json"), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            )
            with os.fdopen(fd, "rb") as file:
                note = json.loads(file.read(65536))
            if isinstance(note, dict):
                return note
        return {}

    def _is_report(self, state: State, report_id: str) -> bool:
        """
        Return whether vitalsd wrote the file: its note says when it was added, or its manifest has this id.

        Another program may name its files by 32 hexadecimal digits, too.
        """
        if self._is_noted(state, report_id):
            return True
        if state != "done":
            with suppress(
                OSError, ValueError, KeyError, RecursionError, RuntimeError, EOFError, zlib.error, zipfile.BadZipFile
            ):
                fd = os.open(
                    self.path(state, report_id, "zip"), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                )
                with os.fdopen(fd, "rb") as file, zipfile.ZipFile(file) as archive, archive.open(MANIFEST) as member:
                    manifest = json.loads(member.read(MAX_MANIFEST_BYTES))
                return isinstance(manifest, dict) and manifest.get("report_id") == report_id
        return False

    def _is_noted(self, state: State, report_id: str) -> bool:
        return not {"added", "receipt"}.isdisjoint(self.note_of(state, report_id))

    def tried(self, entry: Entry) -> float | None:
        """Return the time of the first attempt, s, by `Use.age_clock`; ``None``: there was none."""
        tried = self.note_of(entry.state, entry.report_id).get("tried")
        return float(tried) if _is_number(tried) else None

    def use(self, now: float, longest_s: float) -> Use:
        """
        Note a use of the spool, and return what the clock did since the one before.

        What it moved back, or forward by more than `longest_s`, is a step of the clock, or a long time without a use;
        neither makes a report older.

        Args:
            now: Unix time, s.
            longest_s: the longest time between two uses that counts as age, s.
        """
        now = min(max(-FAR_S, now), FAR_S)
        known = self._clock() or self._last_use
        last, steps = known or (now, 0.0)
        moved = now - last
        if not 0.0 <= moved <= longest_s:
            steps += moved
        if known is None or not 0.0 <= moved < USE_S:
            self._last_use = now, steps
            with suppress(OSError):  # then this object knows it, and the next one compares with an earlier use
                self._put(self.directory, CLOCK, json.dumps({"used": now, "steps": steps}).encode())
        return Use(last, now - steps)

    def _clock(self) -> tuple[float, float] | None:
        with suppress(OSError, ValueError, RecursionError, AttributeError):
            fd = os.open(self.directory / CLOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with os.fdopen(fd, "rb") as file:
                found = json.loads(file.read(4096))
            used, steps = found.get("used"), found.get("steps")
            if _is_number(used) and _is_number(steps):
                return float(used), float(steps)
        return None

    def note(self, report_id: str, note: dict[str, Any]) -> None:
        """Write it down, or on a full disk at least remember it."""
        try:
            self.write("pending", f"{report_id}.json", json.dumps(note).encode())
            self._unwritten.pop(report_id, None)
        except OSError as error:
            self._unwritten[report_id] = note
            logging.getLogger("vitalsd_client").warning("cannot write into the spool: %s", error.strerror)

    def write(self, state: State, name: str, content: bytes) -> None:
        """Write a file into the directory of a state, whole or not at all. Raises `OSError`."""
        self._put(self.directory / state, name, content)

    def _put(self, directory: Path, name: str, content: bytes) -> None:
        temporary = self.directory / "new" / f"{name}.{secrets.token_hex(8)}"
        with draft(temporary, content):
            os.rename(temporary, directory / name)
        sync_directory(directory)

    def move(self, report_id: str, suffix: str, old: State, new: State) -> None:
        with suppress(FileNotFoundError):
            os.rename(self.path(old, report_id, suffix), self.path(new, report_id, suffix))
        sync_directory(self.directory / new)

    @contextmanager
    def locked(self, report_id: str, state: State = "pending") -> Iterator[BinaryIO | None]:
        """
        Give the report, opened and locked; ``None`` if another sender has it, or it is there no longer.

        On a file system without locks it keeps out the other threads of this process alone.

        Raises:
            SpoolError: the lock cannot be asked for.
        """
        path = self.path(state, report_id, "zip")
        try:
            found = os.lstat(path)
        except OSError:
            yield None
            return
        # Claimed before it is opened: on NFS the process has the lock, and loses it when any thread closes the file.
        key, claim = (os.getpid(), found.st_dev, found.st_ino), object()
        if _claims.setdefault(key, claim) is not claim:
            yield None
            return
        try:
            file = _opened(path)
            with nullcontext() if file is None else file:
                yield file if file is not None and _lock(file, path) else None
        finally:
            del _claims[key]

    def remove(self, entry: Entry) -> bool:
        report_id = entry.report_id
        try:
            if entry.state == "done":
                os.unlink(self.path("done", report_id, "json"))
                return True
            with self.locked(report_id, entry.state) as file:
                if file is None:
                    if not self.path(entry.state, report_id, "zip").exists():
                        return False
                    raise SpoolError(f"{report_id} is being sent right now")
                os.unlink(self.path(entry.state, report_id, "zip"))
                with suppress(FileNotFoundError):
                    os.unlink(self.path(entry.state, report_id, "json"))
                return True
        except FileNotFoundError:
            return False
        except OSError as error:
            raise SpoolError(f"cannot remove {report_id}: {error.strerror}") from None

    def sweep(self, before: float) -> None:
        """
        Remove unfinished files of writers that have ended, and notes without a report; no files of other programs.

        Args:
            before: Unix time, s, of the last use but this one. By then the file was old already: one that a
                writer has begun just before the clock was set is not.
        """
        old = min(time.time(), before) - ORPHAN_S
        with suppress(OSError):
            for name in os.listdir(self.directory / "new"):
                if DRAFT.fullmatch(name):
                    _remove_old(self.directory / "new" / name, old)
        for state in ("pending", "failed"):
            with suppress(OSError):
                for name in os.listdir(self.directory / state):
                    match = NAME.fullmatch(name)
                    if match is None or match[2] != "json" or self.path(state, match[1], "zip").exists():
                        continue
                    if self._is_noted(state, match[1]):
                        _remove_old(self.directory / state / name, old)


def _check_kind(directory: Path) -> None:
    """Raise `SpoolError` if another program keeps its files in `directory`, as far as the names of directories tell."""
    remedy = "name a directory that is empty or not there yet"
    if set(os.listdir(directory)) >= MAILDIR:
        raise SpoolError(f"{directory} is a Maildir, which is a mailbox and not a spool; {remedy}")
    folders = [path for name in ("new", *STATES) if (path := directory / name).is_dir()]
    if len(folders) <= len(STATES):  # A spool has all of them.
        files = [path for folder in folders for path in folder.iterdir()]
        if files and not any(NAME.fullmatch(path.name) or DRAFT.fullmatch(path.name) for path in files):
            raise SpoolError(f"{files[0].parent} has files of another program: {directory} is no spool; {remedy}")


def _remove_old(path: Path, old: float) -> None:
    """Remove a regular file of this user that is older than `old`, Unix time in s."""
    with suppress(OSError):
        found = os.lstat(path)
        if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and found.st_mtime < old:
            os.unlink(path)


def first_note(url: str | None, added: float) -> bytes:
    return json.dumps({"url": url, "added": added, "attempts": 0}).encode()


def _opened(path: Path) -> BinaryIO | None:
    """Return the open file, or ``None`` if it cannot be opened. To lock it, NFS wants it open for writing."""
    for mode in os.O_RDWR, os.O_RDONLY:
        with suppress(OSError):
            return os.fdopen(os.open(path, mode | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    return None


def _lock(file: BinaryIO, path: Path) -> bool:
    """Return whether the file is locked now, or cannot be, and still is at `path`. Raises `SpoolError`."""
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):  # EACCES: what fcntl(2) may say, which NFS makes of it
            return False
        if error.errno not in NO_LOCKS:
            raise SpoolError(
                f"cannot lock {path}: {error.strerror}; keep the spool on a file system with flock(2)"
            ) from None
    try:
        # The process that held the lock before may have moved the file on.
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    except OSError:
        return False


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and abs(value) <= 2 * FAR_S


def _number(value: Any, default: float) -> float:
    return float(value) if isinstance(value, (int, float)) and 0 <= value <= LATEST_S else default
