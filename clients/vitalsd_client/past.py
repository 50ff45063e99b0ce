"""What the sidecar remembers, for a report: the history, the marks, and the run that crashed before."""

import json
import os
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from vitalsd_client.archive import HISTORY, MARKS, PREVIOUS_RUN, Failure, previous_run
from vitalsd_client.client import refusal
from vitalsd_client.exchange import Answer, ExchangeError
from vitalsd_client.places import NoSidecar, Sidecar, answering, locate
from vitalsd_client.privacy import harmless

__all__ = ["Past"]

TOP_THREADS = 50


class Past:
    """
    The record of the sidecar that `locate` finds with these arguments.

    Args:
        seconds: how far back.
    """

    def __init__(
        self, seconds: int, *, url: str | None, socket: str | os.PathLike[str] | None, pid: int | None
    ) -> None:
        self._seconds = min(max(seconds, 1), 86_400)
        self._url, self._socket, self._pid = url, socket, pid
        self._sidecar: Sidecar | None = None
        self.run_id: str | None = None
        """The crashed run that `read` found, to be passed to `mark_reported`."""

    def read(self, deadline: float) -> tuple[dict[str, bytes], list[Failure]]:
        """
        The members, and those that could not be had; never raises.

        Args:
            deadline: monotonic time, s.
        """
        members: dict[str, bytes] = {}
        try:
            found = locate(url=self._url, socket=self._socket, pid=self._pid)
            self._sidecar = next(answering(found, deadline, []))
            if self._sidecar.pid is not None:
                # Its record is about somebody else, who is none of this report's business.
                raise NoSidecar("the sidecar that answers watches another process, and has no record of this one")
            with self._sidecar.connected(deadline) as request:
                query = {"seconds": self._seconds, "top": TOP_THREADS}
                table = _json(request("/history", query, last=False), dict)
                members[HISTORY] = table[1]
                members[MARKS] = _json(request("/marks", last=False), list)[1]
                self._previous(request, members)
        except (NoSidecar, ExchangeError) as error:
            reason = harmless(str(error))
        except Exception as error:  # noqa: BLE001 - a strange answer must not sink the report
            reason = f"the sidecar's record is not understood: {type(error).__name__}"
        else:
            return members, []
        missing = next((name for name in (HISTORY, MARKS) if name not in members), PREVIOUS_RUN)
        return members, [Failure(missing, reason)]

    def _previous(self, request: Callable[..., Answer], members: dict[str, bytes]) -> None:
        """The newest run of the same program, but of an earlier process, that crashed and is in no report yet."""
        target = _json(request("/info", last=False), dict)[0]["target"]
        runs, _ = _json(request("/runs", last=False), list)
        # Two scripts of one interpreter have one name, and are none of each other's business.
        program = (target["name"], target.get("program", ""))
        crashed = [
            run
            for run in runs
            if run["state"] == "crashed" and not run["reported"]
            if not str(run["id"]).startswith(f"{target['start_id']}-")
            if (run["name"], run.get("program", "")) == program
        ]
        if crashed:
            run_id = str(crashed[0]["id"])
            answer = request(f"/runs/{quote(run_id, safe='')}/history", {"seconds": 86_400, "top": TOP_THREADS})
            members[PREVIOUS_RUN] = previous_run(crashed[0], _json(answer, dict)[1])
            self.run_id = run_id

    def mark_reported(self, run_id: str, deadline: float) -> None:
        """Tell the sidecar that the run is in a report. If that fails, the next report tells of it again."""
        if self._sidecar is not None:
            self._sidecar.get(f"/runs/{quote(run_id, safe='')}/reported", method="POST", deadline=deadline)


def _json(answer: Answer, kind: type) -> tuple[Any, bytes]:
    """The parsed body, and its bytes. Raises `ExchangeError`."""
    if answer.status != 200:
        raise ExchangeError(refusal(answer))
    try:
        body = json.loads(answer.body)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, kind):
        raise ExchangeError("the sidecar's answer is not JSON of the kind that was asked for")
    return body, answer.body
