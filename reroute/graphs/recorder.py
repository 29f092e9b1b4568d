"""What records a run on a device, to run it again: a CUDA graph. The one place where another may be put."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from ..errors import RerouteError

__all__ = ["RECORDERS", "CudaRecorder", "Recorder", "check_device"]

Run = Callable[[], None]


class Recorder(Protocol):
    """Records runs on one device; their temporary memory is shared, so one runs at a time."""

    def rehearse(self, run: Run) -> None:
        """Do ``run`` as it will be recorded: what is made on first use is made now."""

    def record(self, run: Run) -> Run:
        """What does again all that ``run`` asks the device for, on the same memory. Nothing else of it is done again.

        It is undefined what memory holds until that is called.
        """

    @property
    def nbytes(self) -> int:
        """Of the memory that all records share."""


class CudaRecorder:
    """CUDA graphs with one memory pool, of the GPU ``device``."""

    def __init__(self, device: torch.device) -> None:
        """Nothing is recorded yet."""
        self._device = device
        # A handle alone dies with the last graph of its pool: no other could be captured with it then.
        with torch.cuda.device(device):
            self._pool: Any = torch.cuda.MemPool()
        self._stream = torch.cuda.Stream(device)
        self._nbytes = 0

    def rehearse(self, run: Run) -> None:
        """See ``Recorder``."""
        caller = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            run()
        caller.wait_stream(self._stream)

    def record(self, run: Run) -> Run:
        """See ``Recorder``. Waits for the device. Other threads may go on meanwhile: what they do is not recorded."""
        graph, before = torch.cuda.CUDAGraph(), 0
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, pool=self._pool.id, stream=self._stream, capture_error_mode="thread_local"),
        ):
            before = torch.cuda.memory_reserved(self._device)
            run()
        self._nbytes += max(0, torch.cuda.memory_reserved(self._device) - before)
        return graph.replay

    @property
    def nbytes(self) -> int:
        """See ``Recorder``: by what PyTorch has reserved during captures."""
        return self._nbytes


RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}
"""By type of device. Where there is none, nothing is recorded."""


def check_device(device: torch.device) -> None:
    """RerouteError if no run is recorded on ``device``."""
    if device.type not in RECORDERS:
        raise RerouteError(
            f"graphs=True replays CUDA graphs, and the decoder is on {device.type}. Move the model to a GPU before "
            "reroute.enable, or leave graphs out: prefills are right without them."
        )
