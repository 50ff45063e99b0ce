"""Record labelled marks in the sidecar that records this process."""

import json
import logging
import os
import time

from vitalsd.contract.labels import clean_label
from vitalsd.discovery.http_connection import ExchangeError
from vitalsd.sources.names import publish_names
from vitalsd_client.locate import NoSidecarError, locate, refusal
from vitalsd_client.redaction import redact_host_details

__all__ = ["mark"]

log = logging.getLogger("vitalsd_client")

MARK_S = 0.25
"""Time limit of `mark`, s: the calling thread may be that of a user interface."""


def mark(
    label: str, *, url: str | None = None, socket: str | os.PathLike[str] | None = None, pid: int | None = None
) -> bool:
    """
    Record a label with the current time in the sidecar of this process; return within 0.25 s, without exceptions.

    Args:
        label: text; `vitalsd.contract.labels.clean_label` replaces the characters that a label cannot have.
        url: URL of a sidecar, instead of discovery.
        socket: path of a sidecar's Unix socket; tried before `url`.
        pid: the recorded process; ``None``: this process.

    Returns:
        Whether the sidecar recorded it; if not, the logger ``vitalsd_client`` has the reason.
    """
    cleaned = clean_label(label)
    if cleaned is None:
        return False
    if pid is None:
        publish_names()
    deadline = time.monotonic() + MARK_S
    try:
        sidecar = locate(url=url, socket=socket, pid=pid)[0]
        if sidecar.pid is not None and url is None and socket is None:
            raise NoSidecarError("no sidecar records this process")
        answer = sidecar.get(
            "/marks",
            method="POST",
            headers={"Content-Type": "application/json"},
            body=json.dumps({"label": cleaned}).encode(),
            deadline=deadline,
        )
        reason = None if answer.status == 201 else refusal(answer)
    except (NoSidecarError, ExchangeError, OSError) as error:
        reason = str(error)
    if reason is not None:
        log.warning("the mark %r was not recorded: %s", cleaned, redact_host_details(reason))
    return reason is None
