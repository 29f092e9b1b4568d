"""The defer and admit kernels against the reference, on every executor."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from cases import gibibytes, num_compiled
from hypothesis import given
from hypothesis import strategies as st
from tensors import padded
from torch import Tensor

from reroute_kernels import reference

KERNEL = "rows"
NAN = float("nan")
DTYPES = (torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)


def compact_rows(batch: list[list[int]], width: int, device: torch.device) -> Tensor:
    """Rows of the compact sequence."""
    return padded(batch, width=width, device=device, align="right")


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    values = torch.randint(-100, 100, shape)
    return (values > 0 if dtype == torch.bool else values).to(dtype).to(device)


def bits(tensor: Tensor) -> Tensor:
    """Bytes, so that NaN equals NaN and float8 can be compared."""
    return tensor.contiguous().view(torch.uint8) if tensor.numel() else tensor.new_empty(0, dtype=torch.uint8)


def agree(ops: Any, pages: Tensor, table: Tensor, rows: Tensor, hidden: Tensor, aux: list[Tensor]) -> None:
    """Both operations give what the reference gives, bit for bit, the untouched pool rows included."""
    expected = pages.clone()
    if pages.dtype == torch.float8_e4m3fn:  # torch cannot scatter it
        reference.defer(expected.view(torch.uint8), table, rows, hidden.view(torch.uint8))
    else:
        reference.defer(expected, table, rows, hidden)
    ops.defer(pages, table, rows, hidden)
    assert torch.equal(bits(pages), bits(expected))
    got = ops.admit(pages, table, rows, *aux)
    sources = [pages, *aux]
    if any(t.dtype == torch.float8_e4m3fn for t in sources):
        sources = [t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for t in sources]
    wanted = reference.admit(sources[0], table, rows, *sources[1:])
    for result, right, source in zip(got, wanted, [pages, *aux], strict=True):
        assert result.shape == right.shape
        assert result.dtype == source.dtype
        assert torch.equal(bits(result), bits(right))


@st.composite
def cases(draw_: Any) -> tuple[int, list[int], list[list[int]], int]:
    page = draw_(st.sampled_from([1, 3, 4]))
    table = draw_(st.permutations(range(6)))[: draw_(st.integers(0, 5))]
    batch = draw_(st.integers(1, 3))
    rows: list[list[int]] = [[] for _ in range(batch)]
    for row in sorted(draw_(st.sets(st.integers(0, page * len(table) - 1)))) if table else []:
        rows[row // page % batch].append(row)
    return page, table, rows, max(map(len, rows)) + draw_(st.integers(0, 2))


@given(case=cases(), width=st.sampled_from([1, 5, 8]), dtype=st.sampled_from(DTYPES), other=st.sampled_from(DTYPES))
def test_any_rows_pages_and_dtypes(
    ops: Any, device: torch.device, case: Any, width: int, dtype: torch.dtype, other: torch.dtype
) -> None:
    page, table, batch, length = case
    rows = compact_rows(batch, length, device)
    pages = draw((6, page, width), dtype, device)
    hidden = draw((*rows.shape, width), dtype, device)
    aux = [draw((len(table) * page, w), other, device) for w in (width, 0, 3)]
    agree(ops, pages, torch.tensor(table, dtype=torch.int64, device=device), rows, hidden, aux)


@pytest.mark.parametrize("width", [1, 3, 127, 129, 520, 1024])  # and whole blocks of units
@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float32])
def test_odd_widths(ops: Any, device: torch.device, width: int, dtype: torch.dtype) -> None:
    table = torch.tensor([2, 0], device=device)
    rows = compact_rows([[0, 1, 2, 6, 7], [3]], 6, device)
    pages, hidden = draw((3, 4, width), dtype, device), draw((2, 6, width), dtype, device)
    agree(ops, pages, table, rows, hidden, [draw((8, 2 * width + 1), dtype, device), draw((8, 1), torch.int64, device)])


def test_odd_addresses_and_strides(ops: Any, device: torch.device) -> None:
    table = torch.tensor([9, 2, 9, 0, 9], device=device)[1::2]
    rows = compact_rows([[0, 1, 2, 6, 7], [3]], 6, device).T.contiguous().T
    pages = draw((3 * 4 * 24 + 1,), torch.bfloat16, device)[1:].view(3, 4, 24)  # two bytes off
    hidden = draw((24, 2, 6), torch.bfloat16, device).permute(1, 2, 0)
    aux = [draw((1, 8), torch.float32, device).expand(8, 8), draw((5, 8), torch.int64, device).T]
    agree(ops, pages, table, rows, hidden, aux)
    hidden = draw((2 * 6 * 24 + 1,), torch.bfloat16, device)[1:].view(2, 6, 24)
    agree(ops, pages.clone(), table, rows, hidden, aux)


def test_addresses_that_change_from_launch_to_launch(ops: Any, device: torch.device) -> None:
    """What was compiled for multiples of 16 bytes must not run elsewhere, nor a count of 16 rows decide anything."""
    table, rows = torch.tensor([2, 0], device=device), compact_rows([[*range(8)], [*range(8, 16)]], 8, device)
    pages, hidden = (draw((n * 64 + 8,), torch.bfloat16, device) for n in (3 * 8, 16))
    for offset, length in ((0, 8), (4, 8), (1, 8), (0, 3), (0, 1), (4, 1)):
        here = pages[offset : offset + 3 * 8 * 64].view(3, 8, 64)
        compact = hidden[offset : offset + 2 * length * 64].view(2, length, 64)
        agree(ops, here, table, rows[:, :length], compact, [compact.view(-1, 64)[:1].expand(16, 64)])


def test_another_number_of_rows_compiles_nothing_anew(
    executor: Any, ops: Any, kernel: Any, device: torch.device
) -> None:
    """Nor where in one upload the index lists begin."""
    compiled = partial(num_compiled, executor, kernel._defer_kernel, kernel._admit_kernel)
    pages, companion = draw((4, 8, 16), torch.float32, device), draw((32, 4), torch.float32, device)
    counts = []
    for count, moved in ((3, 0), (16, 0), (1, 0), (3, 1), (16, 1)):
        lists = torch.arange(32, device=device)[moved:]
        table, rows = lists[:3], lists[4:][:count]
        assert rows.data_ptr() % 16 == 8 * moved
        agree(ops, pages, table, rows[None], draw((1, count, 16), torch.float32, device), [companion])
        counts.append(compiled())
    assert len(set(counts)) == 1


def test_pages_that_are_gibibytes_apart(executor: Any, ops: Any, device: torch.device) -> None:
    """No offset is counted in 32 bits."""
    page, width = 64, 129  # moved byte by byte
    far = 2**31 // (page * width)
    pages = gibibytes(executor, (far + 1) * page * width, torch.bool).view(-1, page, width)
    table, rows = torch.tensor([far, 0], device=device), compact_rows([[1, 63, 64], [70]], 3, device)
    hidden = draw((2, 3, width), torch.bool, device)
    ops.defer(pages, table, rows, hidden)
    assert torch.equal(pages[[far, far, 0, 0], [1, 63, 0, 6]], hidden[rows >= 0])
    (got,) = ops.admit(pages, table, rows)
    assert torch.equal(got[rows >= 0], hidden[rows >= 0])


@pytest.mark.parametrize("poison", [NAN, float("inf")])
def test_fillers_are_inert_under_poison(ops: Any, device: torch.device, poison: float) -> None:
    pages = torch.full((3, 2, 8), poison, device=device)
    table = torch.tensor([2, 0], device=device)
    rows = compact_rows([[0, 2], []], 3, device)
    hidden = torch.ones(2, 3, 8, device=device)
    hidden[rows < 0] = poison
    agree(ops, pages, table, rows, hidden, [torch.full((4, 2), poison, device=device)])
    assert pages.isfinite().all(-1).nonzero().tolist() == [[0, 0], [2, 0]]
    agree(ops, pages, table, torch.full_like(rows, -1), hidden, [])


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_nothing_to_move(ops: Any, device: torch.device, shape: tuple[int, int]) -> None:
    rows = torch.full(shape, -1, device=device)
    table = torch.empty(0, dtype=torch.int64, device=device)
    pages = torch.ones(0, 4, 8, device=device)
    agree(ops, pages, table, rows, torch.ones(*shape, 8, device=device), [torch.ones(0, 3, device=device)])


def test_contradictions_are_refused(ops: Any, device: torch.device) -> None:
    pages, table = torch.ones(2, 4, 8, device=device), torch.tensor([0, 1], device=device)
    rows = torch.zeros(1, 1, dtype=torch.int64, device=device)
    for hidden in (torch.ones(1, 1, 7), torch.ones(1, 2, 8), torch.ones(1, 1, 8).bfloat16()):
        with pytest.raises(ValueError, match="defer wants hidden of"):
            ops.defer(pages, table, rows, hidden.to(device))
    with pytest.raises(ValueError, match="contiguous pages"):
        ops.admit(pages.transpose(0, 1), table, rows)


@pytest.mark.parametrize(("features", "rot", "dtype"), [(3584, 128, torch.bfloat16), (2048, 64, torch.float32)])
def test_traffic_is_minimal(
    ops: Any, device: torch.device, launches: list[Any], features: int, rot: int, dtype: torch.dtype
) -> None:
    """One launch each, 2 % over the bytes that must move, and whole sectors."""
    torch.manual_seed(0)
    table = torch.tensor([3, 0, 2], device=device)
    kept = torch.randperm(192)[:40].sort().values.tolist()
    rows = compact_rows([kept[:25], kept[25:]], 25, device)
    pages = torch.randn(4, 64, features, device=device).to(dtype)
    cos, sin, ids = (draw((192, w), t, device) for w, t in ((rot, dtype), (rot, dtype), (3, torch.int64)))
    agree(ops, pages, table, rows, torch.randn(2, 25, features, device=device).to(dtype), [cos, sin, ids])
    assert [r.kernel for r in launches] == ["_defer_kernel", "_admit_kernel"]
    for report in launches:
        assert report.bytes_requested <= 1.02 * report.minimal_bytes
        assert report.global_load.efficiency >= 0.95
        assert report.global_store.efficiency >= 0.95
