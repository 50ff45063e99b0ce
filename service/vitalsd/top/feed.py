"""
Where the live view has its numbers from: the sidecar that watches the target, or else the target itself.

A sidecar has been recording, so there is a past to show and the marks of others; and two lookers cost the
target no more than one. When it goes, the view goes on without it, and when it comes back, with it.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress

from vitalsd.discovery.http_connection import ExchangeError
from vitalsd.sources.base import Source, SourceError, TargetGone
from vitalsd.top.backends import Direct, Remote
from vitalsd.top.events import Ended, News, Subject, Trouble
from vitalsd_client.locate import NoSidecar, RunningSidecar, locate

__all__ = ["Feed"]

SHUN_S = 10.0
"""A sidecar that lives and does not answer is left alone so long, where the target can be read without it."""


class Feed:
    """
    The news of one target, for as long as it lives.

    Args:
        find: the pid of the target, asked for at the start and after every loss. Raises `SourceError`.
        open_source: opens a pid. Raises `SourceError`.
        interval_s: between two samples.
        first_s: until the first one; a screen that stays empty for long looks broken.
        url: ask this sidecar and nobody else.
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
        self._session: Remote | Direct | None = None
        self._subject: Subject | None = None
        self._over: str | None = None
        """`Subject.start_id` of the process that was last seen to end."""
        self._shunned: tuple[RunningSidecar, float] | None = None

    def stop(self) -> None:
        """End `news` at its next wait; from any thread."""
        self._stopped.set()

    def mark(self, label: str) -> str | None:
        """
        Put a label on the record's clock; from any thread. It may take seconds.

        Returns:
            Why it could not be done; ``None`` if it was.
        """
        session = self._session
        if session is None:
            return "nothing is being recorded"
        try:
            session.mark(label)
        except (ValueError, ExchangeError) as error:
            return str(error)
        return None

    def news(self) -> Iterator[News]:
        """
        All that there is to tell, waiting in between; to be called once.

        Raises:
            SourceError, NoSidecar, ExchangeError: there is nothing to tell from the start.
        """
        reason = ""
        while not self._stopped.is_set():
            self._session = None
            try:
                with closing(self._open()) as self._session:
                    for each in self._session.news(self._pause):
                        if isinstance(each, Subject):
                            if each.start_id == self._over:
                                raise TargetGone(reason)  # Its sidecar lingers; it has been shown.
                            if self._is_another(each):
                                raise TargetGone(f"process {each.pid} has exited; its pid is another process now")
                            self._subject = each
                        yield each
            except TargetGone as error:
                if self._subject is None:
                    raise
                final = self._session is not None and self._session.final
                self._session, self._over, reason = None, self._subject.start_id, str(error)
                yield Ended(reason)
                if final or not self.follow:
                    return
            except (SourceError, NoSidecar, ExchangeError) as error:
                if isinstance(self._session, Remote) and self._url is None:
                    self._shunned = self._session.sidecar, time.monotonic() + SHUN_S
                    continue  # at once, without it
                if self._subject is None:
                    raise
                yield Trouble(str(error))
            else:
                continue
            if not self._pause(time.monotonic() + self.interval_s):
                return

    def _is_another(self, found: Subject) -> bool:
        return not self.follow and self._subject is not None and self._subject.start_id != found.start_id

    def _open(self) -> Remote | Direct:
        if self._url is not None:
            return Remote(locate(url=self._url, pid=self._pid)[0], self._url, self.interval_s)
        pid = self._find()
        if (sidecar := self._watching(pid)) is not None:
            return Remote(sidecar, "a sidecar", self.interval_s)
        return Direct(self._open_source(pid), self.interval_s, self._first_s, lambda: self._watching(pid) is not None)

    def _watching(self, pid: int) -> RunningSidecar | None:
        with suppress(NoSidecar):
            if self._sidecars:
                # Those that watch another process could be asked as well, but have no past of this one.
                watching = (each for each in locate(pid=pid) if each.pid is None)
                return next((each for each in watching if not self._is_shunned(each)), None)
        return None

    def _is_shunned(self, sidecar: RunningSidecar) -> bool:
        return self._shunned is not None and self._shunned[0] == sidecar and time.monotonic() < self._shunned[1]

    def _pause(self, until: float) -> bool:
        """Wait until that monotonic time; False if it is over."""
        return not self._stopped.wait(max(0.0, until - time.monotonic()))
