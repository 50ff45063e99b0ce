"""
Take the pictures in docs/images: the page in a real Chromium, over a real sidecar of a busy process.

Run as a program, this module is that process. Its names are invented, so no picture shows data of a machine.
"""

import hashlib
import math
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from support.browser import Browser
from support.serving import Serving
from support.target import set_name

__all__ = ["take"]

SCENE_S = 100
EXPORT_S = (38, 66)
"""Begin and end of the export of the invented program, s after its start."""

BLOCK = bytes(1 << 20)


def take(folder: Path) -> None:
    """Write light.png, dark.png, narrow.png and replay.png to `folder`; takes two minutes."""
    folder.mkdir(exist_ok=True)
    program = subprocess.Popen([sys.executable, __file__])
    try:
        with tempfile.TemporaryDirectory() as state, Browser(width=1280, height=1010) as browser:
            with Serving(Path(state), "--pid", str(program.pid)) as serving:
                begun = time.monotonic()
                browser.open(f"{serving.url}/")
                for at_s, label in ((14, "project opened"), (EXPORT_S[0], "export started"), (80, "F12 pressed")):
                    browser.listen(begun + at_s - time.monotonic())
                    serving.client.post("/marks", json={"label": label})
                browser.listen(begun + SCENE_S - time.monotonic())
                browser.screenshot(folder / "light.png")
                report = Path(state) / "report.zip"
                report.write_bytes(serving.client.get("/report.zip").content)
                browser.emulate(dark=True)
                browser.hover(540, 300)
                browser.listen(2)
                browser.screenshot(folder / "dark.png")
                browser.hover(2, 2)
                browser.emulate()
                browser.resize(360, 900, scale=2)
                browser.listen(2)
                browser.screenshot(folder / "narrow.png")
            browser.resize(1280, 900)
            with Serving(Path(state), str(report), command="replay") as replay:
                browser.open(f"{replay.url}/")
                browser.eventually("document.querySelector('#status').textContent === 'replay'")
                browser.listen(0.5)
                browser.screenshot(folder / "replay.png")
    finally:
        program.kill()
        program.wait()
    for picture in sorted(folder.glob("*.png")):
        print(f"{picture.name}: {picture.stat().st_size // 1024} KiB")


# The program in the pictures


def busy(load: Callable[[float], float], begun: float) -> None:
    """Use `load` of a core, which may change with the seconds since `begun`. Hashing lets other threads run."""
    while True:
        start = time.monotonic()
        until = time.thread_time() + 0.05 * max(0.0, load(start - begun))
        while time.thread_time() < until:
            hashlib.sha256(BLOCK)
        time.sleep(max(0.001, start + 0.05 - time.monotonic()))


def exporting(t: float) -> bool:
    return EXPORT_S[0] <= t < EXPORT_S[1]


def remember(begun: float) -> None:
    """Hold more and more memory while exporting, and a part of it afterwards."""
    held: list[bytearray] = []
    while True:
        time.sleep(0.5)
        t = time.monotonic() - begun
        if exporting(t):
            held.append(bytearray(b"x" * (1 << 20)))
        elif len(held) > 12:
            del held[12:]


LOADS: dict[str, Callable[[float], float]] = {
    "render": lambda t: 0.30 + 0.05 * math.sin(t / 5),
    "encoder": lambda t: 0.55 if exporting(t) else 0,
    "audio": lambda t: 0.06,
    "network": lambda t: 0.16 if int(t) % 11 < 3 else 0.01,
    "disk-io": lambda t: 0.14 if exporting(t + 2) and int(t) % 3 else 0,
    "ui": lambda t: 0.03 if int(t) % 7 < 4 else 0.002,
    "autosave": lambda t: 0.2 if int(t) % 30 == 20 else 0,
}


def main() -> None:
    begun = time.monotonic()
    set_name(b"studio")

    def run(name: str, work: Callable[[], None]) -> None:
        set_name(name.encode())
        work()

    def idle() -> None:
        threading.Event().wait()

    jobs: list[tuple[str, Callable[[], None]]] = [(name, partial(busy, load, begun)) for name, load in LOADS.items()]
    jobs.append(("cache", partial(remember, begun)))
    jobs += [(f"pool-{i}", idle) for i in range(14)]
    for name, work in jobs:
        threading.Thread(target=run, args=(name, work), daemon=True).start()
    time.sleep(600)


if __name__ == "__main__":
    main()
