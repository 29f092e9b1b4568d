"""Runs the kernel tests once for every executor that can run here, each in a process of its own.

``--sample`` runs the first case of each test, on the executors of ``SAMPLED``. ``pytest -n 2`` runs two executors at once.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from executors import NAMES, ROOT, unavailable

HERE = Path(__file__).parent
SAMPLED = ("interpreter", "simt:90")


@pytest.mark.parametrize("name", NAMES)
def test_kernels(name: str, pytestconfig: pytest.Config) -> None:
    sample = pytestconfig.getoption("--sample", False)
    if (why := unavailable(name)) is not None:
        pytest.skip(why)
    if sample and name not in SAMPLED:
        pytest.skip("not an executor of samples")
    options = f"--executor {name} {'--sample' * sample} -q --tb=short --show-capture=no -p no:cacheprovider"
    command = ["-m", "pytest", str(HERE.relative_to(ROOT)), *options.split()]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        pytest.fail(f"{done.stdout}\nTo repeat it: python {' '.join(command)}", pytrace=False)
