"""Device time of the kernels of one run."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["OURS", "kernel_times", "profiled"]

OURS = (
    *("_defer_rmsnorm_kernel", "_score_kernel", "_select_kernel", "_admit_kernel", "_defer_kernel"),
    *("_diverse_norm_kernel", "_diverse_sum_kernel", "_diverse_first_kernel", "_diverse_round_kernel"),
)
"""The kernels of ``reroute_kernels``."""
LARGEST = 8  # kernels of others that are named
NAME = 80  # characters of a name: those of templates are long


def profiled(run: Callable[[], Any]) -> dict[str, Any]:
    """``kernel_times`` of one run."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return kernel_times(profiler.events())


def kernel_times(events: Iterable[Any]) -> dict[str, Any]:
    """What a profiler saw on the device, in microseconds: everything, each of our kernels, and the largest others.

    ``skipped`` says so if it saw nothing there.
    """
    times: defaultdict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.device_type.name == "CUDA":
            kernel = next((name for name in OURS if name in event.name), event.name)
            times[kernel].append(event.time_range.elapsed_us())
    total = sum(map(sum, times.values()))
    if not total:
        return {"skipped": "the profiler saw nothing on the device; it may not be permitted to"}
    ours = {name: _summary(times.pop(name)) for name in OURS if name in times}
    others = sorted(times.items(), key=lambda item: -sum(item[1]))[:LARGEST]
    return {
        "device_us": round(total, 1),
        "launches": sum(map(len, times.values())) + sum(kernel["launches"] for kernel in ours.values()),
        "share": round(sum(kernel["sum_us"] for kernel in ours.values()) / total, 4),
        "kernels": ours,
        "largest": {name[:NAME]: _summary(durations) for name, durations in others},
    }


def _summary(durations: list[float]) -> dict[str, Any]:
    return {
        "launches": len(durations),
        "median_us": round(statistics.median(durations), 2),
        "sum_us": round(sum(durations), 1),
    }
