"""
The source of the live view: the sidecar that watches the target, or else the target itself.

A sidecar has recorded the past and the marks of other clients, and two views of it cost the target no more than one.
When the sidecar ends, the feed reads the target itself; when a sidecar is there again, it asks that.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress

from vitalsd.discovery.http_connection import ExchangeError
from vitalsd.sources.base import Source, SourceError, TargetGoneError
from vitalsd.top.backends import DirectBackend, SidecarBackend
from vitalsd.top.events import Ended, FeedEvent, Interrupted, TargetInfo
from vitalsd_client.locate import NoSidecarError, RunningSidecar, locate

__all__ = ["Feed"]

SIDECAR_RETRY_S = 10.0  # A sidecar that did not answer is not asked for this long, if the target can be read.


class Feed:
    """
    The events of one target until it exits.

    Args:
        find: the pid of the target, asked for at the start and after every loss. Raises `SourceError`.
        open_source: opens a pid. Raises `SourceError`.
        interval_s: between two samples.
        first_s: until the first one; a screen that is empty for long looks broken.
        url: ask this sidecar only.
        pid: with `url`: about this process; ``None``: about the sidecar's own target.
        follow: when the target has exited, wait for the next one.
        sidecars: look for one that watches the target.
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
    ) -> None:
        self.interval_s = interval_s
        self.follow = follow
        self._find = find
        self._open_source = open_source
        self._first_s = min(first_s, interval_s)
        self._url = url
        self._pid = pid
        self._sidecars = sidecars
        self._stopped = threading.Event()
        self._session: SidecarBackend | DirectBackend | None = None
        self._target: TargetInfo | None = None
        self._over: str | None = None
        """`TargetInfo.start_id` of the process that was last seen to end."""
        self._unanswered: tuple[RunningSidecar, float] | None = None

    def stop(self) -> None:
        """End `events` at its next wait; from any thread."""
        self._stopped.set()

    def mark(self, label: str) -> str | None:
        """
        Put a label on the record's clock; from any thread. It may take seconds.

        Returns:
            Why it could not be done; None if it was done.
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
        Yield events, waiting in between; to be called once.

        Raises:
            SourceError, NoSidecarError, ExchangeError: there is no target from the start.
        """
        reason = ""
        while not self._stopped.is_set():
            self._session = None
            try:
                with closing(self._open()) as self._session:
                    for each in self._session.events(self._pause):
                        if isinstance(each, TargetInfo):
                            if each.start_id == self._over:
                                raise TargetGoneError(reason)  # Its sidecar lingers; it has been shown.
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
                    continue  # At once, without it.
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
        if self._url is not None:
            return SidecarBackend(locate(url=self._url, pid=self._pid)[0], self._url, self.interval_s)
        pid = self._find()
        if (sidecar := self._watching(pid)) is not None:
            return SidecarBackend(sidecar, "a sidecar", self.interval_s)
        return DirectBackend(
            self._open_source(pid), self.interval_s, self._first_s, lambda: self._watching(pid) is not None
        )

    def _watching(self, pid: int) -> RunningSidecar | None:
        with suppress(NoSidecarError):
            if self._sidecars:
                # Those that watch another process could be asked as well, but have no past of this one.
                watching = (each for each in locate(pid=pid) if each.pid is None)
                return next((each for each in watching if not self._is_unanswered(each)), None)
        return None

    def _is_unanswered(self, sidecar: RunningSidecar) -> bool:
        return (
            self._unanswered is not None and self._unanswered[0] == sidecar and time.monotonic() < self._unanswered[1]
        )

    def _pause(self, until: float) -> bool:
        """Wait until that monotonic time; return False if the feed is to end."""
        return not self._stopped.wait(max(0.0, until - time.monotonic()))
