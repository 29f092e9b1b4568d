"""The programs of ``bench.gpu_check`` that use a GPU, as far as a CPU can run them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from tape import Tape
from tape_recorder import record_on_tapes

import reroute
from bench.end_to_end.models import QUICK
from bench.gpu_check import checks, environment, micro, operations, smoke
from bench.gpu_check.checks import CheckFailed
from bench.gpu_check.day import FAILED, NO_START, NOTHING_RUN, PASSED, UNFINISHED, WRONG
from bench.gpu_check.plan import ROOT
from bench.gpu_check.record import read_lines
from bench.kernels.roofline import kernel_time
from reroute_kernels import Backend, resolve
from reroute_kernels.testing.cases import OPERATIONS, KernelCase
from reroute_kernels.testing.find_simt import import_simt, simt_path

CPU = torch.device("cpu")
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def output_of(*arguments: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, text=True, capture_output=True)
    return done.returncode, done.stdout + done.stderr


# --- the smoke test ---------------------------------------------------------------------------------------------------


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Backend:
    monkeypatch.setattr(smoke, "CASES", (KernelCase("Qwen2.5-VL-7B", 40),))
    return resolve("torch", CPU)


def test_smoke(reference: Backend, capsys: pytest.CaptureFixture[str]) -> None:
    assert smoke.check_all(reference, reference, CPU, torch.float32) == PASSED
    assert capsys.readouterr().out.splitlines()[-1] == "all kernels start and are right"


def first(tensor: torch.Tensor) -> None:
    tensor.view(-1)[0] += 1


FAULTS: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {
    "a row goes to another place": ("defer", lambda arguments, _: first(arguments[0])),
    "a row comes from another place": ("admit", lambda _, result: first(result[0])),
    "a row goes home wrongly": ("defer_rmsnorm", lambda arguments, _: first(arguments[0].pages)),
    "another norm": ("defer_rmsnorm", lambda _, result: first(result)),
    "another token": ("select", lambda _, result: first(result.kept)),
    "another token by diversity": ("diverse_topk", lambda _, result: first(result.kept)),
    "another token by attention": ("score_topk", lambda _, result: first(result.kept)),
    "other scores, in the same order": ("score_topk", lambda _, result: result.scores.mul_(2)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_smoke_finds_wrong_results(fault: str, reference: Backend, capsys: pytest.CaptureFixture[str]) -> None:
    operation, spoil = FAULTS[fault]

    def wrong(*arguments: Any, **named: Any) -> Any:
        result = getattr(reference, operation)(*arguments, **named)
        spoil(arguments, result)
        return result

    faults: dict[str, Any] = {operation: wrong}
    status = smoke.check_all(replace(reference, **faults), reference, CPU, torch.float32)
    *lines, last = capsys.readouterr().out.splitlines()
    assert status == WRONG
    assert sum("right" not in line for line in lines) == 1
    assert operation in last


def test_smoke_says_what_does_not_start(reference: Backend, capsys: pytest.CaptureFixture[str]) -> None:
    """The others are tried nevertheless."""

    def score_topk(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no\ntuples")

    assert smoke.check_all(replace(reference, score_topk=score_topk), reference, CPU, torch.float32) == NO_START
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == "score_topk does not start: RuntimeError: no tuples"
    assert "select, Qwen2.5-VL-7B N=40 B=1: right" in printed.out
    assert "Traceback" in printed.err


INTERPRETED = """
import sys
sys.path.insert(0, "tests/kernels")
from executors import Executor
Executor("interpreter").start()
import torch
from bench.gpu_check import smoke
from reroute_kernels import Backend, ops, reference
from reroute_kernels.testing.cases import KernelCase
smoke.CASES = (KernelCase("Qwen2.5-VL-7B", 40),)
kernels, plain = (Backend.of("", "", operations) for operations in (ops, reference))
sys.exit(smoke.check_all(kernels, plain, torch.device("cpu"), torch.bfloat16))
"""


def test_the_kernels_pass_it() -> None:
    """In Triton's interpreter."""
    assert output_of("-c", INTERPRETED)[0] == PASSED


