"""The programs that ``bench.gpu_check`` runs: real ones, which hang, fork, print much and are killed."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import assert_ends

from bench.gpu_check import program
from bench.gpu_check.plan import ROOT, Step
from bench.gpu_check.program import Ended, find_tool, side_by_side

PYTHON = sys.executable, "-c"


def step(*programs: tuple[str, ...], **others: Any) -> Step:
    return Step("x", programs, **{"estimate": 1, "limit": 60, "least": 0, "shares": True, **others})


def python(code: str) -> tuple[str, ...]:
    return *PYTHON, code


def run(*steps: Step, at_once: int = 4, left: Callable[[], float] = lambda: 60.0) -> list[Ended]:
    return [ended for _, ended in side_by_side(steps, at_once, left, Path("/measured.jsonl"))]


def last(ended: Ended) -> str:
    return ended.output.strip().splitlines()[-1]


def test_output_and_exit_status() -> None:
    (ended,) = run(step(python("import sys; print(1); print(2, file=sys.stderr); sys.exit(7)")))
    assert (ended.cause, ended.code) == ("itself", 7)
    assert ended.output.splitlines() == [
        f"$ {' '.join(python('import sys; print(1); print(2, file=sys.stderr); sys.exit(7)'))}",
        "1",
        "2",
    ]
    assert 0 < ended.seconds < 60


def test_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever could replace the kernels, or what is measured, is not inherited. Programs run in the repository."""
    for name in program.MISLEADING:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("KEPT", "kept")
    monkeypatch.setenv("PYTHONPATH", "/other")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    names = (
        *program.MISLEADING,
        "KEPT",
        "GIVEN",
        "PYTHONPATH",
        "OMP_NUM_THREADS",
        "HF_HUB_OFFLINE",
        "TRITON_CACHE_DIR",
    )
    show = f"import os; print(*map(os.environ.get, {names}), os.getcwd())"
    (first, second) = run(step(python(show), environment={"GIVEN": "given"}), step(python(show)))
    *misleading, kept, given, path, threads, offline, cache, cwd = last(first).split()
    assert misleading == ["None"] * len(program.MISLEADING)
    assert (kept, given, path, threads, offline, cwd) == ("kept", "given", f"{ROOT}:/other", "1", "1", str(ROOT))
    assert last(second).split()[-2] == cache
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    assert last(run(step(python(show)))[0]).split()[-2] == "/mine"


def test_no_more_at_a_time_than_there_are_places(tmp_path: Path) -> None:
    """Every program writes how many run with it."""
    code = f"""
import os, time
here = '{tmp_path}/' + str(os.getpid())
open(here, 'w').close(); time.sleep(0.5); print(len(os.listdir('{tmp_path}'))); time.sleep(0.2); os.remove(here)
"""
    alone = run(step(python(code)), step(python(code)), at_once=1)
    assert [last(ended) for ended in alone] == ["1", "1"]
    together = run(step(*[python(code)] * 5), at_once=3)
    assert len(together) == 5
    assert max(int(last(ended)) for ended in together) in (2, 3)


def test_a_program_that_never_ends_is_killed_with_all_it_started() -> None:
    """The others do not notice."""
    hangs = "sh", "-c", "sleep 1000 & echo $!; sleep 1000"
    first, second = run(step(python("import time; time.sleep(2.5); print('fine')")), step(hangs, limit=1))
    assert (first.cause, first.code) == ("limit", -9)
    assert 1 <= first.seconds < program.GRACE
    assert_ends(int(last(first)))
    assert (second.cause, last(second)) == ("itself", "fine")


def test_what_a_program_leaves_behind_ends_with_it() -> None:
    (ended,) = run(step(("sh", "-c", "sleep 1000 & echo $!")))
    assert ended.code == 0
    assert_ends(int(last(ended)))


def test_what_runs_is_killed_when_the_time_is_over() -> None:
    begin = time.monotonic()
    hangs = "sh", "-c", "echo $$; sleep 1000"
    (ended,) = run(step(hangs), left=lambda: 2.0 - (time.monotonic() - begin))
    assert (ended.cause, ended.code) == ("time", -9)
    assert_ends(int(last(ended)))


def test_what_runs_is_killed_if_the_iteration_is_broken_off() -> None:
    file = Path(f"/proc/self/task/{os.getpid()}/children")
    children: Callable[[], set[int]] = lambda: {*map(int, file.read_text().split())}
    others = children()  # of the test session
    programs = side_by_side([step(python("print(1)")), step(("sleep", "1000"))], 2, lambda: 60.0, Path())
    next(programs)
    (child,) = children() - others
    programs.close()  # type: ignore[attr-defined]
    assert_ends(child)


def test_what_would_have_too_little_time_does_not_begin() -> None:
    (ended,) = run(step(python("print(1)"), least=45), left=lambda: 44.4)
    assert (ended.cause, ended.seconds) == ("time", 0)
    assert ended.output == "not begun: it needs 45 s and 44 s are left"


@pytest.mark.parametrize(("left", "seconds"), [(500.0, 60 - program.SLACK), (40.4, 40 - program.SLACK)])
def test_measuring_programs_are_told_their_time_and_file(left: float, seconds: float) -> None:
    """The limit or what is left, and time for their end besides."""
    (ended,) = run(step(python("import sys; print(sys.argv[1:])"), measures=True), left=lambda: left)
    assert last(ended) == f"['--seconds', '{seconds:.0f}', '--out', '/measured.jsonl']"


def test_tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On the path, or in the toolkit."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    (ended,) = run(step(("compute-sanitizer", "--tool", "memcheck")))
    assert (ended.cause, ended.output) == ("missing", "compute-sanitizer is not installed")
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho $0 $*\n")
    tool.chmod(0o755)
    assert find_tool("compute-sanitizer") == str(tool)
    (ended,) = run(step(("compute-sanitizer", "--tool", "memcheck")))
    assert last(ended) == f"{tool} --tool memcheck"


def test_of_a_long_output_both_ends_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "SHOWN", (1000, 2000))
    (ended,) = run(step(python("print('begin'); print('.' * 5000); print('end')")))
    assert len(ended.output) == 3000 + len("\n[...]\n")
    assert re.match(r"(?s)\$ .*begin\n\.+\n\[\.\.\.\]\n\.+\nend\n$", ended.output)


def test_a_group_of_its_own_in_the_session_of_the_caller() -> None:
    """So Ctrl-C does not reach it, but whoever ends the session does."""
    (ended,) = run(step(python("import os; print(os.getpid() == os.getpgid(0), os.getsid(0))")))
    assert last(ended) == f"True {os.getsid(0)}"


def test_a_test_that_hangs_is_named(tmp_path: Path) -> None:
    from bench.gpu_check.plan import _pytest

    file = tmp_path / "test_file.py"
    file.write_text("import time\n\ndef test_that_hangs():\n    time.sleep(1000)\n")
    conftest = tmp_path / "conftest.py"
    conftest.write_text("def pytest_addoption(parser):\n    parser.addoption('--executor')\n")
    (ended,) = run(step(_pytest(1, str(file))))
    assert ended.code == 1
    assert "in test_that_hangs" in ended.output
