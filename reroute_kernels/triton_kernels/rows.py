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

from .launch import SpecializedKernel

BLOCK_ROWS = 8  # compact rows per program
BLOCK_UNITS = 128  # units per row and program: 1 KiB in the widest unit
NUM_WARPS = 4
_TILE = {"BLOCK_ROWS": BLOCK_ROWS, "BLOCK_UNITS": BLOCK_UNITS, "NUM_WARPS": NUM_WARPS}
# Fewer columns than this and Triton would have several threads ask for the same unit.
MIN_AUX_BLOCK = 32 * NUM_WARPS * 2 // BLOCK_ROWS

_UNITS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}
# A tensor of any other type travels as bytes: Triton has no pointers to it, or not on every architecture.
_PLAIN = {torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8}


@triton.jit
def _row_indices(
    rows_ptr, table_ptr, count, PAGE_SIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr, NUM_WARPS: tl.constexpr
):
    """Of this program's compact rows: compact indices, pool rows and pool slots; -1 for fillers and beyond the end.

    A vector of BLOCK_ROWS indices would be loaded by every thread of the program. So one thread in LANES loads one
    index and its page, and the maximum hands them to the others. Counting down keeps Triton from
    vectorising over rows, for which it would shuffle everything through shared memory twice more.
    """
    LANES: tl.constexpr = 32 * NUM_WARPS // BLOCK_ROWS
    compact_index = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + (BLOCK_ROWS - 1 - tl.arange(0, BLOCK_ROWS))
    mask_load = (compact_index < count)[:, None] & (tl.arange(0, LANES) == 0)[None, :]
    row_ptrs = rows_ptr + compact_index[:, None] + tl.zeros([1, LANES], tl.int32)
    pool_row = tl.load(row_ptrs, mask=mask_load, other=-1).to(tl.int64)  # [BLOCK_ROWS, LANES]
    page = tl.load(table_ptr + pool_row // PAGE_SIZE, mask=pool_row >= 0, other=0).to(tl.int64)  # [BLOCK_ROWS, LANES]
    slot = tl.where(pool_row >= 0, page * PAGE_SIZE + pool_row % PAGE_SIZE, -1)  # [BLOCK_ROWS, LANES]
    return compact_index, tl.max(pool_row, 1), tl.max(slot, 1)  # [BLOCK_ROWS] each


@triton.jit
def _tile(base_ptr, row, mask_rows, start, ROW_UNITS: tl.constexpr, UNIT: tl.constexpr, BLOCK_UNITS: tl.constexpr):
    """Pointers to units start..start+BLOCK_UNITS of each row [BLOCK_ROWS, BLOCK_UNITS], and which of them exist."""
    offs_u = start + tl.arange(0, BLOCK_UNITS)
    pointers = base_ptr.to(tl.pointer_type(UNIT)) + row[:, None] * ROW_UNITS + offs_u[None, :]
    return pointers, mask_rows[:, None] & (offs_u < ROW_UNITS)[None, :]


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["table_ptr", "rows_ptr"])
def _defer_kernel(
    pages_ptr,
    table_ptr,
    rows_ptr,
    hidden_ptr,
    count,
    PAGE_SIZE: tl.constexpr,
    ROW_UNITS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    NUM_WARPS: tl.constexpr,
):
    """Program (i, j) moves units j * BLOCK_UNITS... of the i-th BLOCK_ROWS compact rows."""
    compact_index, _, slot = _row_indices(rows_ptr, table_ptr, count, PAGE_SIZE, BLOCK_ROWS, NUM_WARPS)
    start, mask_rows = tl.program_id(1) * BLOCK_UNITS, slot >= 0
    source_ptrs, mask = _tile(hidden_ptr, compact_index, mask_rows, start, ROW_UNITS, UNIT, BLOCK_UNITS)
    target_ptrs, _ = _tile(pages_ptr, slot, mask_rows, start, ROW_UNITS, UNIT, BLOCK_UNITS)
    tl.store(target_ptrs, tl.load(source_ptrs, mask=mask), mask=mask)  # [BLOCK_ROWS, BLOCK_UNITS]


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["table_ptr", "rows_ptr"])
def _admit_kernel(
    pages_ptr,
    table_ptr,
    rows_ptr,
    hidden_ptr,
    aux_ptrs,
    aux_out_ptrs,
    count,
    PAGE_SIZE: tl.constexpr,
    ROW_UNITS: tl.constexpr,
    UNIT: tl.constexpr,
    AUX_ROW_UNITS: tl.constexpr,
    AUX_UNITS: tl.constexpr,
    AUX_BLOCK_UNITS: tl.constexpr,
    NUM_AUX_BLOCKS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    NUM_WARPS: tl.constexpr,
):
    """Program (i, j) moves units j * BLOCK_UNITS... of the i-th BLOCK_ROWS compact rows; the last j moves aux."""
    compact_index, pool_row, slot = _row_indices(rows_ptr, table_ptr, count, PAGE_SIZE, BLOCK_ROWS, NUM_WARPS)
    start, mask_rows = tl.program_id(1) * BLOCK_UNITS, compact_index < count
    if start < ROW_UNITS:
        source_ptrs, mask_source = _tile(pages_ptr, slot, slot >= 0, start, ROW_UNITS, UNIT, BLOCK_UNITS)
        target_ptrs, mask_target = _tile(hidden_ptr, compact_index, mask_rows, start, ROW_UNITS, UNIT, BLOCK_UNITS)
        tl.store(
            target_ptrs, tl.load(source_ptrs, mask=mask_source, other=0), mask=mask_target
        )  # [BLOCK_ROWS, BLOCK_UNITS]
    else:
        for block in range(NUM_AUX_BLOCKS):
            _gather(
                aux_ptrs,
                aux_out_ptrs,
                pool_row,
                compact_index,
                mask_rows,
                block * AUX_BLOCK_UNITS,
                AUX_ROW_UNITS,
                AUX_UNITS,
                AUX_BLOCK_UNITS,
            )


