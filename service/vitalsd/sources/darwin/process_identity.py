"""Identify on macOS the run of a process that has a pid, through libproc."""

import time

from vitalsd.sources.darwin.apple_headers import proc_taskallinfo
from vitalsd.sources.darwin.functions import MachError
from vitalsd.sources.darwin.libsystem import LibSystem
from vitalsd.sources.darwin.task import boot_id, start_key
from vitalsd.sources.process_identity import IdentityUnknownError, hash_machine_id

__all__ = ["DarwinProcessIdentityReader"]


class DarwinProcessIdentityReader:
    """
    The `ProcessIdentityReader` of macOS, from libproc, which finds the processes of this user without zombies.

    Args:
        lib: libSystem.
    """

    def __init__(self, lib: LibSystem) -> None:
        self._lib = lib

    def host_scope(self) -> str:
        """Return a digest of the UUID of this machine."""
        return hash_machine_id(self._lib.host.uuid())

    def boot_id(self) -> str:
        """Return the UUID of this boot."""
        return boot_id(self._lib)

    def booted_unix_ns(self) -> int:
        """Return the wall clock less the time since boot, ns."""
        return time.time_ns() - self._lib.host.continuous_ns()

    def start_key(self, pid: int) -> int | None:
        """Return the wall clock at fork, µs; ``None``: no such process. Raises `IdentityUnknownError`."""
        info = proc_taskallinfo()
        try:
            self._lib.proc.info(pid, info)
        except ProcessLookupError:
            return None
        except (OSError, MachError) as error:
            raise IdentityUnknownError(f"process {pid}: {error}") from None
        return start_key(info.pbsd)
