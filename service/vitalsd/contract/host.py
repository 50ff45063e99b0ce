"""Describe the machine that was recorded, without a user, host or network name."""

import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from typing import Annotated, Any, NamedTuple

from typing_extensions import TypedDict

from vitalsd.contract.shapes import Count, Doc

__all__ = ["HostFactsJson", "RecordedHost", "os_version"]

MAX_TEXT = 64
"""Characters of a fact that is read from a file; more are cut off."""


class HostFactsJson(TypedDict):
    """The machine that was recorded; null where it is not known."""

    system: Annotated[str | None, Doc("Name of the kernel.")]
    release: Annotated[str | None, Doc("Release of the kernel.")]
    version: Annotated[str | None, Doc("Version of macOS; on Linux the release of the kernel.")]
    arch: str | None
    cpu_count: Count | None
    utc_offset_minutes: Annotated[int | None, Doc("Local time less UTC when it was recorded, minutes.")]


class RecordedHost(NamedTuple):
    """Facts about one machine; each is ``None`` where it is not known."""

    system: str | None = None
    """Name of the kernel: ``Linux`` or ``Darwin``."""
    release: str | None = None
    """Release of the kernel."""
    version: str | None = None
    """Version of macOS as its vendor names it; on Linux the release of the kernel."""
    arch: str | None = None
    cpu_count: int | None = None
    utc_offset_minutes: int | None = None
    """Local time less UTC, minutes, when the record was made."""

    @classmethod
    def this(cls) -> "RecordedHost":
        """Return the facts about this machine, now."""
        kernel = os.uname()  # nodename is not used, because it names the machine
        offset = datetime.now().astimezone().utcoffset()
        return cls(
            system=kernel.sysname,
            release=kernel.release,
            version=platform.mac_ver()[0] or kernel.release,
            arch=kernel.machine,
            cpu_count=os.cpu_count(),
            utc_offset_minutes=None if offset is None else round(offset.total_seconds() / 60),
        )

    @classmethod
    def read(cls, found: object) -> "RecordedHost":
        """Return the facts in JSON from a file; a fact of another type, or out of its range, is ``None``."""
        facts: Mapping[str, Any] = found if isinstance(found, Mapping) else {}

        def text(key: str) -> str | None:
            value = facts.get(key)
            return value[:MAX_TEXT] if isinstance(value, str) else None

        def number(key: str, least: int, most: int) -> int | None:
            value = facts.get(key)
            return value if type(value) is int and least <= value <= most else None

        return cls(
            system=text("system"),
            release=text("release"),
            version=text("version"),
            arch=text("arch"),
            cpu_count=number("cpu_count", 1, 1 << 20),
            utc_offset_minutes=number("utc_offset_minutes", -24 * 60, 24 * 60),
        )

    def to_json(self) -> HostFactsJson:
        """Return the facts as answers and reports have them."""
        return {
            "system": self.system,
            "release": self.release,
            "version": self.version,
            "arch": self.arch,
            "cpu_count": self.cpu_count,
            "utc_offset_minutes": self.utc_offset_minutes,
        }


def os_version() -> str:
    """
    Return the version of macOS that System Settings shows; of Linux, the release of the kernel.

    macOS 11 and 26 report 10.16 and 16 to programs that were built with an older SDK, such as Python. There the version
    comes from the release of Darwin: 20.x is macOS 11.x, 25.x is macOS 26.x.
    """
    version, release = platform.mac_ver()[0], platform.release()
    if not version:
        return release
    if version.startswith(("10.16", "16")):
        major, _, minor = release.partition(".")
        with suppress(ValueError):
            darwin = int(major)
            return f"{darwin + 1 if darwin >= 25 else darwin - 9}.{int(minor.partition('.')[0])}"
    return version
