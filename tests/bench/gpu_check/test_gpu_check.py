"""``python -m bench.gpu_check`` as far as a machine without a GPU can run it: its days, on stand-ins."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from processes import assert_ends

from bench.gpu_check.day import FAILED, NO_START, NOTHING_RUN, PASSED, UNFINISHED, WRONG, Day, judged
from bench.gpu_check.plan import RESERVE, ROOT, SMOKE, STEPS, Step
from bench.gpu_check.program import Ended
from bench.gpu_check.record import Record, Result, read_lines

GPU = json.dumps({"gpu": "stand-in", "torch": "2"})


def step(name: str, programs: int = 1, **others: Any) -> Step:
    return Step(name, (("true",),) * programs, **{"estimate": 10, "limit": 30, "least": 5, **others})


def ended(output: str = "1 passed", code: int | None = 0, cause: Any = "itself", seconds: float = 10) -> Ended:
    return Ended(cause, code, seconds, output)


# --- what a step comes to ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "status", "detail"),
    [
        (ended("==== 3 passed in 1s ====\n\n"), "passed", "3 passed in 1s"),
        (ended("boom", 1), "failed", "exit status 1: boom"),
        (ended("", -11), "failed", "exit status -11: no output"),
        (ended("4 left", UNFINISHED), "unfinished", "4 left"),
        (ended("row 1", None, "limit"), "failed", "killed at its limit of 30 s: row 1"),
        (ended("row 1", None, "time"), "unfinished", "out of time after 10 s: row 1"),
        (ended("not begun: why", None, "time", 0), "unfinished", "not begun: why"),
        (ended("ncu is not installed", None, "missing", 0), "skipped", "ncu is not installed"),
    ],
)
def test_status(program: Ended, status: str, detail: str) -> None:
    result = judged(step("x", measures=True), [program])
    assert (result.status, result.detail) == (status, detail)
    assert (result.end != "") == (status == "failed" and program.output != "")


def test_status_of_tools() -> None:
    """A sanitizer may let a program pass unseen, and a machine may not have what it takes."""
    memcheck, ncu = (next(s for s in STEPS if s.name == name) for name in ("sanitizer/memcheck", "ncu"))
    assert judged(memcheck, [ended("5 passed\n========= ERROR SUMMARY: 0 errors")]).status == "passed"
    unseen = judged(memcheck, [ended("========= Error: No attachable process found.\n5 passed")])
    assert (unseen.status, "does not match" in unseen.detail) == ("failed", True)
    assert all("--launch-timeout 0" in " ".join(program) for program in memcheck.programs)
    refused = judged(memcheck, [ended("========= Error: Device not supported. See\n5 passed", 9)])
    assert (refused.status, refused.detail) == ("skipped", "Error: Device not supported. See")
    planted = next(s for s in STEPS if s.name == "sanitizer/planted")
    assert judged(planted, [ended("Invalid __global__ write of size 4\nERROR SUMMARY: 1 error", 9)]).status == "passed"
    assert judged(planted, [ended("nothing stopped it\nERROR SUMMARY: 0 errors")]).status == "failed"
    assert judged(planted, [ended("cannot import torch", 9)]).status == "failed"
    assert judged(ncu, [ended("==PROF== \n  _score_kernel (2, 8, 1)x(128, 1, 1)\n")]).detail == "in ncu.txt"
    assert judged(ncu, [ended("==ERROR== ERR_NVGPUCTRPERM - no permission", 1)]).status == "skipped"
    assert judged(ncu, [ended("==WARNING== No kernels were profiled.")]).status == "failed"


def test_a_step_is_as_good_as_its_worst_program() -> None:
    result = judged(step("x"), [ended(), ended("first", 1, seconds=12), ended("second", 2)])
    assert (result.status, result.seconds) == ("failed", 12)
    assert result.detail == "exit status 1: first; exit status 2: second"
    assert result.end == "first\nsecond"


# --- days on stand-ins, with a clock that stands still but for what runs ----------------------------------------------


class StandIns:
    """In place of programs: what each prints and how long it takes, by the name of its step; and a clock."""

    def __init__(self, **programs: Ended) -> None:
        self.programs = {"smoke": ended(GPU, seconds=20), **programs}
        self.now, self.began = 0.0, list[str]()
        self.interrupt: Callable[[], None] = lambda: None

    def clock(self) -> float:
        return self.now

    def run(
        self, steps: Sequence[Step], at_once: int, left: Callable[[], float], measured: Path
    ) -> Iterator[tuple[Step, Ended]]:
        for each in (step for step in steps for _ in step.programs):
            if left() < each.least:
                yield each, ended("not begun", None, "time", 0)
                continue
            self.began.append(each.name)
            program = self.programs.get(each.name, ended())
            self.now += min(program.seconds, max(left(), 0))
            if each.name == "interrupted":
                self.interrupt()
                program = ended("half", None, "time", 2)
            yield each, program

    def day(self, folder: Path, steps: Sequence[Step], minutes: float = 9) -> tuple[int, Record]:
        record = Record(folder)
        day = Day(record, minutes, self.clock, self.run)
        self.interrupt = day.stop
        return day.go_through([step("smoke", least=0), *steps]), record


def statuses(record: Record) -> dict[str, str]:
    return {name: result.status for name, result in record.results.items()}


def test_exit_status(tmp_path: Path) -> None:
    steps = [step("a"), step("b")]
    for i, (programs, status) in enumerate(
        [
            ({}, PASSED),
            ({"a": ended("no", 1)}, FAILED),
            ({"a": ended("x", None, "missing", 0)}, PASSED),
            ({"a": ended("x", None, "time")}, UNFINISHED),
            ({"a": ended("x", None, "time"), "b": ended("no", 1)}, FAILED),
            ({"smoke": ended(GPU, WRONG)}, FAILED),
        ]
    ):
        code, record = StandIns(**programs).day(tmp_path / str(i), steps)
        assert code == status
        assert [*record.results] == ["smoke", "a", "b"]


@pytest.mark.parametrize(
    "smoke", [ended("cannot compile", NO_START), ended("Error", 1), ended(GPU, None, "limit"), ended("", -11)]
)
def test_nothing_else_runs_if_the_kernels_do_not_start(smoke: Ended, tmp_path: Path) -> None:
    stand_ins = StandIns(smoke=smoke)
    status, record = stand_ins.day(tmp_path, [step("a")])
    assert (status, stand_ins.began) == (NO_START, ["smoke"])
    assert statuses(record) == {"smoke": "failed", "a": "unfinished"}
    assert smoke.output in (tmp_path / "table.txt").read_text()


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, record = StandIns(smoke=ended("it needs a CUDA device", NOTHING_RUN)).day(tmp_path, [step("a")])
    assert (status, record.results) == (NOTHING_RUN, {})
    assert "it needs a CUDA device" in capsys.readouterr().out


def test_time_runs_out_and_a_later_call_goes_on(tmp_path: Path) -> None:
    """What passed stays, what failed is repeated, and what is too long for the rest leaves it to what is not."""
    steps = [step("passes"), step("fails"), step("long", least=500), step("short"), step("last")]
    stand_ins = StandIns(fails=ended("no", 1), short=ended(seconds=27))
    status, record = stand_ins.day(tmp_path, steps, minutes=(20 + 10 + 10 + 27 + RESERVE + 1) / 60)
    assert (status, stand_ins.began) == (FAILED, ["smoke", "passes", "fails", "short"])
    assert statuses(record)["long"] == statuses(record)["last"] == "unfinished"
    again = StandIns(fails=ended("still no", 1))
    status, record = again.day(tmp_path, steps, minutes=11)
    assert (status, again.began) == (FAILED, ["smoke", "fails", "long", "last"])
    assert record.results["fails"].detail == "exit status 1: still no"
    assert StandIns().day(tmp_path, steps)[0] == PASSED
    done = StandIns()
    assert (done.day(tmp_path, steps)[0], done.began) == (PASSED, ["smoke"])


def test_what_is_not_begun_does_not_hide_what_an_earlier_call_found(tmp_path: Path) -> None:
    StandIns(a=ended("no", 1)).day(tmp_path, [step("a")])
    status, record = StandIns().day(tmp_path, [step("a")], minutes=(20 + RESERVE + 1) / 60)
    assert (status, record.results["a"].detail) == (FAILED, "exit status 1: no")


def test_time_that_is_left_goes_to_what_was_cut_short(tmp_path: Path) -> None:
    steps = [step("measured", measures=True), step("b")]
    stand_ins = StandIns(measured=ended("more", UNFINISHED))
    assert stand_ins.day(tmp_path, steps)[0] == UNFINISHED
    assert stand_ins.began == ["smoke", "measured", "b", "measured"]


def test_an_interrupted_day_is_one_whose_time_is_over(tmp_path: Path) -> None:
    stand_ins = StandIns()
    status, record = stand_ins.day(tmp_path, [step("a"), step("interrupted"), step("c")])
    assert (status, stand_ins.began) == (UNFINISHED, ["smoke", "a", "interrupted"])
    assert statuses(record) == {"smoke": "passed", "a": "passed", "interrupted": "unfinished", "c": "unfinished"}


def test_a_folder_is_of_one_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    StandIns().day(tmp_path, [step("a")])
    other = StandIns(smoke=ended(GPU.replace("stand-in", "other")))
    status, record = other.day(tmp_path, [step("a"), step("b")])
    assert (status, other.began) == (NOTHING_RUN, ["smoke"])
    assert "of another machine (gpu stand-in, here other); choose another --out" in capsys.readouterr().out
    assert record.environment["gpu"] == "stand-in"


# --- the files --------------------------------------------------------------------------------------------------------


def test_files(tmp_path: Path) -> None:
    ncu = ended("==PROF==\n  _score_kernel")
    steps = [step("a", 2), step("ncu", output="ncu.txt"), step("b")]
    record = StandIns(b=ended("E   planted\n1 failed", 1), ncu=ncu).day(tmp_path, steps)[1]
    record.measured.write_text(
        '{"kind": "k", "name": "n", "us": 1.23456, "all": [1, 2]}\n{"kind": "k", "error": "e"}\n'
    )
    record.write()
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"results.json", "measured.jsonl", "log.txt", "table.txt", "ncu.txt"}
    known = json.loads((tmp_path / "results.json").read_text())
    assert known["environment"]["gpu"] == "stand-in"
    assert {"commit", "date", "cores", "source"} <= known["environment"].keys()
    assert [fields["estimate"] for fields in known["steps"]] == [10] * 4
    log, table = ((tmp_path / name).read_text() for name in ("log.txt", "table.txt"))
    headings = re.findall(r"(?m)^={20} (.*) ={20}$", log)
    assert headings[0] == "smoke: exit status 0 after 20 s"
    assert headings[1:] == [f"{name}: exit status {int(name == 'b')} after 10 s" for name in ("a", "a", "ncu", "b")]
    assert "planted" in log
    assert "_score_kernel" not in log
    assert "_score_kernel" in (tmp_path / "ncu.txt").read_text()
    assert re.search(r"b +failed +10 +10 +exit status 1: 1 failed", table)
    assert re.search(r"k\nname +us +error\nn +1\.235\n +e\n", table)
    assert "--- b failed\nE   planted" in table


def test_what_a_kill_left_is_mended(tmp_path: Path) -> None:
    file = tmp_path / "measured.jsonl"
    file.write_text('{"kind": "k"}\n{"kind": "half')
    assert list(read_lines(file)) == [{"kind": "k"}]
    record = Record(tmp_path)
    assert file.read_text() == '{"kind": "k"}\n'
    record.add(Result("a", "passed", 1.0, 2.0, "d"))
    assert Record(tmp_path).results == record.results


def test_another_programs_results_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"mine": 1}')
    with pytest.raises(ValueError, match="is not of this program"):
        Record(tmp_path)
    command = [sys.executable, "-m", "bench.gpu_check", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert (done.returncode, "choose another folder" in done.stderr) == (NOTHING_RUN, True)


# --- the command ------------------------------------------------------------------------------------------------------

DRIVER = """
import sys
from bench.gpu_check import plan
from bench.gpu_check.plan import Step
def step(name, code, **others):
    return Step(name, ((sys.executable, "-c", code),), **dict(estimate=1, limit=60, least=0, **others))
