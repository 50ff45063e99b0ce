"""The machine and the application in the answers of a real sidecar."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from support.family import Family
from support.serving import Serving
from vitalsd.contract.metrics import FullMetrics, parse_runtime_metrics

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

BURNER = "import os\nif os.geteuid() == 0: os.setuid(65534)\nwhile True: pass"


@pytest.fixture(scope="module")
def family() -> Iterator[Family]:
    with Family() as family:
        yield family


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, family: Family) -> Iterator[Serving]:
    with Serving(tmp_path_factory.mktemp("state"), "--pid", str(family.pid), "--record-interval", "0.5") as serving:
        yield serving


def full(serving: Serving, window_ms: int = 200) -> FullMetrics:
    answer = serving.client.get(f"/metrics?detail=full&children=true&window_ms={window_ms}")
    assert answer.status_code == 200, answer.text
    metrics = parse_runtime_metrics(answer.content)
    assert isinstance(metrics, FullMetrics)
    return metrics


@contextmanager
def running(*command: str) -> Iterator[int]:
    """Run a program that is no child of the target."""
    process = subprocess.Popen(command)
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def test_full_answer_with_children_has_the_application(served: Serving, family: Family) -> None:
    """The living descendants with what each used in the window, the sum of all, and the machine around them."""
    child = family.fork(family.pid)
    family.tell(child, "burn 500")
    metrics = full(served, 300)
    family.finish()
    assert metrics.children is not None
    assert metrics.application is not None
    assert metrics.machine is not None
    (shown,) = metrics.children
    oracle = psutil.Process(child)
    assert (shown.pid, shown.name, shown.thread_count) == (child, oracle.name()[:15], 1)
    assert shown.rss_kb == pytest.approx(oracle.memory_info().rss / 1024, rel=0.2)
    assert shown.cpu_percent > 0
    application = metrics.application
    assert application.complete
    assert application.process_count == 2
    assert application.cpu_percent == pytest.approx(metrics.process.cpu_percent + shown.cpu_percent, abs=0.01)
    assert application.rss_kb == metrics.process.rss_kb + shown.rss_kb
    assert metrics.machine.cpu_percent is not None
    assert metrics.machine.cpu_percent >= 0.5 * application.cpu_percent
    assert metrics.machine.memory_available_kb is not None
    family.end(child, family.pid)


def busy_ticks() -> int:
    """CPU time of all cores but that of idling, of waiting for disks, and of other guests."""
    fields = Path("/proc/stat").read_text(encoding="ascii").split("\n")[0].split()[1:]
    return sum(int(field) for index, field in enumerate(fields[:7]) if index not in (3, 4))


def test_load_by_another_user_is_other_percent(served: Serving) -> None:
    """Within 3 points of what /proc/stat says around the same window, less the application."""
    with running(sys.executable, "-c", BURNER):
        found = []
        for _ in range(4):  # Other programs may begin or end between the readings of the test and of the sidecar.
            begun, busy = time.monotonic(), busy_ticks()
            metrics = full(served, 3000)
            used_s = (busy_ticks() - busy) / os.sysconf("SC_CLK_TCK")
            machine_percent = used_s * 100 / (time.monotonic() - begun)
            assert metrics.application is not None
            assert metrics.machine is not None
            if metrics.machine.scope == "container":
                pytest.skip("/proc/stat is of the host")
            expected = machine_percent - metrics.application.cpu_percent
            assert metrics.machine.other_percent is not None
            found.append((metrics.machine.other_percent, expected))
            if abs(metrics.machine.other_percent - expected) <= 3:
                assert expected > 20
                return
        pytest.fail(f"other_percent and what /proc/stat says: {found}")


def test_name_of_a_foreign_process_is_in_no_answer(served: Serving, family: Family, tmp_path: Path) -> None:
    """Of a busy one that was started beside the target; that of a child is there with children=true only."""
    foreign, own = tmp_path / "plantedforeign", tmp_path / "plantedchild"
    for path in (foreign, own):
        shutil.copy("/bin/sh", path)
    loop = "while :; do :; done"
    with running(str(foreign), "-c", loop):
        (child,) = family.ask(family.pid, f"run {own}")
        paths = [
            "/metrics?detail=full&children=true&window_ms=300",
            "/metrics?detail=full&window_ms=300",
            "/metrics?window_ms=100",
            "/history",
            "/info",
        ]
        answers = [served.client.get(path).text for path in paths]
        answers.append(served.client.get("/history", headers={"Accept": "text/csv"}).text)
        answers.append(served.client.get("/metrics", headers={"Accept": "text/plain;version=0.0.4"}).text)
        os.kill(child, 9)
        family.ask(family.pid, f"wait {child}")
    assert not [path for path, answer in zip(paths, answers, strict=False) if "plantedforeign" in answer]
    assert "plantedforeign" not in "".join(answers)
    assert ["plantedchild" in answer for answer in answers] == [True] + [False] * 6
