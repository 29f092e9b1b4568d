"""Host time per call of the kernels: ``python -m bench.overhead``. Needs no GPU, for launches are stubbed out.

Layer by layer: the bare Triton launch, the launcher around it, and the launcher as an operator registered in
each way that PyTorch has. The empty operators show what a registration costs by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from reroute_kernels import ops
from reroute_kernels.triton_kernels import rows
from reroute_kernels.triton_kernels.offline import compiling_for

SCHEMA = "(Tensor(a!) pages, Tensor table, Tensor rows, Tensor hidden) -> ()"
LIBRARY = torch.library.Library("overhead", "DEF")


def best(call: Callable[[], object], calls: int = 20, rounds: int = 100) -> float:
    """Microseconds per call in the fastest round: the least disturbed one."""
    call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append(time.perf_counter() - start)
    return min(times) / calls * 1e6


def nothing(pages: Tensor, table: Tensor, rows: Tensor, hidden: Tensor) -> None:
    """An operator that does nothing."""


def launch(pages: Tensor, table: Tensor, index: Tensor, hidden: Tensor) -> None:
    rows.defer(pages, table, index, hidden)


def registrations(run: Callable[..., None], name: str) -> dict[str, Callable[..., Any]]:
    """``run`` as an operator, in each way."""
    LIBRARY.define(name + SCHEMA)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    return {
        "Library.define": getattr(torch.ops.overhead, name).default,
        "custom_op": torch.library.custom_op(f"overhead::{name}_custom", run, mutates_args=("pages",)),
        "triton_op": torch.library.triton_op(f"overhead::{name}_triton", run, mutates_args=("pages",)),
    }


def main() -> None:
    """Print the table."""
    pages, hidden = torch.zeros(8, 64, 3584, dtype=torch.bfloat16), torch.zeros(1, 256, 3584, dtype=torch.bfloat16)
    table, index = torch.arange(8), torch.arange(256)[None]
    cos = torch.zeros(512, 128, dtype=torch.bfloat16)
    companions = (cos, cos.clone(), torch.zeros(512, 1, dtype=torch.int64))
    arguments = pages, table, index, hidden
    width, unit = rows._units(pages.shape[2] * pages.element_size(), pages, hidden)
    sizes = {"PAGE": 64, "WIDTH": width, "UNIT": unit, "ROWS": rows.ROWS, "BLOCK": rows.BLOCK, "WARPS": rows.WARPS}
    options = {"num_warps": rows.WARPS, "enable_fp_fusion": False}
    lines: list[tuple[str, float]] = []
    with torch.no_grad(), compiling_for(90):
        note = lambda name, call: lines.append((name, best(call)))
        note("defer: bare launch", lambda: rows._defer_kernel[(32, 7)](*arguments, 256, **sizes, **options))
        note("defer: launcher", lambda: rows.defer(*arguments))
        for name, call in registrations(launch, "launch").items():
            note(f"defer: {name}", lambda call=call: call(*arguments))
        for name, call in registrations(nothing, "nothing").items():
            note(f"empty: {name}", lambda call=call: call(*arguments))
        note("admit: launcher", lambda: rows.admit(pages, table, index, companions))
        note("admit: as dispatched", lambda: ops.admit(pages, table, index, *companions))
        note("defer: as dispatched", lambda: ops.defer(*arguments))
    print(f"Microseconds per call on the host, launches stubbed out (torch {torch.__version__}):")
    for name, microseconds in lines:
        print(f"{name:24s}{microseconds:8.1f}")


if __name__ == "__main__":
    main()
