"""A function as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["captured"]

Run = Callable[[], Any]


def captured(function: Run) -> Run:
    """``function`` as a CUDA graph: runs it once as a warm-up, captures it, and returns what replays it.

    What the captured run returned stays alive, as the graph writes to it.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = function()

    def replay() -> Any:
        graph.replay()
        return result

    return replay
