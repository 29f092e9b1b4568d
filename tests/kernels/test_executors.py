"""Runs the kernel tests once for every executor that can run here, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from executors import NAMES, ROOT, unavailable

HERE = Path(__file__).parent


def command(name: str) -> list[str]:
    options = f"--executor {name} -q --tb=short --show-capture=no -p no:cacheprovider"
    return [*f"-m pytest {HERE.relative_to(ROOT)}".split(), *options.split()]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[subprocess.Popen[bytes], Path]]]:
    """All at once, since each keeps one core busy; and where each writes to."""
    folder, processes = tmp_path_factory.mktemp("executors"), {}
    for name in NAMES:
        if unavailable(name) is None:
            report = folder / f"{name.replace(':', '-')}.txt"
            with report.open("wb") as file:
                started = subprocess.Popen([sys.executable, *command(name)], cwd=ROOT, stdout=file, stderr=file)
            processes[name] = started, report
    yield processes
    for process, _ in processes.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", NAMES)
def test_kernels(name: str, running: dict[str, tuple[subprocess.Popen[bytes], Path]]) -> None:
    if (why := unavailable(name)) is not None:
        pytest.skip(why)
    process, report = running[name]
    if process.wait():
        pytest.fail(f"{report.read_text()}\nTo repeat it: python {' '.join(command(name))}", pytrace=False)
