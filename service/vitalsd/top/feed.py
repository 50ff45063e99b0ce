"""
Yield the events of the live view from the sidecar that watches the target, or else from the target itself.

A sidecar has a recording and the marks of other clients, and several views of it read the target only once. When the
sidecar ends, the feed reads the target directly; when a sidecar is available again, the feed asks it.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress

from vitalsd.contract.encoding import Detail
from vitalsd.discovery.http_connection import ExchangeError
from vitalsd.sources.base import Source, SourceError, TargetGoneError
from vitalsd.top.backends import DirectBackend, SidecarBackend
from vitalsd.top.events import Ended, FeedEvent, Interrupted, TargetInfo
from vitalsd_client.locate import NoSidecarError, RunningSidecar, locate

__all__ = ["Feed"]

SIDECAR_RETRY_S = 10.0
"""Time for which a sidecar that did not answer is not asked again, s, if the target can be read."""


class Feed:
    """
    Yield the events of one target until it exits.

    Args:
        find: returns the pid of the target; called at the start and after each loss. Raises `SourceError`.
        open_source: opens the process of a pid. Raises `SourceError`.
        interval_s: time between two samples, s.
        first_s: upper bound of the time until the first sample, s: an empty screen looks broken.
        url: URL of the only sidecar to ask.
        pid: with `url`, the process to ask about; ``None``: the sidecar's own target.
        follow: wait for the next process when the target has exited.
        sidecars: look for a sidecar that watches the target.
        detail: which fields the samples have.
    """

    def __init__(
        self,
        find: Callable[[], int],
        open_source: Callable[[int], Source],
        *,
        interval_s: float = 1.0,
        first_s: float = 60.0,
        url: str | None = None,
        pid: int | None = None,
        follow: bool = False,
        sidecars: bool = True,
        detail: Detail = "basic",
    ) -> None:
        self.interval_s = interval_s
        self.follow = follow
        self._find = find
        self._open_source = open_source
        self._first_s = min(first_s, interval_s)
        self._url = url
        self._pid = pid
        self._sidecars = sidecars
        self._detail = detail
        self._stopped = threading.Event()
        self._session: SidecarBackend | DirectBackend | None = None
        self._target: TargetInfo | None = None
        self._over: str | None = None
        """`TargetInfo.start_id` of the process that was last seen to end."""
        self._unanswered: tuple[RunningSidecar, float] | None = None

    def stop(self) -> None:
        """End `events` at its next wait. May be called on any thread."""
        self._stopped.set()

    def mark(self, label: str) -> str | None:
        """
        Record a labelled mark; this may take seconds. May be called on any thread.

        Returns:
            Why it was not recorded; None if it was.
        """
        session = self._session
        if session is None:
            return "nothing is being recorded"
        try:
            session.mark(label)
        except (ValueError, ExchangeError) as error:
            return str(error)
        return None

    def events(self) -> Iterator[FeedEvent]:
        """
        Yield events, and wait between samples. Call it once.

        Raises:
            SourceError, NoSidecarError, ExchangeError: there is no target at the start.
        """
        reason = ""
        while not self._stopped.is_set():
            self._session = None
            try:
                with closing(self._open()) as self._session:
                    for each in self._session.events(self._pause):
                        if isinstance(each, TargetInfo):
                            if each.start_id == self._over:
                                raise TargetGoneError(reason)  # Its sidecar lingers; its end has been shown.
                            if self._is_another(each):
                                raise TargetGoneError(f"process {each.pid} has exited; its pid is another process now")
                            self._target = each
                        yield each
            except TargetGoneError as error:
                if self._target is None:
                    raise
                final = self._session is not None and self._session.final
                self._session, self._over, reason = None, self._target.start_id, str(error)
                yield Ended(reason)
                if final or not self.follow:
                    return
            except (SourceError, NoSidecarError, ExchangeError) as error:
                if isinstance(self._session, SidecarBackend) and self._url is None:
                    self._unanswered = self._session.sidecar, time.monotonic() + SIDECAR_RETRY_S
                    continue  # Read the target at once, without the sidecar.
                if self._target is None:
                    raise
                yield Interrupted(str(error))
            else:
                continue
            if not self._pause(time.monotonic() + self.interval_s):
                return

    def _is_another(self, found: TargetInfo) -> bool:
        return not self.follow and self._target is not None and self._target.start_id != found.start_id

    def _open(self) -> SidecarBackend | DirectBackend:
        """Return the backend to use now. Raises `SourceError`, `NoSidecarError`."""
        if self._url is not None:
            return SidecarBackend(locate(url=self._url, pid=self._pid)[0], self._url, self.interval_s, self._detail)
        pid = self._find()
        if (sidecar := self._watching(pid)) is not None:
            return SidecarBackend(sidecar, "via sidecar", self.interval_s, self._detail)
        return DirectBackend(
            self._open_source(pid),
            self.interval_s,
            self._first_s,
            lambda: self._watching(pid) is not None,
            self._detail,
        )

    def _watching(self, pid: int) -> RunningSidecar | None:
        """Return a sidecar that records the process `pid`; None: there is none that answers."""
        with suppress(NoSidecarError):
            if self._sidecars:
                # Sidecars of other processes could be asked too, but have no recording of this one.
                watching = (each for each in locate(pid=pid) if each.pid is None)
                return next((each for each in watching if not self._is_unanswered(each)), None)
        return None

    def _is_unanswered(self, sidecar: RunningSidecar) -> bool:
        return (
            self._unanswered is not None and self._unanswered[0] == sidecar and time.monotonic() < self._unanswered[1]
        )

    def _pause(self, until: float) -> bool:
        """Wait until a monotonic time, s; return False if the feed has to end."""
        return not self._stopped.wait(max(0.0, until - time.monotonic()))
