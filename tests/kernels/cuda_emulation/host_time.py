"""Host time of a launch over the emulated CUDA: ``python tests/kernels/cuda_emulation/host_time.py``.

All of the host path is Triton's own but the last call, into a driver that returns at once. Medians in microseconds,
of rounds that alternate, since other work on the machine comes and goes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from emulation import Emulation

sys.path.insert(0, str(Path(__file__).parents[3]))

from checks import calls_of

from reroute_kernels.triton_kernels.catalogue import CASES
from reroute_kernels.triton_kernels.launch import SpecializedKernel

NAMES = "defer, 7B bf16", "admit, 7B bf16", "defer_rmsnorm, 7B bf16", "score_topk, Qwen 7B, 576"
CALLS, ROUNDS = 50, 200


def microseconds(call: Callable[[], object]) -> float:
    start = time.thread_time()  # of this thread alone: other work on the machine does not count
    for _ in range(CALLS):
        call()
    return (time.thread_time() - start) / CALLS * 1e6


def compare(variant: SpecializedKernel, grid: tuple[int, int, int], *arguments: Any) -> str:
    """A line of the table."""
    keywords = {**variant.constants, **variant._options}
    own = lambda: variant._kernel[grid](*arguments, **keywords)
    short = lambda: variant(grid, *arguments)
    pairs = [(microseconds(own), microseconds(short)) for _ in range(ROUNDS)]
    first, second = (median(column) for column in zip(*pairs, strict=True))
    ratio = median(b / a for a, b in pairs)
    return f"{variant._kernel.__name__:24}{first:14.2f}{second:10.2f}{ratio:8.2f}"


def main() -> None:
    """Print the table."""
    gpu = Emulation()
    import triton

    print(f"triton {triton.__version__}, torch {torch.__version__}: microseconds on the host, median of {ROUNDS}")
    print(f"{'kernel':24}{'kernel[grid]':>14}{'variant':>10}{'ratio':>8}")
    calls = [call for case in CASES if case.name in NAMES for call in calls_of(case.launch)]
    gpu.recording(False)
    for variant, grid, arguments in calls:
        print(compare(variant, grid, *arguments))


if __name__ == "__main__":
    main()
