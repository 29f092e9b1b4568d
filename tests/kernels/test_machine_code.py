"""Budgets on what the compiler makes of the kernels, read from the binaries of four architectures."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace

import pytest

pytest.importorskip("triton")

import triton

from reroute_kernels.inspect import ARCHITECTURES, Facts, inspect
from reroute_kernels.triton_kernels.catalogue import CASES
from reroute_kernels.triton_kernels.offline import compiling_for


@dataclass(frozen=True)
class Budget:
    """At most, but for ``wide``: the fewest 16-byte loads and stores. ``narrow`` counts the other ones."""

    registers: int
    barriers: int
    instructions: int
    wide: int
    narrow: int
    occupancy: float = 0.75


# Of a row move: a whole tile is 4 loads and 4 stores of 16 bytes; narrow are the lease row, its page and a position id.
# Of a norm: rows and weight; narrow are the page id and the place.
# Of a score: keys, cos and sin are wide, but 8 rows of cos and sin are fewer than that; narrow are also counts and
# statistics. A selection moves 4-byte scores and keys and 8-byte indices, and its 16 warps can have 128 registers each.
# Of a diverse selection: rows, sums and tiles of rows are wide; narrow are row numbers, norms, scores and keys, and all
# that the picking program moves.
# Triton 3.7 to 3.9 differ by a few percent; the budgets hold for all of them.
DEFER = Budget(registers=40, barriers=3, instructions=170, wide=8, narrow=2, occupancy=1)
NORM = Budget(registers=56, barriers=3, instructions=210, wide=8, narrow=2, occupancy=0.5)
SCORE = Budget(registers=116, barriers=14, instructions=790, wide=22, narrow=6, occupancy=0.25)
SCORE_JOINED = Budget(registers=140, barriers=12, instructions=760, wide=19, narrow=8, occupancy=0.16)
SELECT = Budget(registers=118, barriers=42, instructions=1900, wide=4, narrow=71, occupancy=0.25)
ROW_NORMS = Budget(registers=96, barriers=7, instructions=760, wide=6, narrow=9, occupancy=0.25)
ROW_SUM = Budget(registers=50, barriers=5, instructions=250, wide=8, narrow=3, occupancy=0.5)
FIRST_PICK = Budget(registers=92, barriers=49, instructions=1420, wide=6, narrow=45, occupancy=0.25)
ROUND = Budget(registers=108, barriers=51, instructions=1430, wide=13, narrow=61, occupancy=0.25)
BUDGETS = {
    ("defer, 7B bf16", "_defer_kernel"): DEFER,
    ("defer, 7B fp32", "_defer_kernel"): DEFER,
    ("admit, 7B bf16", "_admit_kernel"): Budget(
        registers=40, barriers=4, instructions=290, wide=12, narrow=5, occupancy=1
    ),
    ("admit, 7B fp32", "_admit_kernel"): Budget(registers=48, barriers=12, instructions=390, wide=16, narrow=8),
    ("restore, 7B bf16", "_admit_kernel"): Budget(
        registers=40, barriers=3, instructions=180, wide=8, narrow=2, occupancy=1
    ),
    ("defer_rmsnorm, 7B bf16", "_defer_rmsnorm_kernel"): NORM,
    ("defer_rmsnorm, 72B bf16", "_defer_rmsnorm_kernel"): NORM,
    ("defer_rmsnorm, 7B fp32", "_defer_rmsnorm_kernel"): NORM,
    ("score_topk, Qwen 7B, 576", "_score_kernel"): SCORE,
    ("score_topk, Qwen 7B, 576", "_select_kernel"): SELECT,
    ("score_topk, Qwen 7B, 2304", "_score_kernel"): SCORE,
    ("score_topk, Qwen 7B, 2304", "_select_kernel"): replace(SELECT, registers=128, instructions=3470, narrow=129),
    ("score_topk, Qwen 7B, 16384", "_score_kernel"): SCORE,
    ("score_topk, Qwen 7B, 16384", "_select_kernel"): replace(
        SELECT, registers=108, barriers=80, instructions=3930, narrow=132
    ),
    ("score_topk, LLaVA 7B, 576", "_score_kernel"): SCORE_JOINED,
    ("score_topk, LLaVA 7B, 576", "_select_kernel"): SELECT,
    ("score_topk, Qwen 7B fp32", "_score_kernel"): Budget(
        registers=102, barriers=8, instructions=750, wide=16, narrow=7, occupancy=0.25
    ),
    ("score_topk, Qwen 7B fp32", "_select_kernel"): SELECT,
    ("score_topk, Qwen3 8B", "_score_kernel"): Budget(
        registers=118, barriers=12, instructions=860, wide=17, narrow=8, occupancy=0.25
    ),
    ("score_topk, Qwen3 8B", "_select_kernel"): SELECT,
    ("score_topk, 80 features", "_score_kernel"): SCORE_JOINED,
    ("score_topk, 80 features", "_select_kernel"): SELECT,
    ("score_topk, 256 features", "_score_kernel"): Budget(
        registers=128, barriers=28, instructions=1280, wide=19, narrow=8, occupancy=0.16
    ),
    ("score_topk, 256 features", "_select_kernel"): SELECT,
    ("select, 576", "_select_kernel"): replace(SELECT, registers=92, barriers=29, instructions=1410, wide=0, narrow=53),
    ("select, 16384", "_select_kernel"): replace(
        SELECT, registers=108, barriers=67, instructions=3420, wide=0, narrow=116
    ),
    ("diversity, 7B bf16, 576", "_diverse_norm_kernel"): ROW_NORMS,
    ("diversity, 7B bf16, 576", "_diverse_sum_kernel"): ROW_SUM,
    ("diversity, 7B bf16, 576", "_diverse_first_kernel"): FIRST_PICK,
    ("diversity, 7B bf16, 576", "_diverse_round_kernel"): ROUND,
    ("diversity, 7B bf16, 2304", "_diverse_norm_kernel"): ROW_NORMS,
    ("diversity, 7B bf16, 2304", "_diverse_sum_kernel"): ROW_SUM,
    ("diversity, 7B bf16, 2304", "_diverse_first_kernel"): replace(FIRST_PICK, instructions=1960, narrow=55),
    ("diversity, 7B bf16, 2304", "_diverse_round_kernel"): replace(ROUND, registers=120, instructions=2220, narrow=89),
    ("diversity, 72B bf16, 576", "_diverse_norm_kernel"): replace(ROW_NORMS, wide=8),
    ("diversity, 72B bf16, 576", "_diverse_sum_kernel"): ROW_SUM,
    ("diversity, 72B bf16, 576", "_diverse_first_kernel"): replace(FIRST_PICK, wide=8),
    ("diversity, 72B bf16, 576", "_diverse_round_kernel"): ROUND,
    ("diversity, 7B fp32, 576", "_diverse_norm_kernel"): replace(ROW_NORMS, wide=10),
    ("diversity, 7B fp32, 576", "_diverse_sum_kernel"): ROW_SUM,
    ("diversity, 7B fp32, 576", "_diverse_first_kernel"): replace(FIRST_PICK, wide=10),
    ("diversity, 7B fp32, 576", "_diverse_round_kernel"): replace(
        ROUND, registers=84, instructions=1460, wide=4, narrow=47
    ),
}

BUDGETS |= {(f"select, at most {n}", "_select_kernel"): BUDGETS[f"select, {n}", "_select_kernel"] for n in (576, 16384)}

# Triton 3.6 has a barrier for each tensor of a row move and reduction, and gives selections all registers there are.
SCORE_3_6 = Budget(registers=136, barriers=18, instructions=740, wide=19, narrow=6, occupancy=0.25)
SCORE_JOINED_3_6 = Budget(registers=128, barriers=14, instructions=680, wide=14, narrow=8, occupancy=0.25)
SELECT_3_6 = replace(SELECT, registers=128, instructions=1940)
BUDGETS_3_6 = BUDGETS | {
    ("defer, 7B bf16", "_defer_kernel"): replace(DEFER, barriers=6),
    ("defer, 7B fp32", "_defer_kernel"): replace(DEFER, barriers=6),
    ("admit, 7B bf16", "_admit_kernel"): Budget(
        registers=40, barriers=19, instructions=320, wide=12, narrow=5, occupancy=1
    ),
    ("admit, 7B fp32", "_admit_kernel"): Budget(registers=48, barriers=19, instructions=390, wide=16, narrow=8),
    ("restore, 7B bf16", "_admit_kernel"): Budget(
        registers=40, barriers=6, instructions=180, wide=8, narrow=2, occupancy=1
    ),
    ("score_topk, Qwen 7B, 576", "_score_kernel"): SCORE_3_6,
    ("score_topk, Qwen 7B, 576", "_select_kernel"): SELECT_3_6,
    ("score_topk, Qwen 7B, 2304", "_score_kernel"): SCORE_3_6,
    ("score_topk, Qwen 7B, 16384", "_score_kernel"): SCORE_3_6,
    ("score_topk, Qwen 7B, 16384", "_select_kernel"): replace(
        SELECT, registers=118, barriers=80, instructions=3930, narrow=132
    ),
    ("score_topk, LLaVA 7B, 576", "_score_kernel"): SCORE_JOINED_3_6,
    ("score_topk, LLaVA 7B, 576", "_select_kernel"): SELECT_3_6,
    ("score_topk, Qwen 7B fp32", "_score_kernel"): Budget(
        registers=128, barriers=14, instructions=790, wide=16, narrow=7, occupancy=0.25
    ),
    ("score_topk, Qwen 7B fp32", "_select_kernel"): SELECT_3_6,
    ("score_topk, Qwen3 8B", "_score_kernel"): Budget(
        registers=104, barriers=14, instructions=760, wide=12, narrow=8, occupancy=0.25
    ),
    ("score_topk, Qwen3 8B", "_select_kernel"): SELECT_3_6,
    ("score_topk, 80 features", "_score_kernel"): SCORE_JOINED_3_6,
    ("score_topk, 256 features", "_score_kernel"): Budget(
        registers=140, barriers=30, instructions=1160, wide=15, narrow=8, occupancy=0.16
    ),
}


# One budget holds for all of them: before a merge, later ones are held to it with the oldest Triton alone.
@pytest.mark.parametrize("arch", [pytest.param(a, marks=[pytest.mark.slow] * (a > 90)) for a in ARCHITECTURES])
@pytest.mark.parametrize("case", [case.name for case in CASES])
def test_budget(case: str, arch: int) -> None:
    """Every kernel that a case launches has a budget and keeps to it."""
    facts = [fact for fact in inspect(arch, case) if fact.case == case]
    budgets = BUDGETS_3_6 if triton.__version__.startswith("3.6.") else BUDGETS
    assert {(case, fact.kernel) for fact in facts} == {key for key in budgets if key[0] == case}
    for fact in facts:
        check(fact, budgets[case, fact.kernel])


def check(fact: Facts, budget: Budget) -> None:
    assert fact.spills == 0
    assert fact.registers <= budget.registers
    assert fact.barriers <= budget.barriers
    assert fact.instructions <= budget.instructions
    assert fact.wide >= budget.wide
    assert fact.narrow <= budget.narrow
    assert fact.occupancy >= budget.occupancy


def test_fp_fusion_is_off_by_choice() -> None:
    """Its default differs between releases of Triton, and it changes bits."""
    with compiling_for(90) as launches:
        for case in CASES:
            case.launch()
    assert len(launches) >= len(CASES)
    assert not any(launch.fp_fusion for launch in launches)


def test_the_command_prints_a_table() -> None:
    command = [sys.executable, "-m", "reroute_kernels.inspect", "--arch", "90", "--only", "defer"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[0].split()[:5] == ["case", "kernel", "arch", "registers", "spills"]
    assert len(lines) == 1 + sum("defer" in case.name for case in CASES)
