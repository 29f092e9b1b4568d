"""Plants mutants in a copy of the project, one at a time, and runs the tests that should notice."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from mutation import KERNELS, ROOT, Mutant

from reroute_kernels.testing.find_simt import simt_path

LIMIT = 1800  # seconds for the tests of one mutant on one executor; a fault may make a program wait forever
FAILED = re.compile(r"^(?:FAILED|ERROR) (tests/\S+?::.+?)(?: - .*)?$", re.MULTILINE)
STARTED = re.compile(r"^(tests/\S+::.+) $", re.MULTILINE)  # and not ended: a wild address ends the process


class Tree:
    """A copy of the project in which kernels may be changed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for name in ("reroute", "reroute_kernels", "tests"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        # No byte code, since two mutants may be of one size and second. Random cases are always the same ones, and a
        # process that dies has said which test it was running.
        self._environment = os.environ | {
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
            "HYPOTHESIS_PROFILE": "ci",
        }
        if path := simt_path():
            self._environment["SIMT_PATH"] = str(path)

    def killer(self, mutant: Mutant) -> tuple[str, str]:
        """The first test that fails with this fault, and the executor; two empty strings if none does."""
        target = self._folder / KERNELS / mutant.file
        text = target.read_text()
        target.write_text(mutant.applied(text))
        try:
            for executor in mutant.executors:
                if failed := self.failure(shlex.split(mutant.tests), executor):
                    return failed, executor
        finally:
            target.write_text(text)
        return "", ""

    def failure(self, tests: Sequence[str], executor: str) -> str:
        """The first of some tests that fails; RuntimeError if they say nothing about the kernels."""
        options = [f"--executor={executor}"] if executor else []
        command = [sys.executable, "-m", "pytest", "-x", "-v", "--tb=short", "-p", "no:cacheprovider", "-rfE"]
        run = [*command, *tests, *options]
        try:
            done = subprocess.run(
                run, cwd=self._folder, env=self._environment, capture_output=True, text=True, timeout=LIMIT
            )
        except subprocess.TimeoutExpired:
            return f"no end within {LIMIT} s"
        if done.returncode == 0:
            return ""
        found = FAILED.search(done.stdout) or STARTED.search(done.stdout)
        noticed = done.returncode in (1, -signal.SIGSEGV, -signal.SIGABRT) and "CompilationError" not in done.stdout
        if found is None or not noticed:
            raise RuntimeError(f"{shlex.join(run)} says nothing about the kernels:\n{done.stdout}{done.stderr}")
        return found[1]


def judge(tree: Tree, mutants: Iterable[Mutant], say: Callable[[str], None]) -> list[str]:
    """Run the mutants; what is wrong with them. Tests that kill must pass where nothing was planted."""
    wrong, killers, killed, alive = [], dict[str, list[str]](), 0, 0
    for mutant in mutants:
        start = time.perf_counter()
        try:
            failed, executor = tree.killer(mutant)
        except RuntimeError as error:
            failed, executor = "", ""
            wrong.append(f"{mutant.name}: {error}")
        verdict = f"{executor or 'pytest'}: {failed.removeprefix('tests/kernels/')}" if failed else "SURVIVED"
        say(f"{mutant.name:36} {time.perf_counter() - start:6.0f} s  {verdict}")
        if mutant.survives:
            say(f"{'':46} {mutant.equivalent or mutant.unseen}")
        if bool(failed) == mutant.survives:
            wrong.append(f"{mutant.name}: {verdict}")
        killed, alive = killed + bool(failed), alive + (not failed and not mutant.equivalent)
        if "::" in failed:
            killers.setdefault(executor, []).append(failed)
    for executor, tests in killers.items():
        if failed := tree.failure(sorted(set(tests)), executor):
            wrong.append(f"{failed} on {executor} fails where nothing was planted")
    if killed + alive:
        say(f"{killed} of {killed + alive} that change a result were killed: {killed / (killed + alive):.1%}")
    return wrong
