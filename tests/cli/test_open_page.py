"""`vitalsd open`: which sidecar, and what the browser's command line shows."""

import json
import subprocess
import sys
from pathlib import Path

from support.sidecars import environment, serving


def opened(directory: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """The command, with a browser that only writes down its argument; and that argument."""
    browser, seen = directory / "browser", directory / "seen"
    browser.write_text(f'#!/bin/sh\nprintf %s "$1" > {seen}\n', encoding="utf-8")
    browser.chmod(0o700)
    seen.unlink(missing_ok=True)
    ran = subprocess.run(
        [sys.executable, "-m", "vitalsd", "open", *options],
        env=environment(directory) | {"BROWSER": str(browser)},
        capture_output=True,
        text=True,
    )
    return ran, seen.read_text(encoding="utf-8") if seen.exists() else ""


def test_open_without_a_sidecar_exits_with_1_and_the_remedy(short_path: Path) -> None:
    """The command opens nothing, and the status is 1."""
    ran, seen = opened(short_path, "--pid", "1")
    assert (ran.returncode, ran.stdout, seen) == (1, "", "")
    assert ran.stderr == ("vitalsd: no sidecar of process 1 listens on TCP; start one with: vitalsd serve --pid 1\n")


def test_open_without_arguments_opens_the_newest_sidecar(short_path: Path) -> None:
    """Without a token the address is that of the page."""
    with serving(short_path) as (_, ready):
        ran, seen = opened(short_path)
        assert (ran.returncode, ran.stdout) == (0, f"{ready['url']}/\n")
        assert seen == f"{ready['url']}/"
        assert opened(short_path, "--no-browser")[1] == ""


def test_open_with_a_token_passes_it_in_a_private_file(short_path: Path) -> None:
    """The browser is given a file of mode 0600 that leads to the page; each call makes it anew, the end removes it."""
    with serving(short_path, "--auth", "token") as (_, ready):
        token = json.loads(Path(ready["runtime_file"]).read_text(encoding="utf-8"))["token"]
        for _ in range(2):
            ran, seen = opened(short_path)
            assert ran.returncode == 0, ran.stderr
            assert ran.stdout == seen + "\n"
            assert token not in seen
            file = Path(seen.removeprefix("file://"))
            assert file.stat().st_mode & 0o777 == 0o600
            assert f"{ready['url']}/#token={token}" in file.read_text(encoding="utf-8")
        assert [path.name for path in file.parent.iterdir() if path.name.startswith(".open")] == []
        with serving(short_path, "--auth", "token"):
            pass
        assert file.exists(), "another sidecar's end is no reason"
    assert not file.exists(), "a token without a sidecar is of no use"