plan.SMOKE = step("smoke", "import json; print(json.dumps({'gpu': 'stand-in'}))")
plan.STEPS = (
    plan.SMOKE,
    step("first", "import sys; print({}, file=open(sys.argv[-1], 'a')); print('did it')", measures=True),
    step("hangs", "import subprocess, time; print('seen', subprocess.Popen(['sleep', '600']).pid); time.sleep(600)"),
    step("last", "print('too late')"),
)
from bench.gpu_check.__main__ import main
sys.exit(main())
"""


def started(folder: Path) -> subprocess.Popen[str]:
    """The command on stand-ins, in another directory; it hangs in its third step."""
    (folder / "driver.py").write_text(DRIVER)
    process = subprocess.Popen(
        [sys.executable, "driver.py", "--out", "out"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,  # tests in the background ignore it
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "first" in line:
            return process
    raise AssertionError("it did not come so far")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(number: signal.Signals, tmp_path: Path) -> None:
    """It kills what runs and writes what there is, in the folder that the caller named from where it is."""
    process = started(tmp_path)
    time.sleep(1)
    process.send_signal(number)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == UNFINISHED
    assert re.search(r"hangs +unfinished .*out of time after \d s: seen \d+", printed)
    steps = json.loads((tmp_path / "out" / "results.json").read_text())["steps"]
    assert [fields["status"] for fields in steps] == ["passed", "passed", "unfinished", "unfinished"]
    grandchild = re.search(r"seen (\d+)", (tmp_path / "out" / "log.txt").read_text())
    assert grandchild is not None
    assert_ends(int(grandchild[1]))


def test_killed(tmp_path: Path) -> None:
    """What was found is there, and another call goes on."""
    process = started(tmp_path)
    process.kill()
    process.wait()
    record = Record(tmp_path / "out")
    assert statuses(record) == {"smoke": "passed", "first": "passed", "hangs": "unfinished", "last": "unfinished"}
    assert record.measured.read_text() == "{}\n"


def test_smoke_is_the_first_step() -> None:
    assert STEPS[0] is SMOKE
    assert replace(SMOKE, name="x") != SMOKE
