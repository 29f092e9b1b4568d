"""Defer and admit: whole rows between the paged pool and a compact sequence, in one launch each.

Rows are moved as integers of the widest unit that their width and address allow. The fast path, 16 bytes
per access, takes contiguous tensors that begin at a multiple of 16 bytes and rows whose width is one;
everything else is right but slower: narrower rows or odd addresses move in units of 8, 4, 2 or 1 bytes, and
tensors that are not contiguous are copied first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from reroute_kernels.triton_kernels._common import Variant

ROWS = 8  # compact rows per program
BLOCK = 128  # units per row and program: 1 KiB in the widest unit
WARPS = 4
_SHAPE = {"ROWS": ROWS, "BLOCK": BLOCK, "WARPS": WARPS}
# Fewer columns than this and Triton would have several threads ask for the same unit.
NARROW = 32 * WARPS * 2 // ROWS

_UNITS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}
# A tensor of any other type travels as bytes: Triton has no pointers to it, or not on every architecture.
_PLAIN = {torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8}


@triton.jit
def _places(rows, table, count, PAGE: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr):
    """Of this program's compact rows: their numbers, lease rows and pool slots; -1 for fillers and beyond the end.

    A vector of ROWS indices would be loaded by every thread of the program. So one thread in LANES loads one
    index and its page, and the maximum hands them to the others. Counting down keeps Triton from
    vectorising over rows, for which it would shuffle everything through shared memory twice more.
    """
    LANES: tl.constexpr = 32 * WARPS // ROWS
    number = tl.program_id(0).to(tl.int64) * ROWS + (ROWS - 1 - tl.arange(0, ROWS))
    asks = (number < count)[:, None] & (tl.arange(0, LANES) == 0)[None, :]
    row = tl.load(rows + number[:, None] + tl.zeros([1, LANES], tl.int32), mask=asks, other=-1).to(tl.int64)
    page = tl.load(table + row // PAGE, mask=row >= 0, other=0).to(tl.int64)
    slot = tl.where(row >= 0, page * PAGE + row % PAGE, -1)
    return number, tl.max(row, 1), tl.max(slot, 1)


@triton.jit
def _tile(memory, row, valid, first, WIDTH: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers to units first..first+BLOCK of each row, and which of them exist."""
    column = first + tl.arange(0, BLOCK)
    pointers = memory.to(tl.pointer_type(UNIT)) + row[:, None] * WIDTH + column[None, :]
    return pointers, valid[:, None] & (column < WIDTH)[None, :]


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["table", "rows"])
def _defer_kernel(
    pages,
    table,
    rows,
    hidden,
    count,
    PAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Program (i, j) moves units j * BLOCK... of the i-th ROWS compact rows."""
    number, _, slot = _places(rows, table, count, PAGE, ROWS, WARPS)
    first, real = tl.program_id(1) * BLOCK, slot >= 0
    source, mask = _tile(hidden, number, real, first, WIDTH, UNIT, BLOCK)
    target, _ = _tile(pages, slot, real, first, WIDTH, UNIT, BLOCK)
    tl.store(target, tl.load(source, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["table", "rows"])
def _admit_kernel(
    pages,
    table,
    rows,
    hidden,
    companions,
    gathered,
    count,
    PAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    WIDTHS: tl.constexpr,
    UNITS: tl.constexpr,
    SPAN: tl.constexpr,
    TURNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Program (i, j) moves units j * BLOCK... of the i-th ROWS compact rows; the last j moves all companions."""
    number, row, slot = _places(rows, table, count, PAGE, ROWS, WARPS)
    first, inside = tl.program_id(1) * BLOCK, number < count
    if first < WIDTH:
        source, exists = _tile(pages, slot, slot >= 0, first, WIDTH, UNIT, BLOCK)
        target, wanted = _tile(hidden, number, inside, first, WIDTH, UNIT, BLOCK)
        tl.store(target, tl.load(source, mask=exists, other=0), mask=wanted)
    else:
        for turn in range(TURNS):
            _gather(companions, gathered, row, number, inside, turn * SPAN, WIDTHS, UNITS, SPAN)


@triton.jit
def _gather(
    companions, gathered, row, number, inside, first, WIDTHS: tl.constexpr, UNITS: tl.constexpr, SPAN: tl.constexpr
):
    """Units first..first+SPAN of every companion. All loads come before the stores: one wait for memory, not many."""
    values = ()
    for i in tl.static_range(len(companions)):
        source, exists = _tile(companions[i], row, row >= 0, first, WIDTHS[i], UNITS[i], SPAN)
        values = values + (tl.load(source, mask=exists, other=0),)  # type: ignore[assignment]  # noqa: RUF005
    for i in tl.static_range(len(companions)):
        target, wanted = _tile(gathered[i], number, inside, first, WIDTHS[i], UNITS[i], SPAN)
        tl.store(target, values[i], mask=wanted)


def defer(pages: Tensor, table: Tensor, rows: Tensor, hidden: Tensor) -> None:
    """:func:`reroute_kernels.reference.defer` in one launch. ValueError if shapes or dtypes disagree."""
    features, count = pages.shape[2], rows.numel()
    if hidden.shape != (*rows.shape, features) or hidden.dtype != pages.dtype or not pages.is_contiguous():
        raise ValueError(
            f"defer wants hidden of {(*rows.shape, features)} and {pages.dtype} for contiguous pages: got hidden of "
            f"{tuple(hidden.shape)} and {hidden.dtype}, pages of strides {pages.stride()}"
        )
    if count == 0 or features == 0 or table.numel() == 0:
        return
    hidden = hidden.contiguous()
    width, unit = _units(features * pages.element_size(), pages, hidden)
    tensors = _plain(pages), table.contiguous(), rows.contiguous(), _plain(hidden)
    grid = -(-count // ROWS), -(-width // BLOCK), 1
    _defer_variant(pages.shape[1], width, unit)(grid, *tensors, count)


def admit(pages: Tensor, table: Tensor, rows: Tensor, companions: Sequence[Tensor]) -> list[Tensor]:
    """:func:`reroute_kernels.reference.admit` in one launch. ValueError for pages that are not contiguous."""
    if not pages.is_contiguous():
        raise ValueError(f"admit wants contiguous pages: got strides {pages.stride()}")
    (batch, length), features = rows.shape, pages.shape[2]
    hidden = pages.new_empty(batch, length, features)
    gathered = [c.new_empty(batch, length, c.shape[1]) for c in companions]
    pairs = [(c.contiguous(), out) for c, out in zip(companions, gathered, strict=True) if c.shape[1]]
    count = batch * length
    if count == 0 or not (features or pairs):
        return [hidden, *gathered]
    width, unit = _units(features * pages.element_size(), pages, hidden)
    shapes = tuple([_units(source.shape[1] * source.element_size(), source, target) for source, target in pairs])
    tensors = _plain(pages), table.contiguous(), rows.contiguous(), _plain(hidden)
    sources, targets = (tuple([_plain(pair[i]) for pair in pairs]) for i in (0, 1))
    grid = -(-count // ROWS), -(-width // BLOCK) + bool(pairs), 1
    _admit_variant(pages.shape[1], width, unit, shapes)(grid, *tensors, sources, targets, count)
    return [hidden, *gathered]


@lru_cache(maxsize=256)
def _defer_variant(page: int, width: int, unit: int) -> Variant:
    constants = {"PAGE": page, "WIDTH": width, "UNIT": _UNITS[unit], **_SHAPE}
    return Variant("defer", _defer_kernel, constants, num_warps=WARPS, enable_fp_fusion=False)


@lru_cache(maxsize=256)
def _admit_variant(page: int, width: int, unit: int, shapes: tuple[tuple[int, int], ...]) -> Variant:
    widest = max((w for w, _ in shapes), default=1)
    # One span for all companions, so that their rows are laid out over the threads once.
    span = min(max(1 << (widest - 1).bit_length(), NARROW), BLOCK)
    constants = {
        "PAGE": page,
        "WIDTH": width,
        "UNIT": _UNITS[unit],
        "WIDTHS": tuple(w for w, _ in shapes),
        "UNITS": tuple(_UNITS[u] for _, u in shapes),
        "SPAN": span,
        "TURNS": -(-widest // span),
        **_SHAPE,
    }
    name = f"admit, with {len(shapes)} companions" if shapes else "admit"
    return Variant(name, _admit_kernel, constants, num_warps=WARPS, enable_fp_fusion=False)


def _units(size: int, source: Tensor, target: Tensor) -> tuple[int, int]:
    """Width of a row of ``size`` bytes in the widest unit that divides it and both addresses, and the unit's bytes."""
    bits = size | source.data_ptr() | target.data_ptr() | 8
    unit = bits & -bits
    return size // unit, unit


def _plain(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in _PLAIN else tensor.view(torch.uint8)
