"""Devices and streams over the emulated CUDA. test_launch_emulation.py runs this file in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import on_gpu
import pytest
import torch
import triton
import triton.language as tl
from cases import StageBoundary
from checks import checked, run
from emulation import Emulation

from reroute_kernels import Backend, BackendUnavailable, RMSNorm, dispatch, resolve
from reroute_kernels.triton_kernels.launch import SpecializedKernel


@triton.jit
def _takes_one(number, WIDTH: tl.constexpr):
    """Its parameter is all there is to it."""


@pytest.fixture(autouse=True)
def _first_gpu(gpu: Emulation, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(gpu, "streams", list(gpu.streams))
    yield
    gpu.use(0)


@pytest.fixture
def variant() -> SpecializedKernel:
    return SpecializedKernel("test", _takes_one, {"WIDTH": 3}, num_warps=1)


def test_a_launch_is_on_the_current_device_and_stream(gpu: Emulation, variant: SpecializedKernel) -> None:
    functions = set()
    for device, number in ((0, 0), (1, 0), (1, 1), (0, 1), (1, 0), (0, 0)):
        gpu.use(device)
        gpu.streams[device] = gpu.stream(device, number)
        launch = run(gpu, (variant, (1, 1, 1), (7,)))
        assert (launch.device, launch.stream) == (device, gpu.stream(device, number))
        functions.add((device, launch.function))
    assert len(functions) == 2  # each GPU has loaded its own


def test_cuda_refuses_what_is_of_another_device(gpu: Emulation, variant: SpecializedKernel) -> None:
    run(gpu, (variant, (1, 1, 1), (7,)))
    (((active, _, *rest), compiled),) = variant._compiled.items()
    variant._compiled[(active, 1, *rest)] = compiled
    gpu.use(1)
    with pytest.raises(RuntimeError, match="of another context"):
        variant((1, 1, 1), 7)
    gpu.use(0)
    gpu.streams[0] = gpu.stream(1)
    with pytest.raises(RuntimeError, match="of another context"):
        variant((1, 1, 1), 7)


def test_cuda_refuses_a_grid_that_is_too_large(gpu: Emulation, variant: SpecializedKernel) -> None:
    run(gpu, (variant, (2**31 - 1, 1, 1), (7,)))
    with pytest.raises(RuntimeError, match="invalid argument"):
        variant((1, 65536, 1), 7)


# --- operators and backends ----------------------------------------------------------------------


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """Triton, by the target of its own driver."""
    monkeypatch.delenv("REROUTE_BACKEND", raising=False)
    on_gpu.install(monkeypatch)
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    dispatch._resolve.cache_clear()
    yield resolve("auto", torch.device("cuda"))
    dispatch._resolve.cache_clear()


@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("device", [0, 1])
def test_operators_launch_where_their_tensors_are(gpu: Emulation, backend: Backend, device: int, current: int) -> None:
    """As of a model on the second GPU, while the first is the current one."""
    assert backend.name == "triton"
    gpu.use(current)
    boundary = StageBoundary(torch.device("cuda", device))
    lease: Any = SimpleNamespace(pages=boundary.pages, table=boundary.table)
    norm = RMSNorm(torch.ones(16, device=boundary.pages.device), 1e-6)
    with checked(gpu) as launches:
        boundary.step(backend, boundary.pages, boundary.hidden)
        backend.defer_rmsnorm(lease, boundary.rows, boundary.inverse, boundary.hidden, norm)
    diverse = "diverse_norm", "diverse_sum", "diverse_first", "diverse_round", "diverse_round", "select"
    names = "defer", "score", "select", "select", *diverse, "admit", "defer_rmsnorm"
    assert [launch.kernel.name for launch in launches] == [f"_{name}_kernel" for name in names]
    assert {(launch.device, launch.stream) for launch in launches} == {(device, gpu.streams[device])}
    assert gpu.device == current


def test_the_driver_says_what_the_gpu_is(gpu: Emulation, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend.reason == "tensors are on cuda"
    monkeypatch.setattr(gpu, "capability", (7, 5))
    dispatch._resolve.cache_clear()
    with pytest.raises(BackendUnavailable, match=r"needs compute capability 8.0 or newer and this is 7.5"):
        resolve("triton", torch.device("cuda"))
