"""Python imports this at its start, where `as_darwin.emulation` has put it on the path of a program."""

import os

if library := os.environ.get("VITALSD_AS_DARWIN"):
    import emulation  # type: ignore[import-not-found]

    emulation.install(library)
