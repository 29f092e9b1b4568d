"""Runs the programs of steps, some of them side by side, each for a limited time.

Every program leads a process group of its own. Neither an error that a CUDA context keeps nor a kernel that never ends
reaches another program, and what a program started ends with it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .plan import ROOT, Arguments, Step

__all__ = ["Ended", "find_tool", "side_by_side", "variables"]

MISLEADING = (
    *("REROUTE_BACKEND", "TRITON_INTERPRET"),  # a step could pass without a kernel on the GPU
    *("CUDA_LAUNCH_BLOCKING", "PYTORCH_NO_CUDA_MEMORY_CACHING", "PYTEST_ADDOPTS"),  # or measure something else
)
"""Variables of the environment that programs do not inherit."""
SLACK = 8.0  # seconds that a measuring program has for its end, beyond those in which it measures
GRACE = 10.0  # seconds until a killed program is given up: a GPU driver may hold one back
PAUSE = 0.05  # seconds between looks at running programs
SHOWN = 100_000, 200_000  # bytes of an output that are kept, from its start and its end


@dataclass(frozen=True)
class Ended:
    """A program is over. cause: by itself; killed at its limit, or when there was no time left (also if it did not
    even begin: then it took no seconds); or it is not installed. code: its exit status, if it ended by itself.
    """

    cause: Literal["itself", "limit", "time", "missing"]
    code: int | None
    seconds: float
    output: str


def variables(step: Step) -> dict[str, str]:
    """The environment of the programs of ``step``; one Triton cache for all, so that each kernel compiles once."""
    scratch = Path(tempfile.gettempdir(), f"reroute-gpu-check-{os.getuid()}")
    inherited = {name: value for name, value in os.environ.items() if name not in MISLEADING}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))  # nothing needs to be installed
    return {
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        **inherited,
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # whatever else a machine has
        "HYPOTHESIS_STORAGE_DIRECTORY": str(scratch / "hypothesis"),
        **step.environment,
    }


def find_tool(name: str) -> str | None:
    """Where a program of the CUDA toolkit is: on the path, or in the toolkit."""
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name) or shutil.which(name, path=f"{toolkit}/bin")


def side_by_side(
    steps: Sequence[Step], at_once: int, left: Callable[[], float], measured: Path
) -> Iterator[tuple[Step, Ended]]:
    """Run the programs of ``steps``, at most ``at_once`` at a time; yield each with its step when it is over.

    left: seconds until all must be over; programs that still run then are killed. measured: the file of measurements.
    Those that run are also killed if the iteration is broken off.
    """
    waiting = deque((step, program) for step in steps for program in step.programs)
    running: list[_Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                step, program = waiting.popleft()
                tool = find_tool(program[0])
                if tool is None:
                    yield step, Ended("missing", None, 0.0, f"{program[0]} is not installed")
                elif (seconds := min(step.limit, left())) < max(step.least, 1.0):
                    why = f"not begun: it needs {step.least:.0f} s and {max(seconds, 0):.0f} s are left"
                    yield step, Ended("time", None, 0.0, why)
                else:
                    given = ("--seconds", f"{seconds - SLACK:.0f}", "--out", str(measured)) if step.measures else ()
                    running.append(_Running(step, (tool, *program[1:], *given), step.limit))
            for program_running in list(running):
                if (ended := program_running.look(left())) is not None:
                    running.remove(program_running)
                    yield program_running.step, ended
            if running:
                time.sleep(PAUSE)
    finally:
        for program_running in running:
            program_running.kill()


class _Running:
    """A program that has been started."""

    def __init__(self, step: Step, arguments: Arguments, limit: float) -> None:
        self.step = step
        self._limit = limit
        self._killed: tuple[Literal["limit", "time"], float] | None = None
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        self._output.write(f"$ {' '.join(arguments)}\n".encode())
        self._output.flush()
        self._begin = time.monotonic()
        self._process = subprocess.Popen(
            arguments,
            cwd=ROOT,
            env=variables(step),
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            # A group but not a session: what outlives this process belongs to the caller's session still.
            preexec_fn=os.setpgrp,
        )

    def look(self, left: float) -> Ended | None:
        """How it ended, if it has. Kill it where its time is over, or ``left`` is."""
        seconds = time.monotonic() - self._begin
        if self._has_exited():
            self.kill()  # what it started and left behind
            code = self._process.wait()
            return Ended(self._killed[0] if self._killed else "itself", code, seconds, self._read())
        if self._killed is None and (seconds >= self._limit or left <= 0):
            self._killed = "limit" if seconds >= self._limit else "time", seconds
            self.kill()
        elif self._killed is not None and seconds >= self._killed[1] + GRACE:
            return Ended(self._killed[0], None, seconds, f"{self._read()}\n(it does not die)")
        return None

    def kill(self) -> None:
        """The whole group, which exists until its leader has been waited for."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _has_exited(self) -> bool:
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _read(self) -> str:
        head, tail = SHOWN
        size = self._output.seek(0, os.SEEK_END)
        self._output.seek(0)
        if size <= head + tail:
            text = self._output.read()
        else:
            text = self._output.read(head) + b"\n[...]\n"
            self._output.seek(size - tail)
            text += self._output.read()
        return text.decode(errors="replace")
