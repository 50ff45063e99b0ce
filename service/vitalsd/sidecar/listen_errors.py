"""Why a sidecar cannot listen somewhere."""

__all__ = ["ListenError", "NoAddressError", "PortInUseError"]


class ListenError(Exception):
    """The sidecar cannot listen there; ``str(error)`` is the reason, one sentence."""


class PortInUseError(ListenError):
    """Another process listens on the port."""


class NoAddressError(ListenError):
    """The machine has no such address: IPv6 is off, for example."""
