"""What ``bench.gpu_check.operations`` measures: the operations with a cold L2 cache, and what to hold them against.

Beside both backends: torch.topk and a sort, a copy of as many bytes as the floor of a step, and graphs of launches
that do nothing, whose time is in every other graph too. Times are microseconds.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from reroute_kernels import resolve
from reroute_kernels.testing.cases import OPERATIONS, KernelCase, KernelInputs
from reroute_kernels.testing.cuda_graph import captured

from ..end_to_end.interleaved import Spread
from ..kernels.clock import Clock, DeviceClock, HostClock, Mode
from ..kernels.roofline import BANDWIDTH, kernel_time
from .day import FAILED, PASSED, UNFINISHED
from .record import read_lines

__all__ = ["Key", "keys", "measure"]

CASES = (
    *(KernelCase("LLaVA-1.5-7B", 576), KernelCase("Qwen2.5-VL-7B", 16384)),
    *(KernelCase("LLaVA-1.5-7B", 2880), KernelCase("Qwen2.5-VL-7B", 576)),
    *(KernelCase("LLaVA-1.5-7B", 16384), KernelCase("Qwen2.5-VL-7B", 2304)),
    *(KernelCase("LLaVA-1.5-7B", 576, 16), KernelCase("Qwen2.5-VL-7B", 16384, 4)),
    *(KernelCase("Qwen2.5-VL-72B", 16384), KernelCase("Qwen2.5-VL-7B", 65536)),
)
"""The most telling first."""
ORDER = ("step", "score_topk", "defer_rmsnorm", "select", "diverse_topk", "admit", "restore", "defer")
EMPTY = {"1 empty launch": 1, "4 empty launches": 4}
TOPK, COPY = "torch.topk, sort", "copy of a step's floor"
ROUNDS = {"graph": 30, "eager": 15}
ROOM = 4.0  # seconds without which no measurement begins: it may have to compile
ON_CPU = 64 << 20  # bytes of the largest inputs where there is no GPU


@dataclass(frozen=True)
class Key:
    """What tells one measurement from all others. ``problem`` is empty where there is none."""

    kind: str
    operation: str
    problem: str
    backend: str
    mode: Mode


def keys(device: torch.device) -> list[Key]:
    """All measurements, in their order."""
    cuda = device.type == "cuda"
    modes: tuple[Mode, ...] = ("graph", "eager") if cuda else ("eager",)
    backends = ("triton", "torch") if cuda else ("torch",)
    every = [(name, "", "torch") for name in EMPTY]
    for case in CASES:
        if cuda or case.memory(4) <= ON_CPU:
            every += [(name, str(case), backend) for name in ORDER for backend in backends]
            every += [(name, str(case), "torch") for name in (TOPK, COPY)]
    return [Key("operation", *of, mode) for of in every for mode in modes]


def measure(device_name: str, file: Path, end: float) -> int:
    """Add lines to ``file`` until all is measured or ``time.monotonic()`` is at ``end``; the exit status."""
    device = torch.device(device_name)
    state = {_key(line): "error" in line for line in read_lines(file) if line.get("kind") == "operation"}
    todo = [key for key in keys(device) if state.get(key, True)]
    todo.sort(key=lambda key: key in state)  # what failed before comes last: it may break the device once more
    failed = 0
    for i, key in enumerate(todo):
        if time.monotonic() + ROOM > end:
            print(f"out of time: {len(todo) - i} more to measure")
            return FAILED if failed else UNFINISHED
        values = _measured(key, device)
        failed += "error" in values
        with file.open("a") as lines:
            lines.write(json.dumps({**asdict(key), **values}) + "\n")
        print(*asdict(key).values(), values.get("error") or f"{values['median_us']:.1f} µs", flush=True)
        if "error" in values and not _is_alive(device):
            print("the device takes no more work from this program")
            return FAILED
    print(f"{len(todo)} measured, {failed} of them with an error")
    return FAILED if failed else PASSED


def _key(line: dict[str, Any]) -> Key:
    return Key(**{name: line.get(name) for name in Key.__dataclass_fields__})  # type: ignore[arg-type]


@torch.no_grad()
def _measured(key: Key, device: torch.device) -> dict[str, Any]:
    """Microseconds: the median and fifths, beside what is modelled; or the error."""
    try:
        run = _run_of(key, device)
        run = captured(run) if key.mode == "graph" else run
        clock = _clock(device)
        samples = [1e6 * clock.measure(run, key.mode) for _ in range(3 + ROUNDS[key.mode])][3:]
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    return {**{f"{name}_us": value for name, value in asdict(Spread.of(samples)).items()}, **_modelled(key)}


def _run_of(key: Key, device: torch.device) -> Callable[[], Any]:
    if key.operation in EMPTY:
        one = torch.zeros(1, device=device)
        return lambda: [one.add_(1) for _ in range(EMPTY[key.operation])]
    case = _case(key)
    inputs = _inputs(case, device)
    if key.operation == TOPK:
        return lambda: inputs.scores.topk(case.kept).indices.sort(-1)
    if key.operation == COPY:
        source = torch.empty(round(kernel_time("step", case).floor * BANDWIDTH / 2), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)
    kernels = resolve(key.backend, device)
    return lambda: OPERATIONS[key.operation](kernels, inputs)


def _modelled(key: Key) -> dict[str, float]:
    """Microseconds of the Triton kernels on an H100 by formula; floor is that of any implementation."""
    if key.operation not in OPERATIONS:
        return {}
    result = kernel_time(key.operation, _case(key))
    values = {"floor_us": result.floor}
    if key.backend == "triton":
        values |= {"hidden_us": result.hidden, "modelled_us": result.graph if key.mode == "graph" else result.eager[0]}
    return {name: 1e6 * seconds for name, seconds in values.items()}


def _case(key: Key) -> KernelCase:
    return next(case for case in CASES if str(case) == key.problem)


@lru_cache(maxsize=1)
def _inputs(case: KernelCase, device: torch.device) -> KernelInputs:
    return KernelInputs(case, device, torch.bfloat16 if device.type == "cuda" else torch.float32)


@lru_cache(maxsize=1)
def _clock(device: torch.device) -> Clock:
    return DeviceClock(device) if device.type == "cuda" else HostClock()


def _is_alive(device: torch.device) -> bool:
    """Whether an error was not one that the CUDA context keeps."""
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return False
    return True
