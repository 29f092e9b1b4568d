"""The host path of real CUDA, emulated: it changes its process, and so has one of its own (cuda_emulation/)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("triton")

from executors import ROOT

FOLDER = Path(__file__).with_name("cuda_emulation").relative_to(ROOT)
COMMAND = f"-m pytest {FOLDER}/launches.py {FOLDER}/devices.py -q --tb=short -p no:cacheprovider".split()


def unavailable() -> str | None:
    """Why Triton cannot build its driver here."""
    if not sys.platform.startswith("linux"):
        return "Triton's CUDA driver is for Linux"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "there is no C compiler"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "there are no headers of Python"
    return None


def test_launches() -> None:
    if (why := unavailable()) is not None:
        pytest.skip(why)
    done = subprocess.run([sys.executable, *COMMAND], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        pytest.fail(f"{done.stdout.decode()}\nTo repeat it: python {' '.join(COMMAND)}", pytrace=False)
