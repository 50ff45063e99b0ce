"""
Spawn a sidecar and crash. The sidecar answers for 30 s more, and its recording is on disk.

    python clients/examples/spawning_app.py
"""

import os
import signal
import time

import vitalsd


def main() -> None:
    """Spawn a sidecar, compute for 1 s, and end by SIGKILL."""
    sidecar = vitalsd.spawn(port=0, app="spawning-app", app_version="1.0")
    print(f"sidecar {sidecar.pid} watches process {os.getpid()}: curl -s '{sidecar.url}/metrics?window_ms=100'")
    print(f"after the crash, for 30 s: curl -s '{sidecar.url}/history?seconds=60'")
    print("at any time: vitalsd report --app spawning-app", flush=True)
    end = time.monotonic() + 1
    while time.monotonic() < end:
        pass
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
