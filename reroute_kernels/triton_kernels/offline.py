"""Compile kernels without a GPU, exactly as their launchers would: a Triton driver that launches nothing.

Types, alignment, constants and warps come from the real launch, so nothing about them is written down twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver


@dataclass(frozen=True)
class Launch:
    """What would have run."""

    kernel: str
    grid: tuple[int, int, int]
    warps: int
    shared_bytes: int
    fp_fusion: bool
    cubin: bytes


@contextmanager
def compiling_for(arch: int) -> Iterator[list[Launch]]:
    """Launches inside the block compile for sm_``arch`` and take CPU tensors; they are listed, not run."""
    before, offline = getattr(driver, "_active", None), _driver(arch)
    offline.launches = []
    driver.set_active(offline)
    try:
        yield offline.launches
    finally:
        driver.set_active(before)


@cache
def _driver(arch: int) -> _OfflineDriver:
    # One for all time: the kernels that Triton keeps refer to it.
    return _OfflineDriver(arch)


class _OfflineDriver(DriverBase):  # type: ignore[misc]  # triton has no types
    """What Triton's JIT asks of a driver, and no more."""

    def __init__(self, arch: int) -> None:
        super().__init__()
        self._arch, self.utils = arch, self
        self.launches: list[Launch] = []

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(x: int, y: int, z: int, stream: int, cubin: bytes, *_: Any) -> None:
            chosen = metadata.num_warps, metadata.shared, metadata.enable_fp_fusion
            self.launches.append(Launch(metadata.name, (x, y, z), *chosen, cubin))

        return launch

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return object(), cubin, 0, 0, 1024  # module, function, registers, spills, threads: nothing reads them

    def unload_module(self, module: object) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 99 << 10}  # of sm_120, the smallest: what fits there fits everywhere

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        return self._arch  # a device of its own: Triton caches kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing runs here, so nothing can be timed")
