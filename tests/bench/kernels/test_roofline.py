from __future__ import annotations

import pytest
import torch

from bench.cases import MODELS, OPERATIONS, Case, Problem, problems
from bench.clock import Clock, HostClock
from bench.counts import ARCH, MISSING, simt_path
from bench.modelled import LAUNCHES, counted, distinct_bytes, floor_bytes, model
from reroute_kernels import Backend, reference

TORCH = Backend.of("torch", "test", reference)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_runs_and_has_a_model(operation: str) -> None:
    problem = Problem("Qwen2.5-VL-7B", 36, 2)
    OPERATIONS[operation](TORCH, Case(problem, torch.device("cpu"), torch.float32))
    result = model(operation, problem)
    assert result.bytes >= floor_bytes(operation, problem)
    assert result.floor < result.hidden < result.graph <= result.eager[0] <= result.eager[1]


def test_a_step_is_its_parts() -> None:
    problem, parts = Problem("LLaVA-1.5-7B", 576), ("defer_rmsnorm", "score_topk", "admit")
    for sizes in (distinct_bytes, floor_bytes):
        assert sizes("step", problem) == sum(sizes(part, problem) for part in parts)
    assert LAUNCHES["step"] == sum(LAUNCHES[part] for part in parts)


@pytest.mark.skipif(simt_path() is None, reason=MISSING)
@pytest.mark.parametrize(
    ("operation", "problem"),
    [
        *((name, Problem("Qwen2.5-VL-7B", 192)) for name in OPERATIONS),
        ("score_topk", Problem("Qwen2.5-VL-7B", 1536)),
        ("score_topk", Problem("LLaVA-1.5-7B", 192, 2)),
    ],
    ids=str,
)
def test_formulas_give_what_simt_counts(operation: str, problem: Problem) -> None:
    """Row copies exactly; scoring within 1 %; a bare selection, whose bytes hardly matter, within 15 %."""
    counts = counted(operation, problem)
    assert counts.launches == LAUNCHES[operation]
    tolerance = {"select": 0.15, "score_topk": 0.01, "step": 0.01}.get(operation, 0)
    assert distinct_bytes(operation, problem) == pytest.approx(counts.minimal, rel=tolerance)


@pytest.mark.skipif(simt_path() is None, reason=MISSING)
def test_what_simt_compiled_is_not_taken_for_machine_code() -> None:
    """Triton 3.6 would find it in the cache that both share."""
    from reroute_kernels import ops
    from reroute_kernels.triton_kernels.offline import compiling_for

    problem = Problem("Qwen2.5-VL-7B", 36)
    counted("defer", problem)
    with compiling_for(ARCH) as launches:
        OPERATIONS["defer"](Backend.of("triton", "test", ops), Case(problem, torch.device("cpu"), torch.bfloat16))
    assert launches[0].cubin.startswith(b"\x7fELF")


def test_problems_fit_the_memory() -> None:
    fitting = problems(1 << 30, 4)
    assert {p.model for p in fitting} == set(MODELS)
    assert all(p.memory(4) <= 1 << 30 for p in fitting)
    assert Problem("LLaVA-1.5-7B", 65536, 64) not in fitting


def test_clocks() -> None:
    ran: list[int] = []
    clock = HostClock()
    clock.run(lambda: ran.append(1))
    assert ran == [1]
    assert 0 < clock() == clock.seconds
    with pytest.raises(NotImplementedError):
        Clock().run(lambda: None)
