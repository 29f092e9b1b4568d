"""The kernel tests on each executor that can run here, in processes beside the one that runs all other tests."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from executors import ROOT, unavailable

SAMPLED = ("interpreter", "simt:90")
"""Executors of ``--sample``."""
BRIEFLY = ("simt:80",)
"""Executors that run a sample only, unless there is ``--all-executors``: PTX for another GPU, from the same source."""


class ExecutorRun:
    """A process that runs the kernel tests on one executor."""

    def __init__(self, name: str, *, sample: bool) -> None:
        """Start it."""
        options = f"--executor {name} {'--sample' * sample} -q --tb=short --show-capture=no -p no:cacheprovider"
        self.command = ["-m", "pytest", str(Path(__file__).parent.relative_to(ROOT)), *options.split()]
        self._report = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, *self.command], cwd=ROOT, stdout=self._report, stderr=subprocess.STDOUT
        )

    def failure(self) -> str | None:
        """Wait for its end; what it printed if a test failed, and how to repeat it."""
        if not self._process.wait():
            return None
        self._report.seek(0)
        printed = self._report.read().decode(errors="replace")
        return f"{printed}\nTo repeat it: python {' '.join(self.command)}"

    def kill(self) -> None:
        """End it in any case."""
        self._process.kill()
        self._process.wait()


def why_not(name: str, *, sample: bool) -> str | None:
    """Why the kernel tests do not run on the executor ``name``."""
    return unavailable(name) or ("not an executor of samples" if sample and name not in SAMPLED else None)


def start(names: Sequence[str], *, sample: bool, in_full: bool) -> dict[str, ExecutorRun]:
    """A process for each of these executors that can run here."""
    chosen = [name for name in names if why_not(name, sample=sample) is None]
    return {name: ExecutorRun(name, sample=sample or (name in BRIEFLY and not in_full)) for name in chosen}
