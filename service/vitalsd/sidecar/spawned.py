"""Control a spawned sidecar from its client: find its address, put a mark on its record, end it."""

import fcntl
import json
import logging
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any
from urllib.parse import urlsplit

from vitalsd.contract.labels import clean_label
from vitalsd.contract.signals import Gauge, Heartbeat, Signals, connect_signals, signals_in, signals_of_this_process
from vitalsd.discovery.own_sidecars import OwnSidecar, announce, withdraw
from vitalsd.sidecar.exit_note import ExitNoteWriter
from vitalsd.sources.names import publish_names

__all__ = ["SidecarProcess", "Spawned"]

log = logging.getLogger("vitalsd")

MARK_S = 0.25
"""A mark may take this long to be recorded, s: the thread that sets it may be that of a user interface."""


class SidecarProcess(subprocess.Popen[bytes]):
    """Start a process that may outlive this object."""

    def __del__(self) -> None:
        """Suppress the ResourceWarning: a sidecar may outlive this object, and the next Popen reaps it."""
        super().__del__(_warn=lambda *_, **__: None)  # type: ignore[call-arg]

    def kill_all(self) -> None:
        """Send SIGKILL to its process group: a one-file application consists of a launcher and its child."""
        if self.poll() is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)


class Spawned:
    """
    Control a sidecar that runs as a process of its own; made by `spawn`.

    The sidecar runs on if this object is dropped. As a context manager it stops the sidecar at the end.
    """

    def __init__(self, process: SidecarProcess, ready: Mapping[str, Any]) -> None:
        self._process = process
        self.pid: int = ready["pid"]
        """Process id of the sidecar; for a one-file application not that of its launcher."""
        self.url: str | None = ready["url"]
        """Base URL over TCP; ``None`` without TCP."""
        self.socket: str | None = ready["socket"]
        """Path of the Unix socket; ``None`` if there is none."""
        self.runtime_file: Path | None = ready["runtime_file"] and Path(ready["runtime_file"])
        """Path of the runtime file, which has the token if there is one; ``None`` if there is no file."""
        self.notes: tuple[str, ...] = ready["notes"]
        """What differs from what was requested or expected, such as a port that was taken, in sentences."""
        self._token: str | None = ready.get("token")
        self._signals: Mapping[str, str] | None = ready.get("signals")
        self._owner = os.getpid()
        self._own_target = False
        """Whether it watches this process."""
        self._exit_note: ExitNoteWriter | None = None
        self._own = OwnSidecar.at(self.socket, self.url, self._token, lambda: self.running)

    @property
    def running(self) -> bool:
        """Whether the process of the sidecar runs."""
        if self._owner != os.getpid():  # To a forked child the sidecar is a sibling, which it cannot wait for.
            with suppress(PermissionError):
                try:
                    os.kill(self.pid, 0)
                except ProcessLookupError:
                    return False
            return True
        if self._process.poll() is None:
            return True
        self._release()
        return False

    def watches_this_process(self, note_writer: IO[bytes]) -> None:
        """Note that this process is the target, and keep the pipe on which it notes its exit."""
        self._own_target = True
        self._exit_note = ExitNoteWriter(fcntl.fcntl(note_writer, fcntl.F_DUPFD_CLOEXEC, 3))
        announce(self._own)
        connect_signals(self._signals)

    def heartbeat(self, name: str, limit_s: float = 2.0) -> Heartbeat:
        """
        Return the heartbeat of this process with this name. The sidecar records its silences as hangs.

        Args:
            name: a letter and up to 31 of ``A-Z a-z 0-9 . _ -``.
            limit_s: longest time between two beats that is no hang, 0.25 to 3600 s.

        Raises:
            ValueError: the name or the limit is not valid, there are 32 already, or it watches another process.
        """
        return self._own_signals().heartbeat(name, limit_s)

    def gauge(self, name: str) -> Gauge:
        """
        Return the gauge of this process with this name. The sidecar records its values.

        Raises:
            ValueError: the name is not valid, there are 32 already, or the sidecar watches another process.
        """
        return self._own_signals().gauge(name)

    def _own_signals(self) -> Signals:
        if not self._own_target:
            raise ValueError("this sidecar watches another process, which has to signal its own heartbeats and gauges")
        return signals_in(self._signals)

    def _release(self) -> None:
        """Forget a sidecar that has ended. A second call does nothing."""
        withdraw(self._own)
        signals_of_this_process().leave(self._signals)
        if self._exit_note is not None:
            self._exit_note.close()

    def mark(self, label: str) -> bool:
        """
        Put a label on the recorder's clock; from any thread. It never raises, and returns within 0.25 s.

        Args:
            label: text; what a label cannot have is replaced, see `clean_label`.

        Returns:
            Whether the sidecar recorded it; if not, the logger ``vitalsd`` has the reason.
        """
        cleaned = clean_label(label)
        if cleaned is None:
            return False
        if self._own_target:
            publish_names()
        reason = self._post("/marks", {"label": cleaned}) if self.running else "its sidecar has ended"
        if reason is not None:
            log.warning("the mark %r was not recorded: %s", cleaned, reason)
        return reason is None

    def _post(self, path: str, body: Mapping[str, Any]) -> str | None:
        """Send JSON; return why it was not accepted, ``None`` if it was."""
        from vitalsd.discovery.http_connection import Connection, ExchangeError

        headers = {"Content-Type": "application/json"}
        try:
            if self.socket is not None:
                place: str | tuple[str, int] = self.socket
            else:
                parts = urlsplit(self.url or "")
                place = parts.hostname or "", parts.port or 0
                # It needs no proof of the token: the process that has the port is a child of this one, and it runs.
                if self._token is not None:
                    headers["Authorization"] = f"Bearer {self._token}"
            with Connection(place, time.monotonic() + MARK_S) as connection:
                content = json.dumps(body).encode()
                answer = connection.request(path, method="POST", headers=headers, body=content, max_bytes=4096)
        except (ExchangeError, OSError) as error:
            return str(error)
        return None if answer.status < 300 else f"the sidecar answered {answer.status}"

    def stop(self, timeout_s: float = 5.0) -> int:
        """
        End the sidecar by SIGTERM and, after `timeout_s`, by SIGKILL. A second call does nothing.

        Returns:
            Its exit status; if negative, the number of the signal that ended it.
        """
        if self.running:
            # For a one-file application to the child: its launcher may be removing the unpacked files already.
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill_all()
            return self._process.wait()
        finally:
            self._release()

    def __enter__(self) -> "Spawned":
        """Return this object; its sidecar runs already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the sidecar, see `stop`."""
        self.stop()
