"""The formulas against what simt counts."""

from __future__ import annotations

import pytest
import torch

from bench.kernels.roofline import counted, distinct_bytes, floor_bytes, kernel_time, num_launches
from reroute_kernels import Backend, reference
from reroute_kernels.testing.cases import MODELS, OPERATIONS, KernelCase, KernelInputs, kernel_cases
from reroute_kernels.testing.find_simt import MISSING, simt_path
from reroute_kernels.testing.traffic import ARCH

TORCH = Backend.of("torch", "test", reference)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_runs_and_has_a_model(operation: str) -> None:
    case = KernelCase("Qwen2.5-VL-7B", 36, 2)
    OPERATIONS[operation](TORCH, KernelInputs(case, torch.device("cpu"), torch.float32))
    result = kernel_time(operation, case)
    assert result.bytes >= floor_bytes(operation, case)
    assert result.floor < result.hidden < result.graph <= result.eager[0] <= result.eager[1]


def test_a_step_is_its_parts() -> None:
    case, parts = KernelCase("LLaVA-1.5-7B", 576), ("defer_rmsnorm", "score_topk", "admit")
    for sizes in (distinct_bytes, floor_bytes):
        assert sizes("step", case) == sum(sizes(part, case) for part in parts)
    assert num_launches("step", case) == sum(num_launches(part, case) for part in parts)


@pytest.mark.skipif(simt_path() is None, reason=MISSING)
@pytest.mark.parametrize(
    ("operation", "case"),
    [
        *((name, KernelCase("Qwen2.5-VL-7B", 192)) for name in OPERATIONS),
        ("score_topk", KernelCase("Qwen2.5-VL-7B", 1536)),
        ("score_topk", KernelCase("LLaVA-1.5-7B", 192, 2)),
    ],
    ids=str,
)
def test_formulas_give_what_simt_counts(operation: str, case: KernelCase) -> None:
    """Row copies exactly; scoring, diversity within 1 %; a bare selection, whose bytes hardly matter, within 15 %."""
    counts = counted(operation, case)
    assert counts.launches == num_launches(operation, case)
    tolerance = {"select": 0.15, "score_topk": 0.01, "diverse_topk": 0.01, "step": 0.01}.get(operation, 0)
    assert distinct_bytes(operation, case) == pytest.approx(counts.minimal, rel=tolerance)


@pytest.mark.skipif(simt_path() is None, reason=MISSING)
def test_what_simt_compiled_is_not_taken_for_machine_code() -> None:
    """Triton 3.6 would find it in the cache that both share."""
    from reroute_kernels import ops
    from reroute_kernels.triton_kernels.offline import compiling_for

    case = KernelCase("Qwen2.5-VL-7B", 36)
    counted("defer", case)
    with compiling_for(ARCH) as launches:
        OPERATIONS["defer"](Backend.of("triton", "test", ops), KernelInputs(case, torch.device("cpu"), torch.bfloat16))
    assert launches[0].cubin.startswith(b"\x7fELF")


def test_cases_fit_the_memory() -> None:
    fitting = kernel_cases(1 << 30, 4)
    assert {case.model for case in fitting} == set(MODELS)
    assert all(case.memory(4) <= 1 << 30 for case in fitting)
    assert KernelCase("LLaVA-1.5-7B", 65536, 64) not in fitting
