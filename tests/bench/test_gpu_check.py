"""``make gpu-check`` as far as a machine without a GPU can run it: every step on the CPU or with a stand-in."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from bench import gpu_check, gpu_steps
from bench.clock import DeviceClock, captured
from bench.gpu_check import Result, attempt, main, report
from bench.gpu_steps import Measurement, StepFailed, StepSkipped

CPU = torch.device("cpu")
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
    printed = report(results, {"gpu": "none"}, tmp_path / "out")
    assert "--- CUDA graph failed: wrong bits" in printed
    assert (
        " ".join(printed.splitlines()[-1].split()) == "benchmarks measured step LLaVA N=576 B=1 torch eager 12.35 4.70"
    )
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["environment"] == {"gpu": "none"}
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


@pytest.mark.parametrize(("steps", "status"), [({"a": lambda: "fine"}, 0), ({"a": fails(StepFailed("no"))}, 1)])
def test_exit_status(steps: Any, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "stand-in")
    monkeypatch.setattr(gpu_check, "plan", lambda device: {**steps, "last": lambda: [MEASURED]})
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(tmp_path)])
    assert main() == status
    assert json.loads((tmp_path / "results.json").read_text())["steps"][-1]["step"] == "last"


def test_the_steps() -> None:
    assert list(gpu_check.plan(CPU)) == [
        "kernel tests",
        "memcheck",
        "racecheck",
        "CUDA graph",
        "no waiting",
        "benchmarks",
    ]


# --- programs ---------------------------------------------------------------------------------------------------------


def test_programs() -> None:
    assert gpu_steps.python([sys.executable, "-c", "print(1); print(2)"], {}) == "2"
    with pytest.raises(StepFailed, match="planted"):
        gpu_steps.python([sys.executable, "-c", "raise SystemExit('planted')"], {})


def test_kernel_tests_run_on_the_device() -> None:
    command = gpu_steps.kernel_tests(lambda arguments, environment: " ".join(arguments))
    assert command.endswith("-m pytest tests/kernels --executor cuda -q --tb=short")


def test_sanitizer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(StepSkipped, match="not installed"):
        gpu_steps.sanitizer("memcheck")
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.touch(mode=0o755)
    command = gpu_steps.sanitizer("racecheck", lambda arguments, environment: " ".join([*arguments, *environment]))
    assert command.startswith(f"{program} --tool racecheck --error-exitcode 9")
    assert command.endswith("PYTORCH_NO_CUDA_MEMORY_CACHING")


def test_the_sanitizer_has_tests_to_run() -> None:
    counted = gpu_steps.python(
        [sys.executable, "-m", "pytest", *gpu_steps.SANITIZED, "--executor", "interpreter", "--collect-only", "-q"], {}
    )
    assert int(counted.split("/")[0]) >= 10


@pytest.mark.parametrize("broken", [False, True])
def test_benchmarks_become_measurements(broken: bool) -> None:
    def run(arguments: Any, environment: Any) -> str:
        file = next(a for a in arguments if a.startswith("--benchmark-json=")).partition("=")[2]
        names = ("operation", "problem", "backend", "mode", "floor", "modelled")
        info = {name: getattr(MEASURED, name) for name in names}
        Path(file).write_text(json.dumps({"benchmarks": [{"stats": {"median": 12.345e-6}, "extra_info": info}]}))
        if broken:
            raise StepFailed("1 failed, 1 passed")
        return ""

    result = attempt("benchmarks", lambda: gpu_steps.benchmarks(run))
    assert result.status == ("failed" if broken else "passed")
    (measurement,) = result.measurements
    assert measurement.median == pytest.approx(MEASURED.median)
    assert measurement.problem == MEASURED.problem


def test_benchmarks_that_cannot_start() -> None:
    result = attempt("benchmarks", lambda: gpu_steps.benchmarks(fails_to_run))
    assert (result.status, result.detail, result.measurements) == ("failed", "no pytest", ())


def fails_to_run(arguments: Any, environment: Any) -> str:
    raise StepFailed("no pytest")


# --- prefills ---------------------------------------------------------------------------------------------------------


def test_graph_step() -> None:
    assert "3 inputs" in gpu_steps.graph(CPU, twice)


def test_graph_step_finds_stale_results() -> None:
    def capture(run: Callable[[], Any]) -> Callable[[], Any]:
        result = run()
        return lambda: result

    with pytest.raises(StepFailed, match="differ in tensor 0"):
        gpu_steps.graph(CPU, capture)


def test_no_waiting_step() -> None:
    guarded: list[int] = []

    @contextmanager
    def guard() -> Iterator[None]:
        guarded.append(1)
        yield

    assert gpu_steps.no_waiting(CPU, guard) == "2 prefills, backend torch"
    assert guarded == [1]


def test_no_waiting_step_asks_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    gpu_steps.no_waiting(CPU)
    assert modes == ["error", "default"]


# --- clocks of a device, on a stand-in --------------------------------------------------------------------------------


def test_device_clock() -> None:
    event, properties = mock.Mock(), mock.Mock(L2_cache_size=64)
    event.return_value.elapsed_time.return_value = 2.0
    ran: list[int] = []
    with (
        mock.patch.object(torch.cuda, "Event", event),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
    ):
        clock = DeviceClock(CPU)
        clock.run(lambda: ran.append(1))
    assert ran == [1]
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
