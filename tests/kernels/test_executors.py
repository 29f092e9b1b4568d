"""Runs the kernel tests once for every executor that can run here, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from executors import NAMES, ROOT, unavailable

HERE = Path(__file__).parent
QUIET = "-q --tb=short --show-capture=no -p no:cacheprovider"


@pytest.mark.parametrize("name", NAMES)
def test_kernels(name: str) -> None:
    if (why := unavailable(name)) is not None:
        pytest.skip(why)
    command = (
        f"-m pytest {HERE.relative_to(ROOT)} --executor {name} -q --tb=short --show-capture=no -p no:cacheprovider"
    )
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"{done.stdout}{done.stderr}\nTo repeat it: python {command}", pytrace=False)
