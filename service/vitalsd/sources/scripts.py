"""Programs that share the name of their interpreter, told apart."""

import hashlib
import os
import re
from collections.abc import Sequence

__all__ = ["script_digest"]

INTERPRETERS = re.compile(
    r"(bash|bun|dash|deno|dotnet|electron|java|julia|lua|mono|node|perl|php|pypy|python|ruby|sh|zsh)[-.0-9]*$",
    re.IGNORECASE,  # that of a framework build on macOS is "Python"
)
"""Of the name of such an executable many programs have their own."""


def script_digest(executable: str, words: Sequence[bytes]) -> str:
    """
    A digest of what the command line calls the script; empty for a program that is no interpreter.

    Args:
        executable: path of what the kernel runs.
        words: of the command line, without the name of the program.
    """
    script = next((word for word in words if word and not word.startswith(b"-")), b"")
    if not script or not INTERPRETERS.match(os.path.basename(executable)):
        return ""
    return hashlib.blake2b(script, digest_size=8).hexdigest()
