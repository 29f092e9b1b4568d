"""What a selection writes, inside a kernel: ascending ordinals, rows and positions, of a chunk of candidates."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from reroute_kernels.triton_kernels._ranks import count_below


class Lists(NamedTuple):
    """Of one sample.

    candidates, texts: ascending local rows, n and m of them; start: the row that is local row 0; positions: of rows.
    dense: whether candidates and texts are all rows from 0 on. To be written: kept, k ordinals; active and
    active_positions, m + k rows and their positions from place ``first`` on; inverse, the place of each row or -1.
    """

    candidates: Any
    texts: Any
    positions: Any
    n: Any
    m: Any
    k: Any
    start: Any
    dense: Any
    kept: Any
    active: Any
    active_positions: Any
    inverse: Any
    first: Any


@triton.jit
def lists_of(
    candidates,
    texts,
    positions,
    counts,
    kept,
    active,
    active_positions,
    inverse,
    batch,
    sample,
    candidate_stride,
    text_stride,
    most_kept,
    width,
):
    """The lists of a sample of a batch; its active rows are at the end of ``width`` places."""
    start = tl.load(counts + sample).to(tl.int32)
    n = tl.load(counts + 2 * batch + sample).to(tl.int32)
    m = tl.load(counts + 3 * batch + sample).to(tl.int32)
    k = tl.load(counts + 4 * batch + sample).to(tl.int32)
    row = sample.to(tl.int64)
    candidates += row * candidate_stride
    texts += row * text_stride
    last = tl.maximum(tl.load(candidates + n - 1, mask=n > 0, other=-1), tl.load(texts + m - 1, mask=m > 0, other=-1))
    first = sample * width + width - m - k
    dense = last + 1 == n + m
    kept += row * most_kept
    return Lists(candidates, texts, positions, n, m, k, start, dense, kept, active, active_positions, inverse, first)


@triton.jit
def load_rows(rows, base, n, CHUNK: tl.constexpr):
    """Rows base..base+CHUNK of a list of n, int32."""
    at = base + tl.arange(0, CHUNK)
    return tl.load(rows + at, mask=at < n, other=0).to(tl.int32)


@triton.jit
def fill(out, begin, end, value, program, programs, TILE: tl.constexpr):
    """Write ``value`` to out[begin:end], this program's share."""
    for first in range(begin + program * TILE, end, programs * TILE):
        at = first + tl.arange(0, TILE)
        tl.store(out + at, tl.full([TILE], value, out.dtype.element_ty), mask=at < end)


@triton.jit
def fill_inverse(lists, counts, batch, sample, num_rows, program, programs, TILE: tl.constexpr):
    """Mark the rows up to the next sample as deferred, as far as nothing else is written there."""
    end = tl.load(counts + sample + 1, mask=sample + 1 < batch, other=num_rows).to(tl.int32)
    begin = tl.where(sample == 0, 0, lists.start)
    begin += tl.where(lists.dense & (begin == lists.start), lists.n + lists.m, 0)
    fill(lists.inverse, begin, end, -1, program, programs, TILE)


@triton.jit
def choose(key, valid, threshold, ties, above_before, ties_before):
    """Who is kept, the keys above the threshold and the first ``ties`` at it, and how many up to and with each."""
    above = valid & (key < threshold)
    tied = valid & (key == threshold)
    # Both counts in one scan, 16 bits each.
    through = tl.cumsum(above.to(tl.int32) | (tied.to(tl.int32) << 16), 0)
    tie = ties_before + (through >> 16)
    return above | (tied & (tie <= ties)), above_before + (through & 0xFFFF) + tl.minimum(tie, ties)


@triton.jit
def emit(lists, rows, chosen, rank, text, base, CHUNK: tl.constexpr):
    """Write the kept ordinals of a chunk, and their rows with the text rows among them, to ascending places.

    ``rows`` and ``text``: the candidates of the chunk and the first text rows. Where all rows are in one of the two
    lists, one list tells a row's rank in the other.
    """
    at = base + tl.arange(0, CHUNK)
    if lists.dense:
        texts_below = rows - at
    else:
        texts_below = count_below(rows, chosen, lists.texts, lists.m)
    tl.store(lists.kept + rank - 1, at.to(tl.int64), mask=chosen)
    real = at < lists.n
    _write(lists, lists.first + rank - 1 + texts_below, rows, real, chosen, real)
    WIDTH: tl.constexpr = text.shape[0]
    for first in range(0, lists.m, WIDTH):
        index = first + tl.arange(0, WIDTH)
        valid = index < lists.m
        if lists.dense:
            below = text - index
        else:
            below = count_below(text, valid, lists.candidates, lists.n)
        # Text rows before all candidates go with the first chunk.
        here = valid & (below > base - 1 + tl.minimum(base, 1)) & (below <= base + CHUNK)
        behind = here & (below > 0)
        kept_below = tl.where(behind, tl.gather(rank, tl.where(behind, below - 1 - base, 0), 0), 0)
        _write(lists, lists.first + index + kept_below, text, valid, here, here)
        text = load_rows(lists.texts, first + WIDTH, lists.m, WIDTH)


@triton.jit
def _write(lists, place, rows, valid, chosen, own):
    """Of its ``own`` rows a program also tells which are deferred."""
    row = lists.start + rows
    tl.store(lists.inverse + row, tl.where(chosen, place, -1), mask=own)
    tl.store(lists.active + place, row.to(tl.int64), mask=chosen)
    # Of all rows: whole sectors, and hardly more of them than of the chosen ones.
    position = tl.load(lists.positions + row, mask=valid)
    tl.store(lists.active_positions + place, position, mask=chosen)
