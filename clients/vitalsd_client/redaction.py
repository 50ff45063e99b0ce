"""What a sentence of ours may say about the machine: neither the user's name, nor the host's, nor the home."""

import os
import pwd
import re
import socket
from contextlib import suppress

__all__ = ["harmless"]

MAX_SENTENCE = 400
COMMON = frozenset(("", "root", "localhost"))
"""Names that identify no user; without them sentences would be unreadable."""


def harmless(text: str, limit: int = MAX_SENTENCE) -> str:
    """
    `text` on one line, without control characters, with ``~`` for the home directory.

    For sentences of ours that end up in a report: they quote paths and what a stranger sent.
    """
    names: dict[str, str] = {}
    with suppress(KeyError):
        known = pwd.getpwuid(os.geteuid())
        names = {known.pw_dir: "~", os.path.realpath(known.pw_dir): "~", known.pw_name: "(user)"}
    # HOME is asked for last: it need not be the one of the password file.
    home = os.path.expanduser("~")
    names |= {home: "~", os.path.realpath(home): "~", socket.gethostname(): "(host)"}
    for name in sorted(names, key=len, reverse=True):
        if len(name) > 1 and name not in COMMON:
            text = re.sub(rf"(?<![\w.-]){re.escape(name)}(?![\w.-])", names[name], text)
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."
