"""Ways to run the Triton kernels in a test process.

interpreter: Triton's own, repaired (interpreter.py). simt:80, simt:90: the compiled PTX, executed on the CPU
under several schedules with race, bounds and uninitialised-read checks. cuda: a GPU.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from reroute_kernels.testing.find_simt import MISSING, SIMT_CACHE, import_simt, simt_path

NAMES = ("interpreter", "simt:80", "simt:90", "cuda")
SCHEDULES = 2
"""Under how many schedules simt runs every launch, unless told otherwise; the outputs must agree bit for bit."""
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Executor:
    """How kernels run in this process."""

    name: str

    @property
    def kind(self) -> str:
        """interpreter, simt or cuda."""
        return self.name.partition(":")[0]

    @property
    def device(self) -> torch.device:
        """Where the tensors go."""
        return torch.device("cuda" if self.kind == "cuda" else "cpu")

    def start(self, schedules: int = SCHEDULES) -> None:
        """Make Triton use this executor, before anything imports triton; RuntimeError where it cannot.

        ``schedules``: of simt, which looks for races in each of them.
        """
        if (why := unavailable(self.name)) is not None:
            raise RuntimeError(why)
        if self.kind == "interpreter":
            if "triton" in sys.modules:
                raise RuntimeError("triton was imported before TRITON_INTERPRET could be set")
            os.environ["TRITON_INTERPRET"] = "1"
            import interpreter

            interpreter.repair()
        elif self.kind == "simt":
            os.environ.update(SIMT_CACHE)
            import_simt().install(arch=int(self.name.partition(":")[2]), seeds=tuple(range(schedules)))


def unavailable(name: str) -> str | None:
    """Why the executor ``name`` cannot run here."""
    if name.startswith("simt") and simt_path() is None:
        return MISSING
    if name == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA device"
    return None


@contextmanager
def poisoned(executor: Executor) -> Iterator[None]:
    """New memory holds NaN or the largest integer; under simt junk, and a kernel that reads it fails."""
    if executor.kind != "simt":
        torch.use_deterministic_algorithms(True, warn_only=True)  # which fills new memory
        yield
        torch.use_deterministic_algorithms(False)
        return
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(owner, name, _marked(getattr(owner, name)))
        yield


def _marked(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    import simt

    def run(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if type(tensor) is torch.Tensor and tensor.device.type == "cpu":
            simt.mark_uninit(tensor)
        return tensor

    return run
