"""Install the emulation at the start of Python, in programs with this directory on their path."""

import os

if library := os.environ.get("VITALSD_AS_DARWIN"):
    import emulation  # type: ignore[import-not-found]

    emulation.install(library)
