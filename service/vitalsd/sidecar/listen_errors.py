"""Define the errors of a sidecar that cannot listen on an address or a path."""

__all__ = ["ListenError", "NoAddressError", "PortInUseError"]


class ListenError(Exception):
    """Report that the sidecar cannot listen there; ``str(error)`` is the reason, one sentence."""


class PortInUseError(ListenError):
    """Report that another process listens on the port."""


class NoAddressError(ListenError):
    """Report that the machine has no such address: IPv6 is off, for example."""
