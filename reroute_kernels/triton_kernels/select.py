"""Exact top-k of every sample, in one launch: scores, rank keys, threshold, ascending indices and active rows.

Many programs per sample make the scores; the one that arrives last selects. It reads what the others wrote,
so the choice depends on values only and never on the order in which programs ran.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from reroute_kernels.reference import Segments, Selection
from reroute_kernels.triton_kernels._common import device_counts, processors, scratch

TILE = 256  # candidates scored at a time; fewer where a model has many heads
DIRECT = 1024  # up to here one program finds the threshold without the coarse histogram of all
COARSE = 2048  # bins of that histogram
KEY_ALIGN = 16  # rank keys of a sample begin at 16-byte boundaries


class Logits(NamedTuple):
    """What the score launch leaves: (B, H, stride) logits in base 2; maxima and sums of (B, parts, H)."""

    logits: Tensor
    peaks: Tensor
    totals: Tensor
    heads: int
    stride: int
    parts: int
    block: int


@triton.jit
def rank_key(score):
    """uint32 keys that ascend with the score: -0.0 equals +0.0, and a NaN of any sign exceeds all."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    ascending = tl.where(score != score, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return ascending.to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def _merge_parts(peaks, totals, sample, parts, PARTS: tl.constexpr, HEADS: tl.constexpr):
    """Per head the maximum over all parts, and the weight 1 / (H * sum of powers)."""
    WIDTH: tl.constexpr = triton.next_power_of_2(HEADS)
    STEP: tl.constexpr = 32
    head = tl.arange(0, WIDTH)
    peak = tl.full([WIDTH], -float("inf"), tl.float32)
    total = tl.zeros([WIDTH], tl.float32)
    for first in range(0, parts, STEP):
        part = first + tl.arange(0, STEP)
        place = (sample * PARTS + part)[:, None] * HEADS + head[None, :]
        mask = (part < parts)[:, None] & (head < HEADS)[None, :]
        part_peak = tl.load(peaks + place, mask=mask, other=-float("inf"))
        part_total = tl.load(totals + place, mask=mask, other=0.0)
        grown = tl.maximum(peak, tl.max(part_peak, 0))
        shift = tl.where(grown == -float("inf"), 0.0, grown)  # -inf minus -inf would be NaN
        total = total * tl.exp2(peak - shift) + tl.sum(part_total * tl.exp2(part_peak - shift[None, :]), 0)
        peak = grown
    real = head < HEADS
    return tl.where(real, peak, 0.0), tl.where(real, 1.0 / (total * HEADS), 0.0)


@triton.jit
def _head_mean(logits, rows, valid, peak, weight, stride, HEADS: tl.constexpr):
    """Mean over heads of the softmax at ``rows``; all heads at once, so that one wait covers their loads."""
    head = tl.arange(0, peak.shape[0])
    mask = valid[None, :] & (head < HEADS)[:, None]
    logit = tl.load(logits + head[:, None] * stride + rows[None, :], mask=mask, other=-float("inf"))
    return tl.sum(tl.exp2(logit - peak[:, None]) * weight[:, None], 0)


@triton.jit
def _coarse(key, FUSED: tl.constexpr):
    """One of 2048 bins, ascending with the key: for softmax scores 64 to the octave between 2^-32 and 1."""
    if FUSED:
        LOWEST: tl.constexpr = 0xAF800000  # the key of 2^-32
        above = tl.where(key > LOWEST, key - LOWEST, 0) >> 17
        return tl.minimum(above, 2047).to(tl.int32)
    else:
        return (key >> 21).to(tl.int32)


@triton.jit
def _pick(counts, need):
    """The bin that holds the need-th largest key, and how many of that bin are needed."""
    at_least = tl.cumsum(counts, 0, reverse=True)
    bin = tl.arange(0, counts.shape[0])
    best = tl.max(tl.where(at_least >= need, bin, 0), 0)
    above = tl.sum(tl.where(bin > best, counts, 0), 0)
    return best, need - above


@triton.jit
def _load_keys(keys, at, n):
    # Keys are written and read up to the next multiple of 4: a mask of whole 16-byte words.
    return tl.load(keys + at, mask=at < tl.cdiv(n, 4) * 4, other=0)


@triton.jit
def _rivals(keys, rivals, n, best, FUSED: tl.constexpr, CHUNK: tl.constexpr):
    """Copy the keys of one coarse bin to ``rivals`` and count them."""
    found = tl.zeros([], tl.int32)
    for first in range(0, n, CHUNK):
        at = first + tl.arange(0, CHUNK)
        key = _load_keys(keys, at, n)
        hit = (at < n) & (_coarse(key, FUSED) == best)
        rank = tl.cumsum(hit.to(tl.int32), 0)
        tl.store(rivals + found + rank - 1, key, mask=hit)
        found += tl.max(rank, 0)
    tl.debug_barrier()  # they are read by other threads
    return found


