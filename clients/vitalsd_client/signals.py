"""Signal heartbeats and gauges of this process to a sidecar that another program has started."""

import os

from vitalsd.contract.signals import Gauge, Heartbeat, Signals, signals_of_this_process
from vitalsd.discovery.runtime_file import discover

__all__ = ["gauge", "heartbeat"]


def heartbeat(name: str, limit_s: float = 2.0) -> Heartbeat:
    """
    Return the heartbeat of this process with this name. Its sidecar records the silences as hangs.

    Without a sidecar that watches this process it beats without effect until `vitalsd.start` or `vitalsd.spawn` starts
    one, or until the next call of this function finds one.

    Args:
        name: a letter and up to 31 of ``A-Z a-z 0-9 . _ -``.
        limit_s: longest time between two beats that is no hang, 0.25 to 3600 s.

    Raises:
        ValueError: the name or the limit is not valid, or there are 32 already.
    """
    return _connected().heartbeat(name, limit_s)


def gauge(name: str) -> Gauge:
    """
    Return the gauge of this process with this name. Its sidecar records the values.

    Raises:
        ValueError: the name is not valid, see `heartbeat`, or there are 32 already.
    """
    return _connected().gauge(name)


def _connected() -> Signals:
    """Return the signals of this process, in the page of a sidecar that watches it, if there is one."""
    signals = signals_of_this_process()
    if not signals.is_connected:
        for endpoint in discover(os.getpid()):
            if endpoint.target is not None and endpoint.target.pid == os.getpid() and endpoint.signals is not None:
                signals.connect(endpoint.signals)
                break
    return signals
