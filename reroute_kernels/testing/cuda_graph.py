"""A function as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..recorder import CudaRecorder

__all__ = ["captured"]

Run = Callable[[], Any]


def captured(function: Run) -> Run:
    """``function`` as a CUDA graph: runs it once as a warm-up, captures it, and returns what replays it.

    What the captured run returned stays alive, as the graph writes to it.
    """
    recorder = CudaRecorder(torch.device("cuda", torch.cuda.current_device()))
    results: list[Any] = []
    recorder.rehearse(lambda: results.append(function()))
    results.clear()
    replay = recorder.record(lambda: results.append(function()))

    def replayed() -> Any:
        replay()
        return results[0]

    return replayed
