"""The steps of ``bench.gpu_check``. Each returns what it found, or raises ``StepFailed`` or ``StepSkipped``.

All run in programs of their own, for a limited time: neither an error that a CUDA context keeps nor a kernel that
never ends reaches another step.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

__all__ = [
    "KERNEL_TESTS",
    "Measurement",
    "Program",
    "Run",
    "StepFailed",
    "StepSkipped",
    "benchmarks",
    "find_sanitizer",
    "kernel_tests",
    "prefills",
    "sanitizer",
]

ROOT = Path(__file__).parents[1]
KERNEL_TESTS = ("rows", "defer_rmsnorm", "select", "score_topk", "ops", "routing", "pool", "score", "stress")
"""The files of tests/kernels with tests that run on a device."""
SANITIZED = (
    *(f"tests/kernels/test_{name}.py" for name in ("rows", "defer_rmsnorm", "score_topk", "select")),
    "-k",
    "odd or ragged or broken or few or fillers",
)
"""Few tests, of every kernel; ``few`` are values of a selection by one program, in stages, and refined."""
MISLEADING = ("REROUTE_BACKEND", "TRITON_INTERPRET")
"""Variables of the environment with which a step could pass without a kernel on the GPU."""
HANGING = [*("-o", "faulthandler_timeout=120"), *("-o", "faulthandler_exit_on_timeout=true")]
"""A test of two minutes ends its program and shows where it is; with an old pytest it only shows that."""
GRACE = 10  # seconds until a killed program is given up
Run = Callable[[Sequence[str], float, dict[str, str]], str]
"""Runs a program for so many seconds at most, with these variables besides; its last line."""


class StepFailed(Exception):
    """A step found something wrong; ``measurements`` are what it measured nevertheless."""

    measurements: tuple[Measurement, ...] = ()


class StepSkipped(Exception):
    """A step cannot run on this machine."""


@dataclass(frozen=True)
class Measurement:
    """Microseconds of one operation on one problem: the median, and what ``bench.modelled`` expected of Triton."""

    operation: str
    problem: str
    backend: str
    mode: str
    median: float
    floor: float
    modelled: float | None


@dataclass(frozen=True)
class Program:
    """Runs a program, and keeps all its output in the file ``log``."""

    log: Path

    def __call__(self, arguments: Sequence[str], limit: float, environment: dict[str, str]) -> str:
        """The last line of the output.

        ``StepFailed`` with the end of it where the exit status is not 0, and after ``limit`` seconds, when the program
        and all that it started are killed.
        """
        inherited = {name: value for name, value in os.environ.items() if name not in MISLEADING}
        variables = {**inherited, "PYTHONUNBUFFERED": "1", **environment}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("w") as file:
            child = subprocess.Popen(
                arguments, cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            end = f"exit status {child.wait(limit)}"
        except subprocess.TimeoutExpired:
            end = f"killed after {limit} s"
        finally:  # also if somebody interrupts
            if child.returncode is None:
                os.killpg(child.pid, signal.SIGKILL)
                with suppress(subprocess.TimeoutExpired):
                    child.wait(GRACE)
        lines = self.log.read_text(errors="replace").strip().splitlines() or ["no output"]
        if child.returncode != 0:
            raise StepFailed("\n".join([" ".join(arguments), *lines[-40:], f"{end}; the whole output: {self.log}"]))
        return lines[-1].strip("= ")


def kernel_tests(name: str, run: Run) -> str:
    """One file of kernel tests on the device; ``routing`` are whole prefills through the kernels."""
    tests = [sys.executable, "-m", "pytest", f"tests/kernels/test_{name}.py", "--executor", "cuda"]
    return run([*tests, "-v", "--tb=short", *HANGING], 600, {})


def prefills(check: str, run: Run) -> str:
    """A check of ``bench.gpu_prefills``."""
    return run([sys.executable, "-m", "bench.gpu_prefills", check], 300, {})


def benchmarks(operation: str, run: Run) -> list[Measurement]:
    """The micro-benchmarks of one operation; those that passed where others failed."""
    failure = None
    with TemporaryDirectory() as folder:
        file = Path(folder, "medians")
        options = ["-k", "measured", "--operation", operation, f"--medians={file}"]
        try:
            run([sys.executable, "-m", "pytest", "bench", *options, "-v", "--tb=short", *HANGING], 600, {})
        except StepFailed as error:
            failure = error
        lines = file.read_text().splitlines() if file.exists() else []
    measured = [Measurement(**json.loads(line)) for line in lines]
    if failure is not None:
        failure.measurements = tuple(measured)
        raise failure
    return measured


def find_sanitizer() -> str | None:
    """Where compute-sanitizer is: on the path, or in the CUDA toolkit."""
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{toolkit}/bin")


def sanitizer(tool: str, run: Run) -> str:
    """A few kernel tests under one tool of compute-sanitizer, every tensor an allocation of its own."""
    program = find_sanitizer()
    if program is None:
        raise StepSkipped("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    check = [program, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
    tests = [sys.executable, "-m", "pytest", *SANITIZED, "--executor", "cuda", "-v", "--tb=short", "-x"]
    return run([*check, *tests], 900, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
