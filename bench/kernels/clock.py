"""Clocks of one run of a function: of the host, or of a CUDA device with a cold L2 cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

import torch

__all__ = ["Clock", "DeviceClock", "HostClock", "Mode"]

Run = Callable[[], Any]
Mode = Literal["eager", "graph"]


class Clock:
    """A clock that stands still but for what ``run`` measures, so that pytest-benchmark can use it as a timer."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def run(self, function: Run, mode: Mode = "eager") -> None:
        """Add what ``function`` takes, which launches or replays a graph of launches."""
        self.seconds += self.measure(function, mode)

    def measure(self, function: Run, mode: Mode) -> float:
        """Seconds of one run."""
        raise NotImplementedError


class HostClock(Clock):
    """Wall clock, caches as they are."""

    def measure(self, function: Run, mode: Mode) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start


class DeviceClock(Clock):
    """CUDA events around a run that finds neither its data in the L2 cache nor anything there to be written back.

    eager: the device is idle at the start, so this is what a caller sees, the larger of the host's time and the
    device's. graph: emptying the cache gives the host a head start, so this is the device's time alone.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        words = 2 * torch.cuda.get_device_properties(device).L2_cache_size // 8
        self._device = device
        self._written, self._read = (torch.zeros(words, dtype=torch.int64, device=device) for _ in range(2))

    def measure(self, function: Run, mode: Mode) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._written.zero_()
        self._read.sum()  # the lines just written would else be evicted, and paid for, by the run
        if mode == "eager":
            torch.cuda.synchronize(self._device)
        start.record()
        function()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
