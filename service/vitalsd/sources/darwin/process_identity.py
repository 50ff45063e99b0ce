"""`vitalsd.sources.process_identity` on macOS."""

import time

from vitalsd.sources.darwin.apple_headers import proc_taskallinfo
from vitalsd.sources.darwin.functions import MachError
from vitalsd.sources.darwin.libsystem import LibSystem
from vitalsd.sources.darwin.task import boot_id, start_key
from vitalsd.sources.process_identity import IdentityUnknownError, anonymous

__all__ = ["DarwinBirths"]


class DarwinBirths:
    """
    Asks libproc, which answers for processes of this user and not for zombies.

    Args:
        lib: libSystem.
    """

    def __init__(self, lib: LibSystem) -> None:
        self._lib = lib

    def realm(self) -> str:
        return anonymous(self._lib.host.uuid())

    def boot_id(self) -> str:
        return boot_id(self._lib)

    def booted_unix_ns(self) -> int:
        return time.time_ns() - self._lib.host.continuous_ns()

    def start_key(self, pid: int) -> int | None:
        info = proc_taskallinfo()
        try:
            self._lib.proc.info(pid, info)
        except ProcessLookupError:
            return None
        except (OSError, MachError) as error:
            raise IdentityUnknownError(f"process {pid}: {error}") from None
        return start_key(info.pbsd)
