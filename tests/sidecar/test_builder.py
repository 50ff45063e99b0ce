"""The place where a sidecar is assembled: `vitalsd.sidecar.builder`."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from support.sidecars import environment, eventually
from vitalsd.sidecar.builder import BuildError, build_service
from vitalsd.sidecar.config import SidecarConfig
from vitalsd.sidecar.listen_errors import ListenError
from vitalsd.sidecar.target_process import TargetProcess
from vitalsd.sources.platform import Platform, this_platform
from vitalsd.sources.process_identity import IdentityUnknownError, ProcessIdentityReader

pytestmark = pytest.mark.live


@pytest.fixture(autouse=True)
def own_directories(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VITALSD_RUNTIME_DIR", "VITALSD_STATE_DIR"):
        monkeypatch.setenv(name, environment(short_path)[name])


def undecided() -> ProcessIdentityReader:
    raise IdentityUnknownError("this machine has no boot id")


@pytest.mark.parametrize(
    ("settings", "change", "error"),
    [
        ({}, {"process_identities": undecided}, IdentityUnknownError),
        ({"name": "viewer"}, {"process_identities": undecided}, IdentityUnknownError),
        ({"otlp": "nonsense"}, {}, BuildError),
        ({"host": "192.0.2.1"}, {}, ListenError),
    ],
)
def test_build_that_fails_leaves_no_thread_descriptor_or_file(
    settings: dict[str, object],
    change: dict[str, Callable[[], ProcessIdentityReader]],
    error: type[Exception],
    short_path: Path,
) -> None:
    """Wherever it fails, what was opened before is closed."""
    config = SidecarConfig.checked(port=0, uds=str(short_path / "own.sock"), **settings)
    platform: Platform = this_platform()._replace(**change)  # type: ignore[arg-type]
    descriptors, threads = os.listdir("/dev/fd"), set(threading.enumerate())
    for _ in range(2):
        with pytest.raises(error):
            build_service(config, TargetProcess(config, platform), None, {})
        assert not (short_path / "own.sock").exists()
    eventually(lambda: set(threading.enumerate()) <= threads)
    assert len(os.listdir("/dev/fd")) <= len(descriptors)
