"""What an in-process sidecar writes into the log of its host: nothing but warnings and errors of its own."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from support.paths import TESTS
from support.sidecars import environment

pytestmark = pytest.mark.live

SET_UP = """
import logging, sys
logging.basicConfig(level=logging.{level}, format="%(levelname)s %(name)s %(message)s", stream=sys.stdout)
for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi", "asyncio"):
    logging.getLogger(name).setLevel(logging.{level_of_uvicorn})
"""


def said_by(host: str, directory: Path, *, level: str = "INFO", level_of_uvicorn: str = "DEBUG") -> list[str]:
    """The lines of log, and what it prints, of a host program that ends well."""
    code = SET_UP.format(level=level, level_of_uvicorn=level_of_uvicorn) + textwrap.dedent(host)
    tests = {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(directory) | tests,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout.splitlines()


ASKED = """
import vitalsd
from support.sidecars import ask
for _ in range(2):
    with vitalsd.start(port=0) as sidecar:
        assert ask(sidecar.url, "/metrics?window_ms=10")[0] == 200
        assert ask(sidecar.socket, "/metrics?window_ms=5")[0] == 422
        assert ask(sidecar.url, "/nothing")[0] == 404
print("ended")
"""


def test_host_at_info_gets_no_line_of_a_healthy_sidecar(short_path: Path) -> None:
    """Two starts, answers, refusals and ends: no line, although uvicorn's loggers and asyncio's are at DEBUG."""
    said = said_by(ASKED, short_path)
    assert [line for line in said if not line.startswith("DEBUG asyncio ")] == ["ended"]


@pytest.mark.parametrize("level", ["DEBUG", "NOTSET"])
def test_host_below_info_gets_no_line_of_uvicorn(short_path: Path, level: str) -> None:
    """At NOTSET uvicorn would log each message of a request too."""
    said = said_by(ASKED, short_path, level=level, level_of_uvicorn="NOTSET")
    assert [line for line in said if "uvicorn" in line] == []
    assert said[-1] == "ended"


def test_host_gets_the_warnings_of_a_sidecar(short_path: Path) -> None:
    """A runtime file that was removed is a warning of the logger `vitalsd`, a mark without a record another."""
    host = """
        import vitalsd
        with vitalsd.start(port=0, record_interval_s=0) as sidecar:
            assert not sidecar.mark("export")
            sidecar._service.runtime_file.unlink()
            sidecar._service.publish_again()
        """
    removed, unrecorded = sorted(line for line in said_by(host, short_path) if "asyncio" not in line)
    assert removed.startswith("WARNING vitalsd ")
    assert "is written again" in removed
    assert unrecorded.startswith("WARNING vitalsd the mark 'export' was not recorded: ")


def test_host_gets_the_bug_in_a_route(short_path: Path) -> None:
    """The traceback is an error of the logger `vitalsd.http`."""
    host = """
        import vitalsd, vitalsd.http.routes.recordings as past
        from support.sidecars import ask
        past.mark_json = None
        with vitalsd.start(port=0) as sidecar:
            while not sidecar.mark("export"):
                pass
            assert ask(sidecar.url, "/marks")[0] == 500
        """
    said = said_by(host, short_path)
    assert [line for line in said if line.startswith("ERROR ")] == ["ERROR vitalsd.http Exception in ASGI application"]
    assert "TypeError: 'NoneType' object is not callable" in said


def test_host_gets_the_reason_why_the_application_did_not_start(short_path: Path) -> None:
    """The start fails, and the traceback is an error of the logger `vitalsd.http`, not of uvicorn's."""
    host = """
        import vitalsd
        from vitalsd.sampling.target_pool import Targets
        async def fails(self):
            raise ZeroDivisionError("a bug")
        Targets.start = fails
        try:
            vitalsd.start(port=0)
        except Exception as error:
            print(error)
        """
    said = said_by(host, short_path)
    assert "ZeroDivisionError: a bug" in said
    assert said[-1].endswith("the application did not start; the log says why")
    errors = [line for line in said if line.startswith("ERROR ")]
    assert errors
    assert all(line.startswith("ERROR vitalsd.http ") for line in errors)
    assert not [line for line in said if "uvicorn.error" in line]


def test_host_served_by_uvicorn_keeps_its_own_lines(short_path: Path) -> None:
    """Its start, its requests and its end are logged once each, before, while and after a sidecar runs in it."""
    host = """
        import asyncio, uvicorn, vitalsd
        from contextlib import asynccontextmanager
        from support.sidecars import ask
        from fastapi import FastAPI

        @asynccontextmanager
        async def lifespan(app):
            with vitalsd.start(port=0) as sidecar:
                app.sidecar = sidecar
                yield

        app = FastAPI(lifespan=lifespan)

        @app.get("/own")
        async def own():
            return {}

        async def main():
            server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None))
            serving = asyncio.create_task(server.serve())
            while not server.started:
                await asyncio.sleep(0.01)
            port = server.servers[0].sockets[0].getsockname()[1]
            assert (await asyncio.to_thread(ask, f"http://127.0.0.1:{port}", "/own"))[0] == 200
            assert (await asyncio.to_thread(ask, app.sidecar.url, "/healthz"))[0] == 200
            app.sidecar.stop()
            assert (await asyncio.to_thread(ask, f"http://127.0.0.1:{port}", "/own"))[0] == 200
            server.should_exit = True
            await serving

        asyncio.run(main())
        """
    said = said_by(host, short_path, level_of_uvicorn="INFO")
    lines = [line.partition(" ")[2] for line in said if line.startswith("INFO uvicorn.")]
    counted = {
        text: sum(text in line for line in lines)
        for text in (
            "Started server process",
            "Waiting for application startup.",
            "Application startup complete.",
            "Uvicorn running on",
            '"GET /own HTTP/1.1" 200',
            "/healthz",
            "Shutting down",
            "Waiting for application shutdown.",
            "Application shutdown complete.",
            "Finished server process",
        )
    }
    assert counted == dict.fromkeys(counted, 1) | {'"GET /own HTTP/1.1" 200': 2, "/healthz": 0}
