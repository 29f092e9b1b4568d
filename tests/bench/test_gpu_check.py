"""``make gpu-check`` as far as a machine without a GPU can run it: every step on the CPU or with a stand-in."""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import reroute
from bench import gpu_check, gpu_prefills, gpu_steps
from bench.clock import DeviceClock, captured
from bench.gpu_check import Result, attempt, main, report, save
from bench.gpu_steps import Measurement, Program, StepFailed, StepSkipped

CPU = torch.device("cpu")
ENVIRONMENT = {"gpu": "stand-in", "floor and modelled": "of an H100 SXM"}
MEASURED = Measurement("step", "LLaVA N=576 B=1", "torch", "eager", 12.345, 4.7, None)


def fails(error: Exception) -> Callable[[], str]:
    def step() -> str:
        raise error

    return step


def twice(run: Callable[[], Any]) -> Callable[[], Any]:
    """In place of a capture: a warm-up, and every replay runs again."""
    run()
    return run


# --- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "status", "detail"),
    [
        (lambda: "fine", "passed", "fine"),
        (lambda: [MEASURED], "passed", "1 measurements"),
        (fails(StepFailed("wrong bits")), "failed", "wrong bits"),
        (fails(StepSkipped("not installed")), "skipped", "not installed"),
        (fails(ZeroDivisionError("planted")), "failed", "ZeroDivisionError: planted"),
    ],
)
def test_a_step_cannot_stop_the_others(step: Any, status: str, detail: str) -> None:
    result = attempt("name", step)
    assert (result.step, result.status) == ("name", status)
    assert detail in result.detail


def test_table_csv_and_json(tmp_path: Path) -> None:
    results = [
        Result("memcheck", "skipped", 0.0, "not installed"),
        Result("CUDA graph", "failed", 1.5, "wrong bits"),
        Result("benchmarks", "passed", 2.0, "1 measurements", (MEASURED,)),
    ]
    save(results, ENVIRONMENT, tmp_path / "out")
    printed = report(results, ENVIRONMENT)
    assert "--- CUDA graph failed: wrong bits" in printed
    assert "--- benchmarks passed: 1 measurements" in printed
    assert "Microseconds on stand-in; floor and modelled are of an H100 SXM." in printed
    assert (
        " ".join(printed.splitlines()[-1].split()) == "benchmarks measured step LLaVA N=576 B=1 torch eager 12.35 4.70"
    )
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["environment"] == ENVIRONMENT
    assert record["steps"][2]["measurements"][0]["median"] == 12.345
    with (tmp_path / "out" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["skipped", "failed", "passed", "measured"]
    assert rows[-1]["median"] == "12.35"


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    assert main() == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def run_main(steps: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "stand-in")
    monkeypatch.setattr(gpu_check, "plan", lambda folder: steps)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(folder)])
    return main()


