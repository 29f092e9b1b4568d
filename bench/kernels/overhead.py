"""Host time per call of the kernels: ``python -m bench.kernels.overhead``. Needs no GPU.

The driver's launch is stubbed out. Layer by layer: the bare Triton launch, the launcher around it, and the launcher as
an operator registered in each way that PyTorch has. The empty operators show what a registration costs by itself. Then
a whole routing step: the three operations as dispatched, and all that ``Prefill`` does at a routing layer but the
model's own projection; and both again without what Triton does for each launch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from reroute import Schedule
from reroute.core.home import PooledHome
from reroute.core.plan import make_plan
from reroute.core.prefill import PositionTables, Prefill
from reroute_kernels import AttentionSpec, Backend, PagedPool, RMSNorm, RopeTables, ops
from reroute_kernels.testing.cases import OPERATIONS, KernelCase, KernelInputs
from reroute_kernels.triton_kernels import rows
from reroute_kernels.triton_kernels.launch import SpecializedKernel
from reroute_kernels.triton_kernels.offline import compiling_for

BACKEND = Backend.of("triton", "measured", ops)
CASE = KernelCase("Qwen2.5-VL-7B", 576)
STAGES = 20
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


class Ready:
    """An adapter whose queries and keys are there already."""

    def __init__(self, inputs: KernelInputs) -> None:
        self._projected, self._norm = (inputs.query, inputs.keys), inputs.norm

    def input_norm(self, layer: int) -> RMSNorm:
        return self._norm

    def normalise(self, layer: int, rows: Tensor) -> Tensor:
        return self._norm(rows)

    def final_norm(self, rows: Tensor) -> Tensor:
        raise NotImplementedError("no ranker here asks for it")

    def check_final_norm(self) -> None:
        pass

    def project(self, layer: int, normed: Tensor, tables: RopeTables) -> tuple[Tensor, Tensor]:
        return self._projected

    project_own = project

    def agreeing(self, backend: Backend) -> Backend:
        return backend

    def key_weights(self, layer: int) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError("keys are there already")

    def attention_spec(self, layer: int) -> AttentionSpec:
        return AttentionSpec(0.1)

    def rotates(self, layer: int) -> bool:
        return True

    def rope_tables(self, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("positions are preserved here")


def prefill_step(inputs: KernelInputs, rounds: int = 100) -> tuple[float, float]:
    """Microseconds of ``Prefill.decide`` and ``advance`` per routing layer, and of making a ``Prefill``: the best."""
    case, visual = inputs.case, np.arange(inputs.case.length) < inputs.case.visual
    schedule = Schedule(tuple(range(1, STAGES + 1)), (1 / 3,) * STAGES)
    plan = make_plan(visual[None].astype(np.int64), np.ones((1, case.length), dtype=bool), [1], schedule, "route")
    assert plan is not None
    pool, adapter = PagedPool(case.shape.hidden, inputs.dtype, inputs.device), Ready(inputs)
    logical = torch.zeros(1, case.length, case.shape.hidden, dtype=inputs.dtype)
    cos = torch.zeros(1, case.length, case.shape.head_dim, dtype=inputs.dtype)
    tables = PositionTables(cos, cos.clone(), torch.arange(case.length)[None])
    steps, starts = [], []
    for _ in range(rounds):
        begin = time.perf_counter()
        prefill = Prefill(plan, PooledHome(plan, BACKEND, pool), adapter, tables)
        made = time.perf_counter()
        hidden = logical
        for decision in plan.decisions:
            hidden = prefill.advance(prefill.decide(decision, hidden), hidden)
        steps.append((time.perf_counter() - made) / STAGES)
        starts.append(made - begin)
        prefill.close()
    return min(steps) * 1e6, min(starts) * 1e6


def main() -> None:
    """Print the table."""
    pages, hidden = torch.zeros(8, 64, 3584, dtype=torch.bfloat16), torch.zeros(1, 256, 3584, dtype=torch.bfloat16)
    table, index = torch.arange(8), torch.arange(256)[None]
    cos = torch.zeros(512, 128, dtype=torch.bfloat16)
    aux = (cos, cos.clone(), torch.zeros(512, 1, dtype=torch.int64))
    arguments = pages, table, index, hidden
    width, unit = rows._units(pages.shape[2] * pages.element_size(), pages, hidden)
    variant = rows._specialized_defer(pages.shape[1], width, unit)
    options = {**variant.constants, "num_warps": rows.NUM_WARPS, "enable_fp_fusion": False}
    lines: list[tuple[str, float]] = []
    with torch.no_grad(), compiling_for(90):

        def note(name: str, call: Callable[[], object]) -> None:
            lines.append((name, best(call)))

        note("defer: Triton's own launch", lambda: rows._defer_kernel[(32, 7)](*arguments, 256, **options))
        note("defer: launch of a variant", lambda: variant((32, 7, 1), *arguments, 256))
        note("defer: launcher", lambda: rows.defer(*arguments))
        for name, call in registrations(launch, "launch").items():
            note(f"defer: {name}", partial(call, *arguments))
        for name, call in registrations(nothing, "nothing").items():
            note(f"empty: {name}", partial(call, *arguments))
        note("admit: launcher", lambda: rows.admit(pages, table, index, aux))
        note("admit: as dispatched", lambda: ops.admit(pages, table, index, *aux))
        note("defer: as dispatched", lambda: ops.defer(*arguments))
        inputs = KernelInputs(CASE, pages.device, pages.dtype)
        for name in ("defer_rmsnorm", "score_topk", "step"):
            note(f"{name}: as dispatched", partial(OPERATIONS[name], BACKEND, inputs))
        step, start = prefill_step(inputs)
        lines += [("prefill: decide, advance", step), ("prefill: begin", start)]
        with mock.patch.object(SpecializedKernel, "__call__", lambda *_: None):  # noqa: PT008 - a mock takes time itself
            note("step without launches", lambda: OPERATIONS["step"](BACKEND, inputs))
            lines.append(("decide, advance without", prefill_step(inputs)[0]))
    print(f"Microseconds per call on the host, launches stubbed out (torch {torch.__version__}):")
    for name, microseconds in lines:
        print(f"{name:28s}{microseconds:8.1f}")


if __name__ == "__main__":
    main()
