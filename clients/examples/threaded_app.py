"""
Serve the metrics of an application with busy named threads, by one call and without a second process.

    python clients/examples/threaded_app.py [--seconds 60]
"""

import argparse
import threading
import time

import vitalsd

LOADS = {"render": 0.6, "network": 0.2, "audio": 0.05}
"""Fraction of a core that each thread tries to use."""


def work(load: float, stop: threading.Event) -> None:
    """Compute for the fraction `load` of each period of 20 ms, until `stop` is set."""
    while not stop.wait(0.02 * (1 - load)):
        busy_until = time.perf_counter() + 0.02 * load
        while time.perf_counter() < busy_until:
            pass


def main() -> None:
    """Start the threads and the sidecar, print commands to try, and wait for the end."""
    parser = argparse.ArgumentParser(description="A demo of vitalsd inside its client.")
    parser.add_argument("--seconds", type=float, help="end after so long; default: at Ctrl-C")
    seconds = parser.parse_args().seconds

    stop = threading.Event()
    threads = [threading.Thread(target=work, args=(load, stop), name=name) for name, load in LOADS.items()]
    for thread in threads:
        thread.start()
    try:
        with vitalsd.start() as sidecar:
            for note in sidecar.notes:
                print(f"note: {note}")
            print(f"busy threads: {', '.join(LOADS)}; in another terminal, try:\n")
            print(f"  curl -s '{sidecar.url}/metrics?window_ms=500&sort=cpu&limit=5'")
            print(f"  curl -s '{sidecar.url}/metrics?mode=trailing&window_ms=2000'")
            print(f"  curl -s '{sidecar.url}/history?seconds=60&top=3'")
            print(f"  curl -sN '{sidecar.url}/stream'")
            mark = '{"label": "F12 pressed"}'
            print(f"  curl -s -H 'Content-Type: application/json' -d '{mark}' '{sidecar.url}/marks'")
            print(f"  curl -s '{sidecar.url}/info'")
            if sidecar.socket:
                print(f"  curl -s --unix-socket '{sidecar.socket}' http://vitalsd/healthz")
            print("\nCtrl-C ends it.", flush=True)
            sidecar.mark("the example has started")
            stop.wait(seconds)
    except KeyboardInterrupt:
        pass
    finally:
        stop.set()


if __name__ == "__main__":
    main()
