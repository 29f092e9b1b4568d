"""Micro-benchmarks of the operations on shapes of real models: ``pytest bench/kernels [--all]``.

On CUDA both backends are measured in bf16, eagerly and as CUDA graphs (``clock.py``). Elsewhere the reference
is measured on the CPU in fp32, and the Triton kernels get the time that ``roofline.py`` gives them on an H100.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch

from reroute_kernels import resolve
from reroute_kernels.testing.cases import OPERATIONS, KernelCase, KernelInputs, kernel_cases
from reroute_kernels.testing.cuda_graph import captured
from reroute_kernels.testing.find_simt import simt_path

from .clock import Clock, DeviceClock, HostClock, Mode
from .roofline import AFFORDABLE, counted, kernel_time

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
MEMORY = 24 << 30 if CUDA else 1 << 30  # bytes: larger cases are left out
QUICK = {(576, 1), (2304, 1)} | ({(576, 4), (2304, 4), (16384, 1), (65536, 1)} if CUDA else set())
ROUNDS = 50 if CUDA else 5
CLOCK: Clock = DeviceClock(DEVICE) if CUDA else HostClock()
MODELLED = Clock()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    fitting = kernel_cases(MEMORY, DTYPE.itemsize)
    if not metafunc.config.getoption("--all"):
        fitting = [case for case in fitting if (case.visual, case.batch) in QUICK]
    metafunc.parametrize("case", fitting, ids=str)
    metafunc.parametrize("operation", OPERATIONS)


@lru_cache(maxsize=1)
def inputs_of(case: KernelCase) -> KernelInputs:
    return KernelInputs(case, DEVICE, DTYPE)


@pytest.mark.parametrize("mode", ["eager", "graph"] if CUDA else ["eager"])
@pytest.mark.parametrize("backend", ["torch", "triton"] if CUDA else ["torch"])
@pytest.mark.benchmark(timer=CLOCK)
@torch.no_grad()
def test_measured(
    benchmark: Any,
    case: KernelCase,
    operation: str,
    backend: str,
    mode: Mode,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("REROUTE_BACKEND", raising=False)
    kernels, inputs = resolve(backend, DEVICE), inputs_of(case)
    benchmark.group = f"{operation}, measured on {DEVICE.type}, {DTYPE}"
    expected = kernel_time(operation, case)
    modelled = {"eager": expected.eager[0], "graph": expected.graph}[mode] if backend == "triton" else None
    benchmark.extra_info |= {"floor": 1e6 * expected.floor, "modelled": modelled and 1e6 * modelled}
    run = lambda: OPERATIONS[operation](kernels, inputs)
    run = captured(run) if mode == "graph" else run
    benchmark.pedantic(lambda: CLOCK.run(run, mode), rounds=ROUNDS, warmup_rounds=2)


@pytest.mark.skipif(CUDA, reason="a GPU measures instead")
@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.benchmark(timer=MODELLED)
def test_modelled(benchmark: Any, case: KernelCase, operation: str, mode: str) -> None:
    result = kernel_time(operation, case)
    benchmark.group = f"{operation}, triton, MODELLED for an H100 (bytes and launches), not measured"
    benchmark.extra_info |= {"modelled": True, "launches": result.launches, "bytes": result.bytes}
    seconds = result.graph if mode == "graph" else result.eager[0]

    def pass_modelled_time() -> None:
        MODELLED.seconds += seconds

    benchmark.pedantic(pass_modelled_time, rounds=1)


@pytest.mark.skipif(CUDA, reason="a GPU measures instead")
@pytest.mark.skipif(simt_path() is None, reason="simt is not here to count")
def test_counted(operation: str, case: KernelCase, record_property: Any) -> None:
    """What simt counts, in the properties of ``--junit-xml`` and printed with ``-rP``."""
    if case.visual > AFFORDABLE or case.batch > 1:
        pytest.skip("too large to execute on the CPU")
    counts = counted(operation, case)
    print(counts)
    record_property("counts", str(counts))
    assert counts.launches == kernel_time(operation, case).launches
