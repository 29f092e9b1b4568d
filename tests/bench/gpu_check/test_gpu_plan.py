"""The steps of ``python -m bench.gpu_check``: all that needs a GPU, in an order that fits, as pytest finds it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.gpu_check import plan
from bench.gpu_check.plan import MINUTES, MOST_AT_ONCE, RESERVE, ROOT, SMOKE, STEPS, Step, batches, chosen, expected


def step(name: str, programs: int = 1, **others: Any) -> Step:
    return Step(name, (("true",),) * programs, **{"estimate": 10, "limit": 30, "least": 5, **others})


def test_every_step_runs_a_module_that_exists() -> None:
    programs = [program[program.index("-m") + 1] for step in STEPS for program in step.programs if "-m" in program]
    assert {"bench.gpu_check.prefill", "bench.gpu_check.operations", "pytest"} <= {*programs}
    assert all(importlib.util.find_spec(module) for module in programs)


def test_the_default_fits_into_its_time() -> None:
    assert expected(STEPS, MOST_AT_ONCE) + RESERVE <= 60 * MINUTES <= 540
    assert all(step.least <= step.estimate <= step.limit for step in STEPS)
    assert SMOKE.limit <= 90
    assert expected(STEPS, 2) > expected(STEPS, MOST_AT_ONCE)


def test_what_is_expected_of_programs_side_by_side() -> None:
    """Three alone, and five that share two places."""
    steps = [step("a"), step("b", 3, shares=True, estimate=20), step("c", 2, shares=True), step("d", estimate=7)]
    assert expected(steps, 5) == 10 + 20 + 7
    assert expected(steps, 2) == 10 + 40 + 7


def test_order() -> None:
    """Do they start, are they right, what do they gain, and then the rest. What is timed has the GPU to itself."""
    groups = list(dict.fromkeys(step.name.partition("/")[0] for step in STEPS))
    assert groups == ["smoke", "kernels", "checks", "models", "prefill", "operations", "streams", "sanitizer", "ncu"]
    assert [len(batch) for batch in batches(STEPS)] == [1, 22, 1, 1, 1, 1, 4, 1, 1]
    assert not any(step.shares for step in STEPS if step.measures or step.name in ("smoke", "ncu"))
    first = [step for step in batches(STEPS)[1] if not step.name.startswith("models/")]
    assert sum(len(step.programs) for step in first) <= MOST_AT_ONCE


def test_measuring_programs() -> None:
    measuring = [" ".join(step.programs[0][1:]) for step in STEPS if step.measures]
    models = ("llava-7b", "qwen-7b", "qwen-32b")
    prefills = [f"-m bench.gpu_check.prefill --model {model}" for model in models]
    assert measuring == [*prefills[:2], "-m bench.gpu_check.operations", prefills[2]]


def test_choice_of_steps() -> None:
    assert chosen([]) == list(STEPS)
    names = ["smoke", "sanitizer/memcheck", "sanitizer/racecheck", "sanitizer/planted", "ncu"]
    assert [s.name for s in chosen(["ncu", "sanitizer"])] == names
    assert [s.name for s in chosen(["prefill/qwen-7b"])] == ["smoke", "prefill/qwen-7b"]
    with pytest.raises(ValueError, match=r"no step is called ncuu, x; known: smoke, kernels, .*ncu, kernels/select, "):
        chosen(["x", "ncuu", "ncu"])


def collected(*arguments: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", *arguments, "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_no_kernel_and_no_file_of_kernel_tests_is_left_out() -> None:
    files = {test.partition("::")[0] for test in collected("tests/kernels", "--executor", "interpreter")}
    run = {argument for step in STEPS for argument in step.programs[0] if argument.startswith("tests/kernels/")}
    assert files - run == {"tests/kernels/test_interpreter.py"}  # tests of that executor itself
    sources = (ROOT / "reroute_kernels" / "triton_kernels").glob("*.py")
    launched = {name for file in sources for name in re.findall(r"\ndef (_\w+_kernel)\(", file.read_text())}
    assert launched == {*plan.KERNELS}


def test_the_sanitizer_has_few_tests_but_of_every_kernel() -> None:
    (program,) = {step.programs for step in STEPS if step.name == "sanitizer/memcheck"}
    files = [argument for arguments in program for argument in arguments if argument.startswith("tests/")]
    tests = collected(*files, "--executor", "interpreter", "-k", plan.SANITIZED)
    assert 10 <= len(tests) <= 25
    for wanted in ("test_rows", "test_defer_rmsnorm", "test_score_topk", "[staged-few]", "[refined-few]"):
        assert any(wanted in test for test in tests), wanted


def test_tests_that_name_no_device_run_on_one(tmp_path: Path) -> None:
    """Random numbers are those of the CPU; what the packages make themselves is left alone."""
    file = tmp_path / "test_devices.py"
    file.write_text(
        "import torch\n"
        "generator = torch.Generator().manual_seed(0)\n"
        "def test_it():\n"
        "    made = [torch.zeros(3), torch.tensor([1]), torch.arange(2), torch.randn(2), torch.ones(2, device=None)]\n"
        "    made.append(torch.randint(3, (2,), generator=generator))\n"
        "    assert {its.device.type for its in made} == {'meta'}\n"
        "    assert torch.zeros(2, device='cpu').device.type == 'cpu'\n"
        "    assert torch.nn.Linear(2, 3).weight.device.type == 'meta'\n"
        "    drawn = torch.randn(2, device='cpu', generator=generator)\n"
        "    assert drawn.device.type == 'cpu'\n"
        "    ours = {'torch': torch, '__name__': 'reroute.core.some'}\n"
        "    exec('made = torch.zeros(2)', ours)\n"
        "    assert ours['made'].device.type == 'cpu'\n"
    )
    command = [sys.executable, "-m", "pytest", str(file), "-q", "-p", "no:cacheprovider"]
    for device, code in (("meta", 0), ("cpu", 1)):
        options = ["-p", "bench.gpu_check.on_device", "--device", device]
        done = subprocess.run([*command, *options], cwd=ROOT, text=True, capture_output=True)
        assert done.returncode == code, done.stdout


def test_the_parts_of_a_file_are_the_file(tmp_path: Path) -> None:
    file = tmp_path / "test_some.py"
    file.write_text("".join(f"def test_{i}():\n    pass\n" for i in range(7)))
    options = ["-p", "bench.gpu_check.parts", "--part"]
    assert [test[-1] for test in collected(str(file), *options, "0/3")] == ["0", "3", "6"]
    assert [test[-1] for test in collected(str(file), *options, "2/3")] == ["2", "5"]
    programs = {s.name: s.programs for s in STEPS}["kernels/select"]
    assert [p[p.index("--part") + 1] for p in programs] == [f"{i}/{len(programs)}" for i in range(len(programs))]
