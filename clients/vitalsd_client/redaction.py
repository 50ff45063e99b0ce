"""Redact the names of the user and the host and the home directory from the reasons of the client library."""

import os
import pwd
import re
import socket
from contextlib import suppress

__all__ = ["redact_host_details"]

MAX_SENTENCE = 400
"""Default limit of a redacted text, characters."""
COMMON = frozenset(("", "root", "localhost"))
"""Names that identify no user: to replace them would make texts unreadable."""


def redact_host_details(text: str, limit: int = MAX_SENTENCE) -> str:
    """
    Return `text` on one line, with ``~``, ``(user)`` and ``(host)`` for the names, and control characters escaped.

    Reasons of the client library end up in reports, and quote paths and what other programs sent.

    Args:
        text: of any length.
        limit: characters to return at most.
    """
    names: dict[str, str] = {}
    with suppress(KeyError):
        known = pwd.getpwuid(os.geteuid())
        names = {known.pw_dir: "~", os.path.realpath(known.pw_dir): "~", known.pw_name: "(user)"}
    # HOME as well: it need not be the directory of the password file.
    home = os.path.expanduser("~")
    names |= {home: "~", os.path.realpath(home): "~", socket.gethostname(): "(host)"}
    for name in sorted(names, key=len, reverse=True):
        if len(name) > 1 and name not in COMMON:
            text = re.sub(rf"(?<![\w.-]){re.escape(name)}(?![\w.-])", names[name], text)
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."
