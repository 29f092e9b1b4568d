"""The kernel tests on each executor that can run here, in processes of their own: as many as run these tests.

``--sample`` runs the first case of each test, on some executors.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from executors import NAMES, ROOT, unavailable

SAMPLED = ("interpreter", "simt:90")
"""Executors of ``--sample``."""
BRIEFLY = ("simt:80",)
"""Executors that run a sample only, unless there is ``--all-executors``: PTX for another GPU, from the same source."""


@pytest.mark.parametrize("name", NAMES)
def test_kernels(name: str, pytestconfig: pytest.Config) -> None:
    # Of a run over all of tests/ the conftest here is not an initial one, and its options are unknown.
    sample = pytestconfig.getoption("--sample", False)
    if (why := unavailable(name)) is not None:
        pytest.skip(why)
    if sample and name not in SAMPLED:
        pytest.skip("not an executor of samples")
    brief = sample or (name in BRIEFLY and not pytestconfig.getoption("--all-executors", False))
    # As many as there are workers of pytest-xdist; without them in one process, where it may be missing.
    workers = os.environ.get("PYTEST_XDIST_WORKER_COUNT")
    parallel = f"--numprocesses {workers} --dist worksteal" if workers else ""
    options = f"--executor {name} {'--sample' * brief} {parallel} -q --tb=short --show-capture=no -p no:cacheprovider"
    command = ["-m", "pytest", str(Path(__file__).parent.relative_to(ROOT)), *options.split()]
    run = subprocess.run(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace"
    )
    if run.returncode:
        pytest.fail(f"{run.stdout}\nTo repeat it: python {' '.join(command)}", pytrace=False)