@triton.jit
def _threshold(keys, n, need):
    """The need-th largest of ``keys[:n]``, eight bits at a time, and how many equal to it are needed.

    256 bins: what a histogram costs grows with the bins.
    """
    STEP: tl.constexpr = 1024
    known = tl.zeros([], tl.uint32)
    for shift in tl.static_range(24, -1, -8):
        counts = tl.zeros([256], tl.int32)
        for first in range(0, n, STEP):
            at = first + tl.arange(0, STEP)
            key = tl.load(keys + at, mask=at < n, other=0) >> shift
            rival = (at < n) & ((key ^ known) < 256)
            counts += tl.histogram((key & 255).to(tl.int32), 256, mask=rival)
        best, need = _pick(counts, need)
        known = known | best.to(tl.uint32)
        if shift > 0:
            known = known << 8
    return known, need


@triton.jit
def _count_below(rows, valid, ascending, count):
    """How many of ``ascending[:count]`` are below each of ``rows``: a binary search."""
    low = tl.zeros(rows.shape, tl.int32)
    high = low + count
    span = count
    while span > 0:
        middle = (low + high) // 2
        open = valid & (low < high)
        below = open & (tl.load(ascending + middle, mask=open, other=0) < rows)
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
        span = span // 2
    return low


@triton.jit
def _emit(
    keys,
    ranks,
    candidates,
    texts,
    kept,
    active,
    n,
    m,
    k,
    threshold,
    ties,
    CHUNK: tl.constexpr,
):
    """Write the ordinals above the threshold, and the first ``ties`` at it, with text rows to ascending places."""
    last_row = tl.maximum(
        tl.load(candidates + n - 1, mask=n > 0, other=-1),
        tl.load(texts + m - 1, mask=m > 0, other=-1),
    )
    # Mostly candidates and texts are all rows there are; then the one list tells a row's rank in the other.
    dense = last_row + 1 == n + m
    above_before, ties_before = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    for first in range(0, n, CHUNK):
        at = first + tl.arange(0, CHUNK)
        valid = at < n
        key = _load_keys(keys, at, n)
        above = valid & (key > threshold)
        tied = valid & (key == threshold)
        # Both counts in one scan, 15 bits each.
        packed = above.to(tl.int32) | (tied.to(tl.int32) << 15)
        before = tl.cumsum(packed, 0) - packed
        tie = ties_before + (before >> 15)
        rank = above_before + (before & 0x7FFF) + tl.minimum(tie, ties)
        chosen = above | (tied & (tie < ties))
        row = tl.load(candidates + at, mask=chosen, other=0)
        if dense:
            texts_below = row.to(tl.int32) - at
        else:
            texts_below = _count_below(row, chosen, texts, m)
        tl.store(kept + rank, at.to(tl.int64), mask=chosen)
        tl.store(active + rank + texts_below, row, mask=chosen)
        tl.store(ranks + at, rank, mask=valid)
        sums = tl.sum(packed, 0)
        above_before += sums & 0x7FFF
        ties_before += sums >> 15
    tl.debug_barrier()  # ranks are read by other threads
    for first in range(0, m, CHUNK):
        at = first + tl.arange(0, CHUNK)
        valid = at < m
        row = tl.load(texts + at, mask=valid, other=0)
        if dense:
            below = row.to(tl.int32) - at
        else:
            below = _count_below(row, valid, candidates, n)
        kept_below = tl.load(ranks + below, mask=valid & (below < n), other=k)
        tl.store(active + at + kept_below, row, mask=valid)


@triton.jit
def _fill(out, begin, end, value, program, programs, TILE: tl.constexpr):
    """Write ``value`` to out[begin:end], this program's share."""
    for first in range(begin + program * TILE, end, programs * TILE):
        at = first + tl.arange(0, TILE)
        tl.store(out + at, tl.full([TILE], value, out.dtype.element_ty), mask=at < end)


