"""The repairs to Triton's interpreter, without which bfloat16 results would mean nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def only_there(executor: Any) -> None:
    if executor.kind != "interpreter":
        pytest.skip("of the interpreter")


def test_bf16_arithmetic_and_casts_are_those_of_pytorch() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(a, b, out, sums, dots, exact, N: tl.constexpr):
        i = tl.arange(0, N)
        x, y = tl.load(a + i), tl.load(b + i)
        tl.store(out + i, x * y - x)
        tl.store(out + N + i, tl.where(x < y, x, y))
        tl.store(out + 2 * N + i, tl.load(exact + i))
        tl.store(sums, tl.sum(x, 0))
        tl.store(sums + 1, tl.max(x, 0))
        square = i[:, None] * 16 % N + tl.arange(0, 16)[None, :]
        u, v = tl.load(a + square), tl.load(b + square)
        tl.store(dots + i[:, None] * N + i[None, :], tl.dot(u, tl.trans(v)))

    n = 64
    torch.manual_seed(0)
    a, b = torch.randn(2, n).bfloat16()
    exact = torch.randn(n)
    out, sums, dots = torch.empty(3, n, dtype=torch.bfloat16), torch.empty(2), torch.empty(n, n)
    kernel[(1,)](a, b, out, sums, dots, exact, n)
    assert torch.equal(out, torch.stack((a * b - a, torch.minimum(a, b), exact.bfloat16())))
    assert sums.tolist() == [a.float().sum().bfloat16().item(), a.max().item()]
    square = torch.arange(n)[:, None] * 16 % n + torch.arange(16)
    assert torch.allclose(dots, a[square].float() @ b[square].float().T, atol=1e-5)


def test_sort_is_not_a_python_loop() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x, N: tl.constexpr):
        i = tl.arange(0, N)
        tl.store(x + i, tl.sort(tl.load(x + i)))

    x = torch.randperm(512, dtype=torch.int32)
    kernel[(1,)](x, 512)
    assert torch.equal(x, torch.arange(512, dtype=torch.int32))
