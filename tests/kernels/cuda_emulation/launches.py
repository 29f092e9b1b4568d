"""Every launch over the emulated CUDA, bit by bit. test_launch_emulation.py runs this file in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from checks import Call, calls_of, check, checked, launched, run, run_cached
from emulation import Emulation
from torch import Tensor

from reroute_kernels.triton_kernels import launch
from reroute_kernels.triton_kernels.catalogue import CASES, Case
from reroute_kernels.triton_kernels.launch import SpecializedKernel

# --- the catalogue ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_launch_of_the_catalogue(gpu: Emulation, case: Case) -> None:
    calls = calls_of(case.launch)
    for call in calls:
        call[0]._compiled.clear()
        run(gpu, call)
        run_cached(gpu, call)
    with checked(gpu) as launches:
        case.launch()
    assert [launch.kernel.name for launch in launches] == [variant._kernel.__name__ for variant, *_ in calls]


def misaligned(tensor: Tensor) -> Tensor:
    """As large, at an address that is 8 modulo 16."""
    size = tensor.numel() * tensor.element_size()
    memory = torch.empty(size + 16, dtype=torch.uint8)
    start = (8 - memory.data_ptr()) % 16
    return memory[start : start + size].view(tensor.dtype).view(tensor.shape)


def changed(argument: Any, move: bool, integer: int | None) -> Any:
    """With its tensors elsewhere, or another integer for each of its integers."""
    if isinstance(argument, tuple):
        return tuple(changed(element, move, integer) for element in argument)
    if isinstance(argument, Tensor):
        return misaligned(argument) if move else argument
    return integer if integer is not None and type(argument) is int else argument


CHANGES = {
    "misaligned": (True, None),
    "odd": (False, 33),
    "one": (False, 1),
    "large": (False, 2**33),
    "large, odd and misaligned": (True, 2**33 + 1),
}
SLOW = ("large, odd and misaligned",)  # of what takes seconds to compile
CHANGED = {
    "defer, 7B bf16": CHANGES,
    "admit, 7B bf16": CHANGES,
    "restore, 7B bf16": CHANGES,
    "defer_rmsnorm, 7B bf16": CHANGES,
    "score_topk, Qwen3 8B": SLOW,
    "select, 576": SLOW,
}


@pytest.mark.parametrize("name", CHANGED)
def test_other_arguments_in_between(gpu: Emulation, name: str) -> None:
    (case,) = (case for case in CASES if case.name == name)
    variant, grid, arguments = call = calls_of(case.launch)[0]
    run(gpu, call)
    for change in CHANGED[name]:
        other = variant, grid, tuple(changed(argument, *CHANGES[change]) for argument in arguments)
        run(gpu, other)
        run_cached(gpu, call)
        run_cached(gpu, other)


# --- a kernel that takes all there is ------------------------------------------------------------


@triton.jit(do_not_specialize=["plain"], do_not_specialize_on_alignment=["table"])
def _takes_all(first, second, table, several, maybe, number, plain, scale, WIDTH: tl.constexpr, UNIT: tl.constexpr):
    """Its parameters are all there is to it."""


VARIANT = SpecializedKernel("test", _takes_all, {"WIDTH": 3, "UNIT": tl.int64}, num_warps=2)
GRID = 5, 3, 2
A, B, C, D = (torch.empty(64) for _ in range(4))
TABLE = torch.arange(4)
USUAL = {
    "first": A,
    "second": B,
    "table": TABLE,
    "several": (C, D),
    "maybe": None,
    "number": 48,
    "plain": 7,
    "scale": 0.3,
}
I32, I64 = 2**31, 2**63
NUMBERS = (0, 1, 17, -16, -17, I32 - 16, I32 - 1, I32, I32 + 1, -I32, -I32 - 16, 2**40, I64 - 1, I64)
UNUSUAL: list[dict[str, Any]] = [
    *({"first": tensor} for tensor in (misaligned(A), A.bfloat16(), TABLE)),
    *({"table": tensor} for tensor in (misaligned(TABLE), TABLE.int())),
    *({"several": tensors} for tensors in ((), (C,), (D, misaligned(C)), (misaligned(D), C), (C, D.half(), A))),
    {"several": (C, None, 5, 1, (16, 1.5, D))},
    *({"maybe": value} for value in (D, misaligned(D), 1, 2, 0.5, True)),
    *({"number": number} for number in NUMBERS),
    *({"plain": number} for number in NUMBERS),
    *({"scale": number} for number in (1.0, -0.0, 1e-6, 1, 3, None)),
]


def takes_all(**unusual: Any) -> Call:
    return VARIANT, GRID, tuple({**USUAL, **unusual}.values())


@pytest.fixture
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VARIANT, "_compiled", {})


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("unusual", UNUSUAL, ids=lambda unusual: next(iter(unusual)))
def test_any_argument(gpu: Emulation, unusual: dict[str, Any]) -> None:
    calls = takes_all(), takes_all(**unusual)
    for call in calls:
        run(gpu, call)
    for call in calls:
        run_cached(gpu, call)


@pytest.mark.usefixtures("_fresh")
def test_no_kernel_is_taken_for_arguments_of_another(gpu: Emulation) -> None:
    calls = [takes_all(**unusual) for unusual in UNUSUAL]
    for call in (*calls, *reversed(calls)):
        run(gpu, call)


@pytest.mark.usefixtures("_fresh")
def test_a_kernel_that_is_compiled_in_the_background(gpu: Emulation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of it, Triton hands out a promise."""
    caches = _takes_all.device_caches
    monkeypatch.setattr(_takes_all, "device_caches", type(caches)(caches.default_factory))
    call = takes_all()
    with ThreadPoolExecutor(1) as pool, triton.AsyncCompileMode(pool):
        check(launched(gpu, VARIANT, GRID, *call[2]), call)
        run_cached(gpu, call)
    run_cached(gpu, call)


