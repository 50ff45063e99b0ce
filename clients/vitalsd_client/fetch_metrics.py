"""
Fetch the metrics from a sidecar within a time limit, also on a machine where something fails already.

`fetch` returns within the window and 2 s, whatever is broken. Every socket operation has the remaining time as its
timeout. The work runs on a daemon thread, which is abandoned if the file system hangs.
"""

import asyncio
import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from vitalsd.contract.metrics import FullMetrics, Measured, RuntimeMetrics, Unavailable, parse_runtime_metrics
from vitalsd.discovery.http_connection import Answer, ExchangeError
from vitalsd.sources.names import publish_names
from vitalsd_client.daemon_call import Call
from vitalsd_client.locate import ANSWER_S, NoSidecarError, RunningSidecar, locate, refusal, responsive
from vitalsd_client.redaction import redact_host_details

__all__ = ["BUDGET_S", "Mode", "afetch", "fetch"]

Mode = Literal["auto", "wait", "trailing"]
Detail = Literal["basic", "full"]

BUDGET_S = 2.0
"""Time limit of `fetch` beyond the window, s."""
MARGIN_S = 0.3
"""Part of `BUDGET_S` reserved for reading a large answer and for a busy machine, s."""
DIRECT_S = 0.25
"""Part of the time reserved for the direct measurement after a sidecar that hung to the end, s."""
COVERED = 0.99
"""A trailing window covers the requested one if it has at least this fraction of its length."""
WINDOW_MS = range(10, 60_001)
"""Windows that a sidecar accepts, ms."""
MEASURED_STATUS = (200, 403, 404, 410, 501, 503)
"""HTTP statuses with which a sidecar may send a `RuntimeMetrics`; with all others it sends a problem."""
MAX_PLATFORM = 32
"""Limit for the name of a platform, characters; the names of ``sys.platform`` are shorter."""
HUNG = "looking for a sidecar did not end in time: the machine or a file system hangs"


def fetch(
    window_ms: int = 2000,
    mode: Mode = "auto",
    *,
    url: str | None = None,
    socket: str | os.PathLike[str] | None = None,
    pid: int | None = None,
    detail: Detail = "basic",
    children: bool = False,
    direct: bool = False,
) -> RuntimeMetrics:
    """
    Return the metrics of this process, or the reason why there are none; it raises no exception.

    It returns within the window and 2 s. It does not use the proxies of the environment.

    Args:
        window_ms: window to measure, 10 to 60000 ms.
        mode: ``trailing``: the window that has just passed. ``wait``: the coming window. ``auto``: ``trailing`` if the
            sidecar's recorder covers that window, otherwise ``wait``. After the exit of the process, as long as its
            sidecar lingers, ``trailing`` returns its last window and ``wait`` the reason that it has exited.
        url: URL of a sidecar, such as ``http://127.0.0.1:9779``, instead of discovery. It returns its own target.
        socket: path of a sidecar's Unix socket; tried before `url`.
        pid: the process to measure; ``None``: this process.
        detail: ``full`` returns a `FullMetrics`.
        children: with ``full``, name the living descendants of the process, and sum them with it. If the sidecar does
            not record them, ``auto`` measures the coming window.
        direct: measure the process without a sidecar if none answers; this takes the window.
    """
    question = _Question(window_ms, mode, url, socket, pid, detail, children, direct)
    try:
        call = Call(question.ask)
    except RuntimeError:
        return question.ask()  # no thread can be started: without it a hung file system has no time limit
    return call.result() if call.wait(question.remaining_s + MARGIN_S / 2) else unavailable(HUNG)


async def afetch(
    window_ms: int = 2000,
    mode: Mode = "auto",
    *,
    url: str | None = None,
    socket: str | os.PathLike[str] | None = None,
    pid: int | None = None,
    detail: Detail = "basic",
    children: bool = False,
    direct: bool = False,
) -> RuntimeMetrics:
    """Do what `fetch` does without blocking the event loop. If cancelled, its thread ends within the same time."""
    question = _Question(window_ms, mode, url, socket, pid, detail, children, direct)
    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def wake() -> None:
        with suppress(RuntimeError):  # the loop has been closed: there is no waiter left
            loop.call_soon_threadsafe(done.set)

    try:
        call = Call(question.ask, wake)
    except RuntimeError as error:
        return unavailable(f"no thread could be started to ask a sidecar: {error}")
    with suppress(TimeoutError):
        async with asyncio.timeout(question.remaining_s + MARGIN_S / 2):
            await done.wait()
    return call.result() if call.wait(0) else unavailable(HUNG)


def unavailable(reason: str) -> Unavailable:
    """Return an answer without numbers. The reason may quote what another program sent, so it is redacted."""
    platform = {"darwin": "macos"}.get(sys.platform, sys.platform)
    return Unavailable(platform=platform, available=False, reason=redact_host_details(reason))