@NO_GPU
def test_smoke_without_a_gpu() -> None:
    status, printed = output_of("-m", "bench.gpu_check.smoke")
    assert (status, "it needs a CUDA device" in printed) == (NOTHING_RUN, True)


@pytest.mark.parametrize(("name", "said"), [("NVIDIA H100 80GB HBM3", ""), ("NVIDIA H200", ", which this is not")])
def test_versions(name: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smoke test prints them, and what runs it finds them there."""
    card = SimpleNamespace(name=name, total_memory=80, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    found = environment.versions()
    assert found["modelled"] == f"for an H100 SXM (bench.kernels.roofline){said}"
    assert environment.printed(f"a warning\n{json.dumps(found)}\nselect: right") == found
    assert environment.printed("Traceback") == {}


@pytest.mark.skipif(simt_path() is None, reason="simt is not here to run it")
def test_the_planted_fault_is_one() -> None:
    simt = import_simt()
    with simt.installed(arch=90), pytest.raises(simt.OutOfBounds):
        import_module("bench.gpu_check.planted").launch(CPU)


# --- micro-benchmarks -------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(micro, "CASES", (KernelCase("Qwen2.5-VL-7B", 40), KernelCase("LLaVA-1.5-7B", 1 << 20)))
    monkeypatch.setattr(micro, "ROUNDS", {"eager": 3})
    return tmp_path / "measured.jsonl"


def measure(file: Path, seconds: float = 600) -> int:
    return micro.measure("cpu", file, time.monotonic() + seconds)


def test_operations(file: Path) -> None:
    """Each a line; what is there is not measured again."""
    assert measure(file) == PASSED
    lines = list(read_lines(file))
    names = [line["operation"] for line in lines]
    assert names == ["1 empty launch", "4 empty launches", *micro.ORDER, "torch.topk, sort", "copy of a step's floor"]
    assert all(
        next(iter(line)) == "kind" and 0 < line["p20_us"] <= line["median_us"] <= line["p80_us"] for line in lines
    )
    step = next(line for line in lines if line["operation"] == "step")
    identity = {"kind": "operation", "operation": "step", "problem": "Qwen2.5-VL-7B N=40 B=1"}
    assert step.items() >= {**identity, "backend": "torch", "mode": "eager"}.items()
    assert step["floor_us"] == 1e6 * kernel_time("step", KernelCase("Qwen2.5-VL-7B", 40)).floor
    before = file.read_text()
    assert measure(file) == PASSED
    assert file.read_text() == before


def test_operations_go_on_where_time_ran_out(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 2.0, 2.0 + 1e-6])
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: next(now))
        assert micro.measure("cpu", file, 2.0 + micro.ROOM) == UNFINISHED
    assert len(list(read_lines(file))) == 3
    assert measure(file) == PASSED
    names = [line["operation"] for line in read_lines(file)]
    assert len(names) == len(set(names)) == 4 + len(micro.ORDER)


def test_what_could_not_be_measured_is_tried_again_at_the_end(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("illegal address")

    with monkeypatch.context() as patch:
        patch.setitem(OPERATIONS, "step", broken)
        assert measure(file) == FAILED
    errors = [line for line in read_lines(file) if "error" in line]
    assert [(line["operation"], line["error"]) for line in errors] == [("step", "RuntimeError: illegal address")]
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:4]))
    assert measure(file) == PASSED
    names = [line["operation"] for line in read_lines(file) if "error" not in line]
    assert names[-1] == "step"


def test_operations_stop_where_the_device_is_broken(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro, "_run_of", mock.Mock(side_effect=RuntimeError))
    monkeypatch.setattr(micro, "_is_alive", lambda device: False)
    assert measure(file) == FAILED
    assert len(list(read_lines(file))) == 1


def test_operations_of_a_gpu() -> None:
    """Both backends as graphs and eagerly, the step first; 72B and long prompts come late."""
    every = micro.keys(torch.device("cuda"))
    assert len(every) == len(set(every)) == 4 + len(micro.CASES) * (4 * len(micro.ORDER) + 4)
    assert {key.operation for key in every} >= {*OPERATIONS}
    first = [(key.operation, key.backend, key.mode) for key in every[4:8]]
    assert first == [("step", backend, mode) for backend in ("triton", "torch") for mode in ("graph", "eager")]
    visual = [problem.visual for problem in micro.CASES]
    assert visual[0] == 576
    assert visual[-1] == max(visual)
    modelled = micro._modelled(every[4])
    assert 0 < modelled["floor_us"] < modelled["hidden_us"] < modelled["modelled_us"]


def test_the_program_counts_its_imports(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["operations", "--seconds", "100", "--out", str(file), "--device", "cpu"])
    given = mock.Mock(return_value=UNFINISHED)
    monkeypatch.setattr(micro, "measure", given)
    begin = time.monotonic()
    assert operations.main() == UNFINISHED
    device, out, end = given.call_args[0]
    assert (device, out) == ("cpu", file)
    assert 0 <= end - begin - 100 < 5
    source = Path(operations.__file__).read_text()
    assert "\nimport torch" not in source
    assert "\nfrom ." not in source


def twice(run: Callable[[], Any]) -> Callable[[], Any]:
    """In place of a capture: a warm-up, and every replay runs again."""
    run()
    return run


# --- checks of prefills -----------------------------------------------------------------------------------------------


@NO_GPU
def test_checks_run_as_programs() -> None:
    status, printed = output_of("-m", "bench.gpu_check.checks", "no-waiting")
    assert (status != 0, "no-waiting needs a CUDA device" in printed) == (True, True)


def test_checks_print_what_they_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(checks.CHECKS, "graph", lambda device: f"ran on {device}")
    checks.main(["graph"])
    assert capsys.readouterr().out == "ran on cuda\n"


@pytest.mark.parametrize(("is_cuda", "backend"), [(True, "triton"), (False, "torch")])
def test_checks_choose_their_backend(is_cuda: bool, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prefills: Any = SimpleNamespace(model=None, ids=SimpleNamespace(is_cuda=is_cuda))
    monkeypatch.setattr(reroute, "enable", lambda model, **given: given["backend"])
    chosen: Any = checks.Prefills.routing(prefills)
    assert chosen == backend


def test_graph_step() -> None:
    assert "3 inputs" in checks.graph(CPU, twice)


def test_graph_step_finds_stale_results() -> None:
    def capture(run: Callable[[], Any]) -> Callable[[], Any]:
        result = run()
        return lambda: result

    with pytest.raises(CheckFailed, match="differ in tensor 0"):
        checks.graph(CPU, capture)


def test_no_waiting_step() -> None:
    guarded: list[int] = []

    @contextmanager
    def guard() -> Iterator[None]:
        guarded.append(1)
        yield

    assert checks.no_waiting(CPU, guard) == "2 prefills, backend torch"
    assert guarded == [1]


def test_no_waiting_step_asks_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    checks.no_waiting(CPU)
    assert modes == ["error", "default"]


SMALL = replace(QUICK, text=48)


def test_replays_step(monkeypatch: pytest.MonkeyPatch) -> None:
    record_on_tapes(monkeypatch)
    monkeypatch.setattr(checks, "RUNS", 1)
    dense, routed = checks.replays(CPU, SMALL).splitlines()
    assert "dense: eager" in dense
    assert "routed: eager" in routed
    assert routed.count("0.0% more FLOPs for fillers") == 1


def test_compiled_steps_that_are_none_are_found() -> None:
    """On a CPU Transformers compiles none; tokens are compared before that shows."""
    with pytest.raises(checks.CheckFailed, match=r"plain: .*; 0 graphs of Dynamo, 0 not recorded"):
        checks.static_steps(CPU, SMALL)


def test_replays_step_finds_stale_results(monkeypatch: pytest.MonkeyPatch) -> None:
    record_on_tapes(monkeypatch)
    monkeypatch.setattr(checks, "RUNS", 1)
    monkeypatch.setattr(Tape, "replay", lambda self: None)
    with pytest.raises(CheckFailed, match="differ in tensor 0"):
        checks.replays(CPU, SMALL)
    monkeypatch.setattr("reroute.transformers.graphs.replays.why_not_call", lambda *_: "it is a test")
    with pytest.raises(CheckFailed, match="was not replayed: ran eagerly: it is a test"):
        checks.replays(CPU, SMALL)
