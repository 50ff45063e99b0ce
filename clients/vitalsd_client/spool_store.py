"""
Store the reports of a spool on disk, with the state and the note of each.

A state is a directory, a report is a file in it, and rename(2) changes the state. See `vitalsd_client.spool`.
"""

import json
import logging
import os
import re
import secrets
import stat
import time
import zipfile
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vitalsd.contract.report_archive import MANIFEST
from vitalsd.discovery.atomic_file import draft, sync_directory
from vitalsd.discovery.directories import EndpointError, private_directory
from vitalsd_client.spool_clock import CLOCK, is_number
from vitalsd_client.spool_lock import SpoolError, locked

__all__ = ["STATES", "Entry", "SpoolError", "State", "States", "first_note"]

ORPHAN_S = 3600.0
"""Age of a file in ``new/``, s, from which on it is a leftover of a writer that was killed."""

LATEST_S = 253_402_300_799
"""Latest time that a note can have, Unix time in s: the end of the year 9999, which `datetime` can show."""

NAME = re.compile(r"([0-9a-f]{32})\.(zip|json)", re.ASCII)
"""Name of a file in the directory of a state: the id of the report and the kind of the file."""
DRAFT = re.compile(rf"({NAME.pattern}|{CLOCK})\.[0-9a-f]{{16}}", re.ASCII)
"""Name of a file in ``new/``: its final name and 64 random bits."""
MAILDIR = frozenset(("cur", "new", "tmp"))
"""Directories of a Maildir, of which ``new`` would be shared with a spool."""
MAX_MANIFEST_BYTES = 1 << 20
"""Limit to read of the manifest of a report, bytes."""
State = Literal["pending", "done", "failed"]
STATES: tuple[State, ...] = ("pending", "done", "failed")


@dataclass(frozen=True, slots=True)
class Entry:
    """Describe a report in the spool."""

    report_id: str
    state: State
    size: int
    """Size of the zip, bytes; 0 when it is done."""
    added: float
    """Time of `Spool.add`, Unix time in s."""
    url: str | None
    attempts: int
    not_before: float
    """Time of the next attempt, Unix time in s; 0: any time."""
    asked: bool
    """Whether the server asked for that time, by ``Retry-After``."""
    note: str
    """Number of the receipt, or the reason why the last attempt failed."""


class States:
    """
    Read and write the directories of one spool.

    Args:
        directory: made with mode 0700 if it does not exist. A directory that other users can write is refused, and so
            is one with the files of another program. Files that are not reports of vitalsd are neither sent nor
            removed.

    Raises:
        SpoolError: the directory cannot be used.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._unwritten: dict[str, dict[str, Any]] = {}
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
        """Return the path of a file of a report; `suffix` is ``zip`` or ``json``."""
        return self.directory / state / f"{report_id}.{suffix}"

    def entries(self, state: State) -> list[Entry]:
        """Return the reports in one state, in no order. Raises `SpoolError`."""
        suffix = "json" if state == "done" else "zip"
        found = []
        try:
            names = os.listdir(self.directory / state)
        except OSError as error:
            raise SpoolError(f"cannot look into {self.directory / state}: {error.strerror}") from None
        for name in names:
            match = NAME.fullmatch(name)
            if match is not None and match[2] == suffix:
                with suppress(OSError):  # another process has just moved it
                    if self._is_report(state, match[1]):
                        found.append(self.entry(state, match[1]))
        return found

    def all(self) -> list[Entry]:
        """Return pending reports, then done, then failed; in each state the oldest first. Raises `SpoolError`."""
        found = [entry for state in STATES for entry in self.entries(state)]
        return sorted(found, key=lambda entry: (STATES.index(entry.state), entry.added, entry.report_id))

    def find(self, report_id: str) -> Entry | None:
        """Return a report of the listing by its id, which never becomes part of a path here. Raises `SpoolError`."""
        return next((entry for entry in self.all() if entry.report_id == report_id), None)

    def entry(self, state: State, report_id: str) -> Entry:
        """Read one report's entry. Raises `FileNotFoundError` if it is not in `state`, `OSError`."""
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
        """Return the note of a report; empty if it is damaged, which costs a delay and never the report."""
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
        Return whether vitalsd wrote the file: its note has the time of `add`, or its manifest has this id.

        Another program may also name its files by 32 hexadecimal digits.
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
        """Return the time of the first attempt, s, by the clock for ages; ``None``: there was none."""
        tried = self.note_of(entry.state, entry.report_id).get("tried")
        return float(tried) if is_number(tried) else None

    def note(self, report_id: str, note: dict[str, Any]) -> None:
        """Write the note of a pending report; keep it in memory if the disk is full."""
        try:
            self.write("pending", f"{report_id}.json", json.dumps(note).encode())
            self._unwritten.pop(report_id, None)
        except OSError as error:
            self._unwritten[report_id] = note
            logging.getLogger("vitalsd_client").warning("cannot write into the spool: %s", error.strerror)

    def write(self, state: State, name: str, content: bytes) -> None:
        """Write a file into the directory of a state atomically. Raises `OSError`."""
        self.put(self.directory / state, name, content)

    def put(self, directory: Path, name: str, content: bytes) -> None:
        """Write a file into a directory of the spool atomically, and sync it. Raises `OSError`."""
        temporary = self.directory / "new" / f"{name}.{secrets.token_hex(8)}"
        with draft(temporary, content):
            os.rename(temporary, directory / name)
        sync_directory(directory)

    def move(self, report_id: str, suffix: str, old: State, new: State) -> None:
        """Move a file of a report to another state, if it exists, and sync the directory. Raises `OSError`."""
        with suppress(FileNotFoundError):
            os.rename(self.path(old, report_id, suffix), self.path(new, report_id, suffix))
        sync_directory(self.directory / new)

    def remove(self, entry: Entry) -> bool:
        """Remove a report; return False if there is none. Raises `SpoolError`: a sender has it, or the disk fails."""
        report_id = entry.report_id
        try:
            if entry.state == "done":
                os.unlink(self.path("done", report_id, "json"))
                return True
            with locked(self.path(entry.state, report_id, "zip")) as file:
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
        Remove unfinished files of killed writers, and notes without a report, but no files of other programs.

        Args:
            before: time of the previous use, Unix time in s. The file must have been old then: otherwise a file that a
                writer has just begun would look old after a step of the clock.
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
    """Raise `SpoolError` if another program keeps its files in `directory`, as far as their names show it."""
    remedy = "name a directory that is empty or not there yet"
    if set(os.listdir(directory)) >= MAILDIR:
        raise SpoolError(f"{directory} is a Maildir, which is a mailbox and not a spool; {remedy}")
    folders = [path for name in ("new", *STATES) if (path := directory / name).is_dir()]
    if len(folders) <= len(STATES):  # a spool has all of them
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
    """Return the note of a report without attempts, as JSON."""
    return json.dumps({"url": url, "added": added, "attempts": 0}).encode()


def _number(value: Any, default: float) -> float:
    """Return `value` if it is a number that a note can have, else `default`."""
    return float(value) if isinstance(value, (int, float)) and 0 <= value <= LATEST_S else default