@dataclass(slots=True)
class _Question:
    """Hold the arguments of one call of `fetch`, and its deadline, which counts from the construction."""

    window_ms: Any
    mode: Mode
    url: str | None
    socket: str | os.PathLike[str] | None
    pid: int | None
    detail: Detail
    children: bool
    direct: bool
    deadline: float = 0.0

    def __post_init__(self) -> None:
        if self.pid is None:
            publish_names()
        window_ms = self.window_ms if isinstance(self.window_ms, int) else 0
        self.deadline = time.monotonic() + min(max(window_ms, 0), WINDOW_MS[-1]) / 1000 + BUDGET_S - MARGIN_S

    @property
    def remaining_s(self) -> float:
        return self.deadline - time.monotonic()

    def ask(self) -> RuntimeMetrics:
        """Return the answer; turn every exception into an `Unavailable`."""
        try:
            if not isinstance(self.window_ms, int) or self.window_ms not in WINDOW_MS:
                return unavailable(f"window_ms must be 10 to 60000, not {self.window_ms!r}")
            if self.children and self.detail != "full":
                return unavailable('children=True is answered with detail="full" alone')
            if self.direct and self.url is None and self.socket is None:
                return self._or_direct()
            return self._sidecars()
        except Exception as error:  # noqa: BLE001 - `fetch` promises its caller an answer, not an exception
            return unavailable(f"vitalsd_client failed: {type(error).__name__}: {error}")

    def _or_direct(self) -> RuntimeMetrics:
        """Ask the sidecars while the direct measurement runs; return the latter if no sidecar has an answer."""
        from vitalsd_client.direct import DirectMeasurement, DirectMeasurementError

        try:
            measurement = DirectMeasurement(self.detail, self.pid, children=self.children)
        except DirectMeasurementError as error:
            answer = self._sidecars()
            return answer if not isinstance(answer, Unavailable) else unavailable(f"{answer.reason}; {error}")
        with measurement:
            answer = self._sidecars()
            if not isinstance(answer, Unavailable):
                return answer
            try:
                return measurement.measured(self.window_ms)
            except DirectMeasurementError as error:
                return unavailable(f"{answer.reason}; {error}")

    def _sidecars(self) -> RuntimeMetrics:
        try:
            sidecars = locate(url=self.url, socket=self.socket, pid=self.pid)
        except NoSidecarError as error:
            return unavailable(str(error))
        reasons: list[str] = []
        for sidecar in responsive(sidecars, self.deadline, reasons):
            try:
                return self._sidecar(sidecar)
            except ExchangeError as error:
                reasons.append(str(error))
        return unavailable("; ".join(reasons))

    def _sidecar(self, sidecar: RunningSidecar) -> RuntimeMetrics:
        if self.mode == "auto":
            trailing = self._metrics(sidecar, "trailing")
            if not isinstance(trailing, Measured) or self._covered(trailing):
                return trailing
            # If the second request fails, a window of another length is better than no numbers.
            with suppress(ExchangeError):
                waited = self._metrics(sidecar, "wait")
                if isinstance(waited, Measured):
                    return waited
            return trailing
        return self._metrics(sidecar, self.mode)

    def _covered(self, answer: Measured | FullMetrics) -> bool:
        """
        Return whether the answer has what was requested: a window of about that length, and the children.

        A recorder with a long interval has longer windows; one that does not record children has none.
        """
        if self.children and (not isinstance(answer, FullMetrics) or answer.children is None):
            return False
        least, most = self.window_ms * COVERED, 2 * self.window_ms + 2000
        return bool(least <= answer.sample_window_ms <= most)

    def _metrics(self, sidecar: RunningSidecar, mode: str) -> RuntimeMetrics:
        query: dict[str, Any] = {"window_ms": self.window_ms, "mode": mode}
        if self.detail != "basic":
            query["detail"] = self.detail
        if self.children:
            query["children"] = "true"
        if sidecar.pid is not None:
            query["pid"] = sidecar.pid
        deadline = self.deadline - (DIRECT_S if self.direct else 0)
        needs_s = ANSWER_S + (self.window_ms / 1000 if mode == "wait" else 0)
        return _read(sidecar.get("/metrics", query, deadline=deadline, needs_s=needs_s))


def _read(answer: Answer) -> RuntimeMetrics:
    """Return the metrics of an HTTP answer. Raises `ExchangeError`: it has none."""
    if answer.content_type == "application/json" and answer.status in MEASURED_STATUS:
        try:
            found = parse_runtime_metrics(answer.body)
        except ValidationError as error:
            raise ExchangeError(f"the sidecar's answer is not a RuntimeMetrics: {_first(error)}") from None
        if answer.status == 200 or isinstance(found, Unavailable):
            if isinstance(found, Unavailable):
                # The reason may quote paths of the sidecar; the platform is text of a server that need not be ours.
                platform = redact_host_details(found.platform, MAX_PLATFORM)
                return found.model_copy(update={"reason": redact_host_details(found.reason), "platform": platform})
            return found
    raise ExchangeError(refusal(answer))


def _first(error: ValidationError) -> str:
    """Return the first problem of a body that is not valid, with the path of the field."""
    found = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return f"{'.'.join(str(part) for part in found['loc']) or 'body'}: {found['msg']}"