@pytest.mark.parametrize(("step", "status"), [(lambda: "fine", 0), (fails(StepFailed("no")), 1)])
def test_exit_status(step: Any, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_main({"first": step, "last": lambda: [MEASURED]}, tmp_path, monkeypatch) == status
    assert json.loads((tmp_path / "results.json").read_text())["steps"][-1]["step"] == "last"


def test_results_are_written_after_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_main({"first": lambda: [MEASURED], "second": interrupted}, tmp_path, monkeypatch)
    (step,) = json.loads((tmp_path / "results.json").read_text())["steps"]
    assert (step["step"], step["status"]) == ("first", "passed")
    assert MEASURED.problem in (tmp_path / "results.csv").read_text()


def test_the_steps(tmp_path: Path) -> None:
    """In their order; each writes to a file of its own."""
    steps = gpu_check.plan(tmp_path)
    kinds = ["kernel tests", "CUDA graph", "no waiting", "benchmarks", "memcheck", "racecheck"]
    assert list(dict.fromkeys(name.partition(":")[0] for name in steps)) == kinds
    assert "benchmarks: score_topk" in steps
    with mock.patch.object(Program, "__call__", autospec=True, side_effect=lambda self, *_: self.log.name):
        logs = [str(step()) for name, step in steps.items() if not name.startswith(("benchmarks", "mem", "race"))]
    assert logs[0] == "kernel-tests-rows.txt"
    assert len(set(logs)) == len(logs)


# --- programs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return Program(tmp_path / "logs" / "program.txt")


def test_programs(program: Program) -> None:
    assert program([sys.executable, "-c", "print(1); print('== 2 ==')"], 60, {}) == "2"
    assert program.log.read_text() == "1\n== 2 ==\n"
    with pytest.raises(StepFailed, match=r"planted\nexit status 1; the whole output: .*program\.txt"):
        program([sys.executable, "-c", "raise SystemExit('planted')"], 60, {})


def test_nothing_inherited_may_replace_the_kernels(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REROUTE_BACKEND", "torch")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    show = "import os; print(*map(os.environ.get, ('REROUTE_BACKEND', 'TRITON_INTERPRET', 'GIVEN', 'PATH')))"
    assert program([sys.executable, "-c", show], 60, {"GIVEN": "given"}) == f"None None given {os.environ['PATH']}"


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_program_that_never_ends_is_killed_with_all_it_started(program: Program) -> None:
    start = time.monotonic()
    with pytest.raises(StepFailed, match="started\nkilled after 1 s"):
        program(["sh", "-c", "sleep 1000 & echo $!; echo started; sleep 1000"], 1, {})
    assert time.monotonic() - start < gpu_steps.GRACE
    grandchild = int(program.log.read_text().split()[0])
    while is_running(grandchild):  # it has been sent the signal
        assert time.monotonic() - start < 60
        time.sleep(0.01)


def test_a_test_that_hangs_is_named(program: Program, tmp_path: Path) -> None:
    file = tmp_path / "test_file.py"
    file.write_text("import time\n\ndef test_that_hangs():\n    time.sleep(1000)\n")
    soon = [option.replace("=120", "=1") for option in gpu_steps.HANGING]
    with pytest.raises(StepFailed, match=r"(?s)in test_that_hangs.*exit status 1"):
        program([sys.executable, "-m", "pytest", str(file), "-v", "-p", "no:cacheprovider", *soon], 60, {})


def command(arguments: Any, limit: float, environment: dict[str, str]) -> str:
    """In place of a program."""
    return " ".join([*arguments, *environment])


def test_kernel_tests_run_on_the_device() -> None:
    assert "-m pytest tests/kernels/test_select.py --executor cuda" in gpu_steps.kernel_tests("select", command)


def collected(program: Program, *arguments: str) -> set[str]:
    options = ["--executor", "interpreter", "--collect-only", "-q"]
    program([sys.executable, "-m", "pytest", *arguments, *options], 300, {})
    return {line for line in program.log.read_text().splitlines() if "::" in line}


def test_no_file_of_kernel_tests_is_left_out(program: Program) -> None:
    files = {test.partition("::")[0] for test in collected(program, "tests/kernels")}
    elsewhere = "interpreter"  # tests of that executor itself
    assert files == {f"tests/kernels/test_{name}.py" for name in (*gpu_steps.KERNEL_TESTS, elsewhere)}


def test_sanitizer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(StepSkipped, match="not installed"):
        gpu_steps.sanitizer("memcheck", command)
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.touch(mode=0o755)
    run = gpu_steps.sanitizer("racecheck", command)
    assert run.startswith(f"{program} --tool racecheck --error-exitcode 9")
    assert run.endswith("PYTORCH_NO_CUDA_MEMORY_CACHING")


def test_the_sanitizer_has_few_tests_but_of_every_kernel(program: Program) -> None:
    tests = collected(program, *gpu_steps.SANITIZED)
    assert 15 <= len(tests) <= 40
    for wanted in ("test_rows", "test_defer_rmsnorm", "test_score_topk", "[staged-few]", "[refined-few]"):
        assert any(wanted in test for test in tests), wanted


# --- benchmarks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", [False, True])
def test_what_was_measured_is_kept(broken: bool) -> None:
    def run(arguments: Any, limit: float, environment: Any) -> str:
        assert arguments[arguments.index("--operation") + 1] == "step"
        file = next(a for a in arguments if a.startswith("--medians=")).partition("=")[2]
        Path(file).write_text(json.dumps(vars(MEASURED)) + "\n")
        if broken:
            raise StepFailed("1 failed, 1 passed")
        return ""

    result = attempt("benchmarks", lambda: gpu_steps.benchmarks("step", run))
    assert result.status == ("failed" if broken else "passed")
    assert result.measurements == (MEASURED,)


def test_benchmarks_that_cannot_start() -> None:
    result = attempt("benchmarks", lambda: gpu_steps.benchmarks("step", fails_to_run))
    assert (result.status, result.detail, result.measurements) == ("failed", "no pytest", ())


def fails_to_run(*_: Any) -> str:
    raise StepFailed("no pytest")


def test_the_benchmarks_of_one_operation(program: Program) -> None:
    """As they run here: on the CPU."""
    measured = gpu_steps.benchmarks("select", program)
    assert {measurement.operation for measurement in measured} == {"select"}
    assert len({measurement.problem for measurement in measured}) == len(measured) >= 6
    assert all(measurement.median > 0 for measurement in measured)


# --- prefills ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_checks_run_as_programs(program: Program) -> None:
    with pytest.raises(StepFailed, match="no-waiting needs a CUDA device"):
        gpu_steps.prefills("no-waiting", program)


def test_checks_print_what_they_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(gpu_prefills.CHECKS, "graph", lambda device: f"ran on {device}")
    gpu_prefills.main(["graph"])
    assert capsys.readouterr().out == "ran on cuda\n"


@pytest.mark.parametrize(("is_cuda", "backend"), [(True, "triton"), (False, "torch")])
def test_checks_choose_their_backend(is_cuda: bool, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prefills: Any = SimpleNamespace(model=None, ids=SimpleNamespace(is_cuda=is_cuda))
    monkeypatch.setattr(reroute, "enable", lambda model, **given: given["backend"])
    assert gpu_prefills.Prefills.routing(prefills) == backend


def test_graph_step() -> None:
    assert "3 inputs" in gpu_prefills.graph(CPU, twice)


def test_graph_step_finds_stale_results() -> None:
    def capture(run: Callable[[], Any]) -> Callable[[], Any]:
        result = run()
        return lambda: result

    with pytest.raises(StepFailed, match="differ in tensor 0"):
        gpu_prefills.graph(CPU, capture)


def test_no_waiting_step() -> None:
    guarded: list[int] = []

    @contextmanager
    def guard() -> Iterator[None]:
        guarded.append(1)
        yield

    assert gpu_prefills.no_waiting(CPU, guard) == "2 prefills, backend torch"
    assert guarded == [1]


def test_no_waiting_step_asks_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    gpu_prefills.no_waiting(CPU)
    assert modes == ["error", "default"]


# --- clocks of a device, on a stand-in --------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "waits"), [("eager", ["wait"]), ("graph", [])])
def test_device_clock(mode: Any, waits: list[str]) -> None:
    """Before it starts, data and dirty lines leave the cache; an eager run begins on an idle device."""
    did: list[str] = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            did.append(f"{func.overloadpacket} of {args[0].nbytes}")
            return func(*args, **(kwargs or {}))

    event, properties = mock.Mock(), mock.Mock(L2_cache_size=64)
    event.return_value.elapsed_time.return_value = 2.0
    event.return_value.record.side_effect = lambda: did.append("record")
    with (
        mock.patch.object(torch.cuda, "Event", event),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        mock.patch.object(torch.cuda, "synchronize", side_effect=lambda device: did.append("wait")),
    ):
        clock = DeviceClock(CPU)
        with Log():
            clock.run(lambda: did.append("run"), mode)
    assert did == ["aten.zero_ of 128", "aten.sum of 128", *waits, "record", "run", "record"]
    assert clock() == 0.002


def test_capture_warms_up_and_returns_the_captured_result() -> None:
    runs: list[int] = []

    def run() -> int:
        runs.append(1)
        return len(runs)

    stand_in = mock.MagicMock()
    names = ("Stream", "stream", "current_stream", "CUDAGraph", "graph")
    with mock.patch.multiple(torch.cuda, **{name: getattr(stand_in, name) for name in names}):
        replay = captured(run)
        assert (replay(), replay(), len(runs)) == (2, 2, 2)
    assert stand_in.CUDAGraph.return_value.replay.call_count == 2
