"""What a selection writes, inside a kernel, for a chunk of candidates: kept indices, active rows, their positions, and
the compact index of every row."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .radix import lower_bound


class RowInputs(NamedTuple):
    """What is selected from, of one sample; row numbers are those of the sample."""

    candidates_ptr: Any  # [n] ascending
    texts_ptr: Any  # [m] ascending
    positions_ptr: Any  # [num_rows] logical position of every row of the batch
    n: Any
    m: Any
    k: Any
    start: Any  # the sample's row 0 in the batch
    dense: Any  # whether candidates and text rows together are 0, 1, ..., n + m - 1


class RowOutputs(NamedTuple):
    """What is written of one sample."""

    kept_ptr: Any  # [k] ascending indices into the candidates
    active_rows_ptr: Any  # [B * S] rows of the batch, of this sample from `first` on
    active_positions_ptr: Any  # [B * S] their logical positions
    inverse_ptr: Any  # [num_rows] compact index of every row, -1 where it is deferred
    first: Any  # compact index of the sample's first active row
    fillers: Any  # compact index of its first filler
    end_fillers: Any  # and behind its last one


@triton.jit
def make_row_inputs(
    candidates_ptr, texts_ptr, positions_ptr, counts_ptr, batch, sample, stride_candidates, stride_texts
):
    """The inputs of a sample of a batch."""
    start = tl.load(counts_ptr + sample).to(tl.int32)
    n = tl.load(counts_ptr + 2 * batch + sample).to(tl.int32)
    m = tl.load(counts_ptr + 3 * batch + sample).to(tl.int32)
    k = tl.load(counts_ptr + 4 * batch + sample).to(tl.int32)
    row = sample.to(tl.int64)
    candidates_ptr += row * stride_candidates
    texts_ptr += row * stride_texts
    last_row = tl.maximum(
        tl.load(candidates_ptr + n - 1, mask=n > 0, other=-1), tl.load(texts_ptr + m - 1, mask=m > 0, other=-1)
    )
    return RowInputs(candidates_ptr, texts_ptr, positions_ptr, n, m, k, start, last_row + 1 == n + m)


@triton.jit
def make_row_outputs(
    inputs,
    kept_ptr,
    active_rows_ptr,
    active_positions_ptr,
    inverse_ptr,
    sample,
    max_k,
    compact_length,
    FILLERS_LAST: tl.constexpr,
):
    """The outputs of a sample, whose active rows are the last ones of its ``compact_length``, or else the first."""
    if FILLERS_LAST:
        first = sample * compact_length
        fillers, end_fillers = first + inputs.m + inputs.k, first + compact_length
    else:
        first = sample * compact_length + compact_length - inputs.m - inputs.k
        fillers, end_fillers = sample * compact_length, first
    kept_ptr += sample.to(tl.int64) * max_k
    return RowOutputs(kept_ptr, active_rows_ptr, active_positions_ptr, inverse_ptr, first, fillers, end_fillers)


@triton.jit
def load_rows(rows_ptr, base, n, BLOCK: tl.constexpr):
    """Rows base..base+BLOCK of a list of n, int32."""
    offs_n = base + tl.arange(0, BLOCK)
    return tl.load(rows_ptr + offs_n, mask=offs_n < n, other=0).to(tl.int32)  # [BLOCK]


@triton.jit
def fill(out_ptr, begin, end, value, program, num_programs, BLOCK: tl.constexpr):
    """Write ``value`` from ``begin`` to ``end``: every ``num_programs``-th block."""
    for first in range(begin + program * BLOCK, end, num_programs * BLOCK):
        offs = first + tl.arange(0, BLOCK)
        tl.store(out_ptr + offs, tl.full([BLOCK], value, out_ptr.dtype.element_ty), mask=offs < end)


@triton.jit
def fill_inverse(inputs, outputs, counts_ptr, batch, sample, num_rows, program, num_programs, BLOCK: tl.constexpr):
    """Mark the rows up to the next sample as deferred, as far as nothing else is written there."""
    end = tl.load(counts_ptr + sample + 1, mask=sample + 1 < batch, other=num_rows).to(tl.int32)
    begin = tl.where(sample == 0, 0, inputs.start)
    begin += tl.where(inputs.dense & (begin == inputs.start), inputs.n + inputs.m, 0)
    fill(outputs.inverse_ptr, begin, end, -1, program, num_programs, BLOCK)


@triton.jit
def choose(key, mask, pivot, num_ties, gt_before, eq_before):
    """Mark the keys better than the pivot and the first ``num_ties`` equal to it; also how many up to each."""
    mask_gt = mask & (key < pivot)
    mask_eq = mask & (key == pivot)
    # Both counts in one scan, 16 bits each.
    counts = tl.cumsum(mask_gt.to(tl.int32) | (mask_eq.to(tl.int32) << 16), 0)
    eq_rank = eq_before + (counts >> 16)
    return mask_gt | (mask_eq & (eq_rank <= num_ties)), gt_before + (counts & 0xFFFF) + tl.minimum(eq_rank, num_ties)


@triton.jit
def emit(inputs, outputs, rows, mask_kept, rank, texts, base, CHUNK: tl.constexpr):
    """Write the kept indices of a chunk and, in ascending order, its active rows: those kept and the text among them.

    ``rows`` [CHUNK] and ``texts`` [BLOCK_T]: the candidates of the chunk and the first text rows. Where every row is
    in one of the two lists, its place in one list tells how many of the other are below it.
    """
    offs_n = base + tl.arange(0, CHUNK)
    if inputs.dense:
        texts_below = rows - offs_n  # [CHUNK]
    else:
        texts_below = lower_bound(rows, mask_kept, inputs.texts_ptr, inputs.m)  # [CHUNK]
    tl.store(outputs.kept_ptr + rank - 1, offs_n.to(tl.int64), mask=mask_kept)
    mask_n = offs_n < inputs.n
    _store_rows(inputs, outputs, outputs.first + rank - 1 + texts_below, rows, mask_n, mask_kept, mask_n)
    BLOCK_T: tl.constexpr = texts.shape[0]
    for start_t in range(0, inputs.m, BLOCK_T):
        offs_t = start_t + tl.arange(0, BLOCK_T)
        mask_t = offs_t < inputs.m
        if inputs.dense:
            below = texts - offs_t  # [BLOCK_T]
        else:
            below = lower_bound(texts, mask_t, inputs.candidates_ptr, inputs.n)  # [BLOCK_T]
        # Text rows before all candidates go with the first chunk.
        mask_here = mask_t & (below > base - 1 + tl.minimum(base, 1)) & (below <= base + CHUNK)
        mask_behind = mask_here & (below > 0)
        kept_below = tl.where(mask_behind, tl.gather(rank, tl.where(mask_behind, below - 1 - base, 0), 0), 0)
        _store_rows(inputs, outputs, outputs.first + offs_t + kept_below, texts, mask_t, mask_here, mask_here)
        texts = load_rows(inputs.texts_ptr, start_t + BLOCK_T, inputs.m, BLOCK_T)  # [BLOCK_T]


@triton.jit
def _store_rows(inputs, outputs, compact_index, rows, mask, mask_active, mask_own):
    """Store active rows and their positions at ``compact_index``; of ``mask_own`` rows also which are deferred."""
    row = inputs.start + rows
    tl.store(outputs.inverse_ptr + row, tl.where(mask_active, compact_index, -1), mask=mask_own)
    tl.store(outputs.active_rows_ptr + compact_index, row.to(tl.int64), mask=mask_active)
    # Read for all rows: whole sectors, and hardly more of them than for the active rows.
    position = tl.load(inputs.positions_ptr + row, mask=mask)  # [CHUNK] or [BLOCK_T], as rows
    tl.store(outputs.active_positions_ptr + compact_index, position, mask=mask_active)
