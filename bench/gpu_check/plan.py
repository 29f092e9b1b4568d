"""The steps of ``python -m bench.gpu_check``, those first that tell most for their time."""

from __future__ import annotations

import heapq
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = [
    "KERNELS",
    "MINUTES",
    "MOST_AT_ONCE",
    "RESERVE",
    "ROOT",
    "SANITIZED",
    "SMOKE",
    "STEPS",
    "Arguments",
    "Step",
    "batches",
    "chosen",
    "expected",
]

ROOT = Path(__file__).parents[2]
MINUTES = 9.0
RESERVE = 8.0  # seconds at the end for killing what still runs, and for the last results
MOST_AT_ONCE = 16  # programs that share the GPU, on as many cores

Arguments = tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """Programs that pass or fail together, side by side.

    estimate: seconds on an H100 with 16 cores. limit: seconds after which they are killed. least: seconds without
    which they do not begin. shares: other steps may use the GPU meanwhile. measures: the programs take ``--seconds``
    and ``--out``, keep to that time, and end with status 3 if more is left to measure. status: that of a program that
    passes, and evidence: a pattern that its output has if it did its work; excuse: one that it has where this machine
    cannot do it. output: the file that gets the output in place of the log.
    """

    name: str
    programs: tuple[Arguments, ...]
    estimate: float
    limit: float
    least: float
    shares: bool = False
    measures: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    status: int = 0
    evidence: str = ""
    excuse: str = ""
    output: str = ""


ON_CUDA = ("--executor", "cuda")
"""Of tests of kernels."""


def _module(name: str, *arguments: str) -> Arguments:
    return sys.executable, "-m", f"bench.gpu_check.{name}", *arguments


def _pytest(hangs_after: int, *arguments: str) -> Arguments:
    """Kernel tests on the device. A test that hangs shows where and ends its program; so do 20 failures."""
    options = ["-v", "--tb=short", "-rfE", "--durations=5", "--maxfail=20", "-p", "no:cacheprovider"]
    hanging = ["-o", f"faulthandler_timeout={hangs_after}", "-o", "faulthandler_exit_on_timeout=true"]
    return sys.executable, "-m", "pytest", *arguments, *options, *hanging


def _parts(parts: int) -> list[Arguments]:
    """Options of so many programs that run the tests of a file together."""
    if parts == 1:
        return [()]
    return [("-p", "bench.gpu_check.parts", "--part", f"{part}/{parts}") for part in range(parts)]


def _kernel_tests(name: str, estimate: float, parts: int = 1, group: str = "kernels", also: str = "") -> Step:
    """One file of kernel tests, in so many programs, or with another short one."""
    files = [f"tests/kernels/test_{file}.py" for file in (name, also) if file]
    programs = tuple(_pytest(60, *files, *ON_CUDA, *options) for options in _parts(parts))
    return Step(f"{group}/{name}", programs, estimate, limit=150, least=min(estimate, 30), shares=True)


def _model_tests(path: str, estimate: float, parts: int = 1) -> Step:
    """One file of tests of whole models, which run on the GPU though they name no device; graphs are CUDA graphs."""
    plugin = ("-p", "bench.gpu_check.on_device", "-m", "not slow")
    programs = tuple(_pytest(60, f"tests/{path}.py", *plugin, *options) for options in _parts(parts))
    name = f"models/{path.rpartition('test_')[2]}"
    return Step(name, programs, estimate, limit=150, least=min(estimate, 30), shares=True)


def _check(name: str, estimate: float = 30, *, shares: bool = True) -> Step:
    return Step(f"checks/{name}", (_module("checks", name),), estimate, limit=100, least=25, shares=shares)


def _prefills(model: str, estimate: float) -> Step:
    return Step(f"prefill/{model}", (_module("prefill", "--model", model),), estimate, 90, least=45, measures=True)


KERNELS = (
    *("_defer_kernel", "_admit_kernel", "_defer_rmsnorm_kernel", "_score_kernel", "_select_kernel"),
    *("_diverse_norm_kernel", "_diverse_sum_kernel", "_diverse_first_kernel", "_diverse_round_kernel"),
)
"""Names of the launches, for tools that would else look at those of PyTorch too."""
SANITIZED = (
    "few or page_tails or fillers or odd_addresses or (odd_widths and 127) or (broken and nan) or ragged_batches"
)
"""Few tests, of every kernel; ``few`` are values of a selection by one program, in stages, and refined."""


def _sanitizer(tool: str) -> Step:
    """A few tests under one tool of compute-sanitizer."""
    files = [("rows", "defer_rmsnorm"), ("score_topk",), ("select", "diverse_topk")]
    paths = [[f"tests/kernels/test_{name}.py" for name in names] for names in files]
    tests = [_pytest(100, *some, *ON_CUDA, "-k", SANITIZED, "-x") for some in paths]
    return _sanitized(tool, tool, tests, estimate=65, evidence="(ERROR|RACECHECK) SUMMARY: 0 ")