@triton.jit
def _gather(
    aux_ptrs,
    aux_out_ptrs,
    pool_row,
    compact_index,
    mask_rows,
    start,
    AUX_ROW_UNITS: tl.constexpr,
    AUX_UNITS: tl.constexpr,
    AUX_BLOCK_UNITS: tl.constexpr,
):
    """Units start..start+AUX_BLOCK_UNITS of every aux tensor. All loads come before the stores: one wait, not many."""
    values = ()
    for i in tl.static_range(len(aux_ptrs)):
        source_ptrs, mask_source = _tile(
            aux_ptrs[i], pool_row, pool_row >= 0, start, AUX_ROW_UNITS[i], AUX_UNITS[i], AUX_BLOCK_UNITS
        )  # [BLOCK_ROWS, AUX_BLOCK_UNITS]
        values = values + (tl.load(source_ptrs, mask=mask_source, other=0),)  # type: ignore[assignment]  # noqa: RUF005
    for i in tl.static_range(len(aux_ptrs)):
        target_ptrs, mask_target = _tile(
            aux_out_ptrs[i], compact_index, mask_rows, start, AUX_ROW_UNITS[i], AUX_UNITS[i], AUX_BLOCK_UNITS
        )
        tl.store(target_ptrs, values[i], mask=mask_target)


