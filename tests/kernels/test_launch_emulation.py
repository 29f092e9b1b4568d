"""The host path of real CUDA, emulated: it changes its process, and so has one of its own (cuda_emulation/)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from cuda_emulation.emulation import unavailable
from executors import ROOT

FOLDER = Path(__file__).with_name("cuda_emulation").relative_to(ROOT)
COMMAND = f"-m pytest {FOLDER}/launches.py {FOLDER}/devices.py -q --tb=short -p no:cacheprovider".split()


def test_launches() -> None:
    if (why := unavailable()) is not None:
        pytest.skip(why)
    done = subprocess.run([sys.executable, *COMMAND], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        pytest.fail(f"{done.stdout.decode()}\nTo repeat it: python {' '.join(COMMAND)}", pytrace=False)
