"""Why a sidecar cannot listen somewhere."""

__all__ = ["ListenError", "NoAddress", "PortInUse"]


class ListenError(Exception):
    """The sidecar cannot listen there; ``str(error)`` is the reason, one sentence."""


class PortInUse(ListenError):
    """Another process listens on the port."""


class NoAddress(ListenError):
    """The machine has no such address: IPv6 is off, for example."""
