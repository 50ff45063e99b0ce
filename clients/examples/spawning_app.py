"""
An application that spawns its sidecar, and crashes: the sidecar is still there to tell.

    python clients/examples/spawning_app.py
"""

import os
import signal
import time

import vitalsd


def main() -> None:
    sidecar = vitalsd.spawn(port=0)
    print(f"sidecar {sidecar.pid} watches process {os.getpid()}: curl -s '{sidecar.url}/metrics?window_ms=100'")
    print(f"after the crash, for 30 s: curl -s '{sidecar.url}/history?seconds=60'", flush=True)
    end = time.monotonic() + 1
    while time.monotonic() < end:
        pass
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
