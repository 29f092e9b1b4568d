"""Clocks of one run of a function: of the host, or of a CUDA device with a cold L2 cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Clock", "DeviceClock", "HostClock", "captured"]

Run = Callable[[], Any]


class Clock:
    """A clock that stands still but for what ``run`` measures, so that pytest-benchmark can use it as a timer."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def run(self, function: Run) -> None:
        """Add what ``function`` takes."""
        self.seconds += self.measure(function)

    def measure(self, function: Run) -> float:
        """Seconds of one run."""
        raise NotImplementedError


class HostClock(Clock):
    """Wall clock, caches as they are."""

    def measure(self, function: Run) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start


class DeviceClock(Clock):
    """CUDA events around a run whose data are not in the L2 cache.

    The cache is flushed on the device, which gives the host a head start: launches count only where the device
    waits for them.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(2 * cache, dtype=torch.uint8, device=device)

    def measure(self, function: Run) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        start.record()
        function()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


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