def defer(pages: Tensor, table: Tensor, rows: Tensor, hidden: Tensor) -> None:
    """``reroute_kernels.reference.defer`` in one launch. Raises what ``check_defer`` raises."""
    check_defer(pages, rows, hidden)
    features, count = pages.shape[2], rows.numel()
    if count == 0 or features == 0 or table.numel() == 0:
        return
    hidden = hidden.contiguous()
    row_units, unit = _units(features * pages.element_size(), pages, hidden)
    tensors = _plain(pages), table.contiguous(), rows.contiguous(), _plain(hidden)
    grid = -(-count // BLOCK_ROWS), -(-row_units // BLOCK_UNITS), 1
    _specialized_defer(pages.shape[1], row_units, unit)(grid, *tensors, count)


def check_defer(pages: Tensor, rows: Tensor, hidden: Tensor) -> None:
    """Check what ``defer`` gets, also where it is only traced. ValueError if shapes or dtypes disagree."""
    features = pages.shape[2]
    if hidden.shape != (*rows.shape, features) or hidden.dtype != pages.dtype or not pages.is_contiguous():
        raise ValueError(
            f"defer wants hidden of {(*rows.shape, features)} and {pages.dtype} for contiguous pages: got hidden of "
            f"{tuple(hidden.shape)} and {hidden.dtype}, pages of strides {pages.stride()}"
        )


def admit(pages: Tensor, table: Tensor, rows: Tensor, aux: Sequence[Tensor]) -> list[Tensor]:
    """``reroute_kernels.reference.admit`` in one launch, of any dtypes. Raises what ``check_admit`` raises."""
    check_admit(pages)
    (batch, length), features = rows.shape, pages.shape[2]
    hidden = pages.new_empty(batch, length, features)
    aux_out = [c.new_empty(batch, length, c.shape[1]) for c in aux]
    pairs = [(c.contiguous(), out) for c, out in zip(aux, aux_out, strict=True) if c.shape[1]]
    count = batch * length
    if count == 0 or not (features or pairs):
        return [hidden, *aux_out]
    row_units, unit = _units(features * pages.element_size(), pages, hidden)
    shapes = tuple([_units(source.shape[1] * source.element_size(), source, target) for source, target in pairs])
    tensors = _plain(pages), table.contiguous(), rows.contiguous(), _plain(hidden)
    sources, targets = (tuple([_plain(pair[i]) for pair in pairs]) for i in (0, 1))
    grid = -(-count // BLOCK_ROWS), -(-row_units // BLOCK_UNITS) + bool(pairs), 1
    _specialized_admit(pages.shape[1], row_units, unit, shapes)(grid, *tensors, sources, targets, count)
    return [hidden, *aux_out]


def check_admit(pages: Tensor) -> None:
    """Check what ``admit`` gets, also where it is only traced. ValueError for pages that are not contiguous."""
    if not pages.is_contiguous():
        raise ValueError(f"admit wants contiguous pages: got strides {pages.stride()}")


@lru_cache(maxsize=256)
def _specialized_defer(page_size: int, row_units: int, unit: int) -> SpecializedKernel:
    constants = {"PAGE_SIZE": page_size, "ROW_UNITS": row_units, "UNIT": _UNITS[unit], **_TILE}
    return SpecializedKernel("defer", _defer_kernel, constants, num_warps=NUM_WARPS, enable_fp_fusion=False)


@lru_cache(maxsize=256)
def _specialized_admit(
    page_size: int, row_units: int, unit: int, shapes: tuple[tuple[int, int], ...]
) -> SpecializedKernel:
    widest = max((w for w, _ in shapes), default=1)
    # One block width for all aux tensors, so that their rows are laid out over the threads once.
    aux_block = min(max(1 << (widest - 1).bit_length(), MIN_AUX_BLOCK), BLOCK_UNITS)
    constants = {
        "PAGE_SIZE": page_size,
        "ROW_UNITS": row_units,
        "UNIT": _UNITS[unit],
        "AUX_ROW_UNITS": tuple(w for w, _ in shapes),
        "AUX_UNITS": tuple(_UNITS[u] for _, u in shapes),
        "AUX_BLOCK_UNITS": aux_block,
        "NUM_AUX_BLOCKS": -(-widest // aux_block),
        **_TILE,
    }
    name = f"admit, with {len(shapes)} aux tensors" if shapes else "admit"
    return SpecializedKernel(name, _admit_kernel, constants, num_warps=NUM_WARPS, enable_fp_fusion=False)


def _units(size: int, source: Tensor, target: Tensor) -> tuple[int, int]:
    """Width of a row of ``size`` bytes in the widest unit that divides it and both addresses, and the unit's bytes."""
    bits = size | source.data_ptr() | target.data_ptr() | 8
    unit = bits & -bits
    return size // unit, unit


def _plain(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in _PLAIN else tensor.view(torch.uint8)