def _planted() -> Step:
    """A launch in which memcheck must find a fault: else what it finds elsewhere says nothing."""
    return _sanitized("planted", "memcheck", [_module("planted")], 35, "Invalid __global__ write", FOUND)


FOUND = 9  # exit status where a sanitizer found something


def _sanitized(
    name: str, tool: str, programs: Sequence[Arguments], estimate: float, evidence: str, status: int = 0
) -> Step:
    """Programs in which each tensor is an allocation of its own.

    The tool waits as long as the imports take until the first CUDA call, or it would let the program pass unseen.
    """
    run = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND), "--launch-timeout", "0"]
    run += ["--target-processes", "application-only", "--report-api-errors", "no", "--print-limit", "20"]
    run += [option for kernel in KERNELS for option in ("--kernel-name", f"kns={kernel}")]
    return Step(
        f"sanitizer/{name}",
        tuple((*run, *program) for program in programs),
        estimate,
        limit=120,
        least=min(estimate, 45),
        shares=True,
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        status=status,
        evidence=evidence,
        excuse="Device not supported",
    )


def _ncu() -> Step:
    """The launches of the smoke test."""
    sections = ("SpeedOfLight", "LaunchStats", "Occupancy", "WarpStateStats", "MemoryWorkloadAnalysis")
    names = "|".join(name.removeprefix("_") for name in KERNELS)
    run = ["ncu", "--clock-control", "none", "--target-processes", "application-only", "-c", "12"]
    run += ["-k", f"regex:^_({names})$", *(option for name in sections for option in ("--section", name))]
    return Step(
        "ncu",
        ((*run, *_module("smoke")),),
        estimate=35,
        limit=60,
        least=30,
        evidence=r"(?m)^  _score_kernel",
        excuse="ERR_NVGPUCTRPERM|LibraryNotLoaded",
        output="ncu.txt",
    )


STEPS = (
    Step("smoke", (_module("smoke"),), estimate=30, limit=90, least=0),
    _kernel_tests("select", 50, parts=2),
    _kernel_tests("score_topk", 50, parts=3, also="score_dtypes"),
    _kernel_tests("diverse_topk", 50),
    _kernel_tests("rows", 50, parts=2),
    _kernel_tests("defer_rmsnorm", 50),
    _kernel_tests("ops", 40, also="capacities"),
    _kernel_tests("routing", 30, also="replays"),
    _kernel_tests("pool", 20),
    _kernel_tests("load_kernels", 30, also="reference_sync"),
    _check("graph"),
    _check("no-waiting"),
    _check("static-steps", 60),
    _model_tests("routing/test_replayed_prefills", 60, parts=3),
    _model_tests("routing/test_replayed_caches", 60, parts=2),
    _model_tests("routing/test_replayed_static_caches", 50),
    _model_tests("routing/test_replayed_in_threads", 25),
    _model_tests("routing/test_replayed_changes", 20),
    _model_tests("routing/test_warm_up", 40),
    _model_tests("families/test_replayed_kinds", 60, parts=2),
    _model_tests("families/test_replayed_pictures", 50),
    _model_tests("routing/test_oracle", 50),
    _model_tests("routing/test_batch", 60, parts=2),
    _check("replays", 25, shares=False),  # it says how long they take
    _prefills("llava-7b", 90),
    _prefills("qwen-7b", 75),
    Step("operations", (_module("operations"),), estimate=50, limit=70, least=30, measures=True),
    _kernel_tests("stress", 40, group="streams"),
    _sanitizer("memcheck"),
    _sanitizer("racecheck"),
    _planted(),
    _ncu(),
    _prefills("qwen-32b", 45),
)
SMOKE = STEPS[0]


def chosen(names: Sequence[str]) -> list[Step]:
    """The smoke test, and the steps of these names or groups (``kernels`` of ``kernels/select``); all, if no names.

    ValueError lists what is known.
    """
    group_of = {step.name: step.name.partition("/")[0] for step in STEPS}
    if unknown := {*names} - group_of.keys() - {*group_of.values()}:
        known = ", ".join(dict.fromkeys((*group_of.values(), *group_of)))
        raise ValueError(f"no step is called {', '.join(sorted(unknown))}; known: {known}")
    return [step for step in STEPS if not names or step is SMOKE or {step.name, group_of[step.name]} & {*names}]


def batches(steps: Iterable[Step]) -> list[list[Step]]:
    """What runs at a time: one step, or consecutive ones that share the GPU."""
    found: list[list[Step]] = []
    for step in steps:
        if found and step.shares and found[-1][0].shares:
            found[-1].append(step)
        else:
            found.append([step])
    return found


def expected(steps: Iterable[Step], at_once: int) -> float:
    """Seconds by the estimates, where so many programs run at a time."""
    seconds = 0.0
    for batch in batches(steps):
        free_from = [0.0] * at_once
        for step in batch:
            for _ in step.programs:
                heapq.heapreplace(free_from, free_from[0] + step.estimate)
        seconds += max(free_from)
    return seconds
