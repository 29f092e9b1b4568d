"""What records a run on a device, to run it again: a CUDA graph. The one place where another may be put."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Protocol

import torch

from reroute_kernels.recorder import CudaRecorder

from ..errors import RerouteError

__all__ = ["RECORDERS", "Recorder", "check_device"]

Run = Callable[[], None]


class Recorder(Protocol):
    """Records runs on one device; their temporary memory is shared, so one runs at a time."""

    def rehearse(self, run: Run) -> None:
        """Do ``run`` as it will be recorded: what is made on first use is made now."""

    def record(self, run: Run) -> Run:
        """What does again all that ``run`` asks the device for, on the same memory. Nothing else of it is done again.

        It is undefined what memory holds until that is called.
        """

    def give_back(self) -> None:
        """Hold no memory. Nothing that was recorded may be left."""

    @property
    def nbytes(self) -> int:
        """Of the memory that all records share."""


RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}
"""By type of device. Where there is none, nothing is recorded."""


SPLIT = "max_split_size_mb"
"""A setting of PyTorch's allocator with which it gives back memory of a pool when it needs some, of graphs too."""


def check_device(device: torch.device) -> None:
    """RerouteError if no run is recorded on ``device``."""
    if device.type not in RECORDERS:
        raise RerouteError(
            f"graphs=True replays CUDA graphs, and the decoder is on {device.type}. Move the model to a GPU before "
            "reroute.enable, or leave graphs out: prefills are right without them."
        )
    if device.type != "cuda":
        return
    if any(SPLIT in os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
        raise RerouteError(
            f"graphs=True keeps memory of graphs in one pool of PyTorch's allocator, which may free it under {SPLIT}. "
            f"Take {SPLIT} out of PYTORCH_ALLOC_CONF, or leave graphs out."
        )
    if (backend := torch.cuda.get_allocator_backend()) != "native":
        raise RerouteError(
            f"graphs=True keeps its memory in a pool of PyTorch's own allocator, and PYTORCH_ALLOC_CONF asks for "
            f"{backend}. Take backend:{backend} out of it, or leave graphs out."
        )