@triton.jit
def _select_kernel(
    source,
    peaks,
    totals,
    candidates,
    texts,
    counts,
    keys,
    ranks,
    rivals,
    histogram,
    arrivals,
    scores,
    kept,
    active,
    batch,
    source_stride,
    key_stride,
    candidate_stride,
    text_stride,
    widest,
    most_kept,
    width,
    FUSED: tl.constexpr,
    HEADS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    COARSE: tl.constexpr,
):
    """``source``: logits if FUSED, else scores. Program (i, b) scores every programs-th tile of sample b."""
    program, programs, sample = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    length = tl.load(counts + batch + sample)
    n = tl.load(counts + 2 * batch + sample)
    m = tl.load(counts + 3 * batch + sample)
    k = tl.load(counts + 4 * batch + sample)
    row_of = sample.to(tl.int64)
    scores += row_of * widest
    kept += row_of * most_kept
    active += row_of * width
    candidates += row_of * candidate_stride
    texts += row_of * text_stride
    keys += row_of * key_stride
    ranks += row_of * key_stride
    rivals += row_of * key_stride
    histogram += sample * COARSE + tl.arange(0, COARSE)
    fillers = width - m - k
    _fill(scores, n, widest, -float("inf"), program, programs, TILE)
    _fill(kept, k, most_kept, -1, program, programs, TILE)
    _fill(active, 0, fillers, -1, program, programs, TILE)

    # Programs with a tile of this sample arrive, and of an empty sample the first one.
    arriving = tl.maximum(tl.minimum(tl.cdiv(n, TILE), programs), 1)
    if program < arriving:
        if FUSED:
            source += row_of * HEADS * source_stride
            tiles = tl.cdiv(length, BLOCK)
            parts = tl.cdiv(tiles, tl.maximum(tl.cdiv(tiles, PARTS), 1))
            if n == 0:
                parts = 0
            peak, weight = _merge_parts(peaks, totals, sample, parts, PARTS, HEADS)
        else:
            source += row_of * source_stride
        for first in range(program * TILE, n, programs * TILE):
            at = first + tl.arange(0, TILE)
            valid = at < n
            if FUSED:
                rows = tl.load(candidates + at, mask=valid, other=0)
                score = _head_mean(source, rows, valid, peak, weight, source_stride, HEADS)
            else:
                score = tl.load(source + at, mask=valid, other=0.0).to(tl.float32)
            tl.store(scores + at, score, mask=valid)
            key = rank_key(score)
            tl.store(keys + at, key, mask=at < tl.cdiv(n, 4) * 4)
            if COARSE > 1:
                counts_here = tl.histogram(_coarse(key, FUSED), COARSE, mask=valid)
                tl.atomic_add(histogram, counts_here, mask=counts_here > 0, sem="relaxed")
        tl.debug_barrier()  # the stores of all threads come before the arrival of one
        if tl.atomic_add(arrivals + sample, 1, sem="acq_rel") == arriving - 1:
            tl.store(arrivals + sample, 0)
            ties = k
            threshold = tl.where(k > 0, 0, 0xFFFFFFFF).to(tl.uint32)  # all or none, unless:
            if COARSE > 1:
                counts_all = tl.load(histogram)
                tl.store(histogram, tl.zeros([COARSE], tl.int32))
                if (k > 0) & (k < n):
                    best, need = _pick(counts_all, k)
                    found = _rivals(keys, rivals, n, best, FUSED, CHUNK)
                    threshold, ties = _threshold(rivals, found, need)
            elif (k > 0) & (k < n):
                threshold, ties = _threshold(keys, n, k)
            _emit(keys, ranks, candidates, texts, kept, active + fillers, n, m, k, threshold, ties, CHUNK)


def run_select(source: Tensor | Logits, candidates: Tensor, texts: Tensor, segments: Segments) -> Selection:
    """Launch the selection on ``source``, scores (B, Nmax) or logits."""
    (batch, widest), device = candidates.shape, candidates.device
    most_kept, width = max(segments.keep), segments.width
    kept = torch.empty(batch, most_kept, dtype=torch.int64, device=device)
    active = torch.empty(batch, width, dtype=torch.int64, device=device)
    scores = torch.empty(batch, widest, dtype=torch.float32, device=device)
    fused = isinstance(source, Logits)
    key_stride = -(-max(widest, 1) // KEY_ALIGN) * KEY_ALIGN
    names = ("keys", "ranks", "rivals")
    keys, ranks, rivals = (scratch(name, batch * key_stride, torch.int32, device) for name in names)
    coarse = COARSE if widest > DIRECT else 1
    heads = source.heads if isinstance(source, Logits) else 1
    tile = min(TILE, max(8192 // triton.next_power_of_2(heads), 16))  # by the model alone: it orders sums
    tiles = max(-(-widest // tile), 1)
    _select_kernel[(min(tiles, -(-2 * processors(device) // batch)), batch)](
        source.logits if isinstance(source, Logits) else source,
        source.peaks if isinstance(source, Logits) else None,
        source.totals if isinstance(source, Logits) else None,
        candidates,
        texts,
        device_counts(segments, device),
        keys.view(torch.uint32),
        ranks,
        rivals.view(torch.uint32),
        scratch("histogram", batch * coarse, torch.int32, device, zero=True),
        scratch("arrivals", batch, torch.int32, device, zero=True),
        scores,
        kept,
        active,
        batch,
        source.stride if isinstance(source, Logits) else source.stride(0),
        key_stride,
        candidates.stride(0),
        texts.stride(0),
        widest,
        most_kept,
        width,
        FUSED=fused,
        HEADS=heads,
        PARTS=source.parts if isinstance(source, Logits) else 1,
        BLOCK=source.block if isinstance(source, Logits) else 1,
        TILE=tile,
        CHUNK=min(max(triton.next_power_of_2(widest), 1024), 4096),
        COARSE=coarse,
        num_warps=8,
        enable_fp_fusion=False,
    )
    return Selection(kept, active, scores)


@torch.no_grad()
def select(scores: Tensor, candidates: Tensor, texts: Tensor, segments: Segments) -> Selection:
    """:func:`reroute_kernels.reference.select` in one launch, without a device synchronisation."""
    return run_select(scores, candidates, texts, segments)