# --- these checks can fail -----------------------------------------------------------------------

TAMPERED: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "first": (GRID, {"first": B, "second": A}),
    "several": (GRID, {"several": (D, C)}),
    "grid": ((3, 5, 2), {}),
    "number": (GRID, {"number": 64}),
    "plain": (GRID, {"plain": 8}),
    "scale": (GRID, {"scale": 0.30000004}),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_wrong_argument_is_noticed(gpu: Emulation, name: str) -> None:
    """As of a launcher that swaps pointers or axes, or takes another stride."""
    grid, other = TAMPERED[name]
    launch = launched(gpu, VARIANT, grid, *takes_all(**other)[2])
    with pytest.raises(AssertionError, match=name):
        check(launch, takes_all())


def blind(kind: type, look: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A key of arguments that looks at those of type ``kind`` in a way of its own."""
    real = launch._specialisation
    return lambda argument: look(argument) if isinstance(argument, kind) else real(argument)


BLIND: dict[str, tuple[Callable[[Any], Any], dict[str, Any], dict[str, Any]]] = {
    "alignment": (blind(Tensor, lambda a: a.dtype), {}, {"first": misaligned(A)}),
    "dtype": (blind(Tensor, lambda a: a.data_ptr() % 16), {}, {"first": A.bfloat16()}),
    "divisibility": (blind(int, lambda a: (a == 1, a >> 31)), {}, {"number": 17}),
    "one": (blind(int, lambda a: (a % 16 == 0, a >> 31)), {"number": 1}, {"number": 17}),
    "width": (blind(int, lambda a: (a % 16 == 0, a == 1)), {}, {"number": 2**40}),
    "None": (blind(object, lambda a: None), {}, {"maybe": D}),
}


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("name", BLIND)
def test_a_stale_kernel_is_noticed(gpu: Emulation, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    look, known, other = BLIND[name]
    monkeypatch.setattr(launch, "_specialisation", look)
    run(gpu, takes_all(**known))
    with pytest.raises((AssertionError, OverflowError)):  # the launcher of Triton 3.6 itself minds the width
        run(gpu, takes_all(**other))
