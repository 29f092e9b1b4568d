"""The kernel tests on executors that can run here, in processes of their own: as many as run these tests.

All but slow ones on one that runs compiled kernels, and a few in the interpreter, which says less; where nothing runs
compiled ones, there. ``--sample``: the first case of each test on one executor; ``--all-executors``: all tests on all.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from executors import NAMES, ROOT, unavailable

HERE = Path(__file__).parent
COMPILED = "simt:90"
"""The executor of compiled kernels where there is no GPU."""
FEW = ("test_rows.py", "test_select.py", "test_interpreter.py")
"""What shows that the interpreter still runs the kernels: what does not, fails on the first of them."""
REPEATING = ("simt:80",)
"""Those of ``--all-executors`` only: PTX for another GPU, from the same source."""


@pytest.mark.parametrize("name", NAMES)
def test_kernels(name: str, pytestconfig: pytest.Config) -> None:
    # Of a run over all of tests/ the conftest here is not an initial one, and its options are unknown.
    sample, everything = (pytestconfig.getoption(option, False) for option in ("--sample", "--all-executors"))
    if (why := unavailable(name)) is not None:
        pytest.skip(why)
    says_less = name == "interpreter" and unavailable(COMPILED) is None
    if not everything and (name in REPEATING or (sample and says_less)):
        pytest.skip("left to --all-executors")
    # Whether outputs are the same under several schedules is asked of all: launches without races, whose atomics only
    # count, have no other.
    brief = ["--examples", "8"] if everything else ["-m", "not slow", "--schedules", "1"]
    brief += ["--sample"] if not everything and (sample or says_less) else []
    files = FEW if says_less and not everything else (".",)
    # As many as there are workers of pytest-xdist; without them in one process, where it may be missing.
    workers = os.environ.get("PYTEST_XDIST_WORKER_COUNT")
    parallel = ["--numprocesses", workers, "--dist", "worksteal"] if workers else []
    options = ["--executor", name, *brief, *parallel, "-q", "--tb=short", "--show-capture=no", "-p", "no:cacheprovider"]
    command = ["-m", "pytest", *(str((HERE / file).relative_to(ROOT)) for file in files), *options]
    run = subprocess.run(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace"
    )
    if run.returncode:
        pytest.fail(f"{run.stdout}\nTo repeat it: python {shlex.join(command)}", pytrace=False)
