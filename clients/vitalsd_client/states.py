"""
The spool on disk: which report is in which state, what is known of it, and who is sending it.

A state is a directory, a report a file in it, and a change of state rename(2). See `vitalsd_client.spool`.
"""

import fcntl
import json
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from vitalsd.directories import EndpointError, private_directory
from vitalsd.durable import draft, sync_directory

__all__ = ["STATES", "Entry", "SpoolError", "State", "States", "first_note"]

ORPHAN_S = 3600.0
"""A file in ``new/`` this old was left by a writer that died."""

LATEST_S = 253_402_300_799
"""The end of the year 9999, Unix time."""

NAME = re.compile(r"([0-9a-f]{32})\.(zip|json)", re.ASCII)
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


class States:
    """
    The directories of one spool.

    Args:
        directory: made with mode 0700 if it is not there; one that others can write is refused.

    Raises:
        SpoolError: it cannot be used.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._unwritten: dict[str, dict[str, Any]] = {}
        try:
            private_directory(directory)
            for name in ("new", *STATES):
                private_directory(directory / name)
        except EndpointError as error:
            raise SpoolError(str(error)) from None

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
                    found.append(self.entry(state, match[1]))
        return found

    def all(self) -> list[Entry]:
        """Pending ones, then done, then failed; in each the oldest first."""
        found = [entry for state in STATES for entry in self.entries(state)]
        return sorted(found, key=lambda entry: (STATES.index(entry.state), entry.added, entry.report_id))

    def find(self, report_id: str) -> Entry | None:
        """Looked up in the listing: an id never becomes a path."""
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
            added=_number(note.get("added"), found.st_mtime),
            url=url if isinstance(url, str) else None,
            attempts=int(_number(note.get("attempts"), 0)),
            not_before=_number(note.get("not_before"), 0),
            asked=note.get("asked") is True,
            note=str(note.get("receipt") or note.get("error") or ""),
        )

    def note_of(self, state: State, report_id: str) -> dict[str, Any]:
        """What is known of a report besides itself. A damaged note costs a delay, never the report."""
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

    def note(self, report_id: str, note: dict[str, Any]) -> None:
        """Write it down, or on a full disk at least remember it."""
        try:
            self.write("pending", f"{report_id}.json", json.dumps(note).encode())
            self._unwritten.pop(report_id, None)
        except OSError as error:
            self._unwritten[report_id] = note
            logging.getLogger("vitalsd_client").warning("cannot write into the spool: %s", error.strerror)

    def write(self, state: State, name: str, content: bytes) -> None:
        temporary = self.directory / "new" / f"{name}.{secrets.token_hex(8)}"
        with draft(temporary, content):
            os.rename(temporary, self.directory / state / name)
        sync_directory(self.directory / state)

    def move(self, report_id: str, suffix: str, old: State, new: State) -> None:
        with suppress(FileNotFoundError):
            os.rename(self.path(old, report_id, suffix), self.path(new, report_id, suffix))
        sync_directory(self.directory / new)

    @contextmanager
    def locked(self, report_id: str, state: State = "pending") -> Iterator[BinaryIO | None]:
        """The report, opened and locked; ``None`` if another process has it, or it is there no longer."""
        path = self.path(state, report_id, "zip")
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            yield None
            return
        with os.fdopen(fd, "rb") as file:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Whoever held the lock before us may have moved it on.
                mine = os.path.samestat(os.fstat(fd), os.lstat(path))
            except (BlockingIOError, FileNotFoundError):
                mine = False
            yield file if mine else None

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

    def sweep(self) -> None:
        """Remove what writers left that died: unfinished files, and notes whose report never came."""
        old = time.time() - ORPHAN_S
        for folder in ("new", "pending", "failed"):
            with suppress(OSError):
                for name in os.listdir(self.directory / folder):
                    path = self.directory / folder / name
                    orphan = folder == "new" or (path.suffix == ".json" and not path.with_suffix(".zip").exists())
                    with suppress(OSError):
                        if orphan and os.lstat(path).st_mtime < old:
                            os.unlink(path)


def first_note(url: str | None, added: float) -> bytes:
    return json.dumps({"url": url, "added": added, "attempts": 0}).encode()


def _number(value: Any, default: float) -> float:
    return float(value) if isinstance(value, (int, float)) and 0 <= value <= LATEST_S else default
