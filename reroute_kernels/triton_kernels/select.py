"""Exact top-k of every sample, in one launch: scores, rank keys, threshold, ascending indices and active rows.

Many programs make the scores. Of short rows the one that arrives last selects alone. Long rows have two more
stages (:mod:`reroute_kernels.triton_kernels._stages`), spread over shares of the row: one collects the keys near the
threshold, one emits.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from reroute_kernels.reference import Segments, Selection
from reroute_kernels.triton_kernels._common import Variant, processors, scratch
from reroute_kernels.triton_kernels._ranks import (
    COARSE,
    MOST,
    SLOTS,
    coarse_bin,
    count_below,
    pick,
    rank_key,
    threshold_key,
)
from reroute_kernels.triton_kernels._softmax import head_mean, merge_parts
from reroute_kernels.triton_kernels._stages import arrive, role, wait

TILE = 256  # candidates scored at a time; fewer where a model has many heads
SHORT = 4096  # the longest row that one program selects from
SHARE = 2048  # candidates of one program in the later stages of a longer row

# Another batch, prompt or number of kept rows must not compile anew.
SIZES = ("batch", "scorers", "shares", "widest", "most_kept", "width")
STRIDES = ("source_stride", "candidate_stride", "text_stride")


class Logits(NamedTuple):
    """What the score launch leaves: (B, H, stride) logits in base 2, and from ``peaks_at`` on the maxima and then the
    sums of (B, parts, H).

    Of one head and without parts it is scores.
    """

    logits: Tensor
    stride: int
    peaks_at: int
    heads: int
    parts: int
    block: int


# --- stage 0: scores -------------------------------------------------------------------------


@triton.jit
def _score_tile(
    source, stride, peak, weight, candidates, scores, keys, at, n, FUSED: tl.constexpr, HEADS: tl.constexpr
):
    """Store the scores and keys of the candidates ``at``; the keys, and which are valid."""
    valid = (at >= 0) & (at < n)
    if FUSED:
        rows = tl.load(candidates + at, mask=valid, other=0).to(tl.int32)
        score = head_mean(source, rows, valid, peak, weight, stride, HEADS)
    else:
        score = tl.load(source + at, mask=valid, other=0.0).to(tl.float32)
    key = rank_key(score)
    tl.store(scores + at, score, mask=valid)
    tl.store(keys + at, key, mask=valid)
    return key, valid


@triton.jit
def _fill(out, begin, end, value, program, programs, TILE: tl.constexpr):
    """Write ``value`` to out[begin:end], this program's share."""
    for first in range(begin + program * TILE, end, programs * TILE):
        at = first + tl.arange(0, TILE)
        tl.store(out + at, tl.full([TILE], value, out.dtype.element_ty), mask=at < end)


# --- stage 1: the keys near the threshold ----------------------------------------------------


@triton.jit
def _collect(keys, rivals, histogram, n, k, base, FUSED: tl.constexpr, SHARE: tl.constexpr):
    """Copy the keys of a share that are in the bin of the threshold to the share's place in ``rivals``.

    Their number, that of the keys in better bins, and the first and the last of them.
    """
    at = base + tl.arange(0, SHARE)
    key = tl.load(keys + at, mask=at < n, other=0)
    best, _ = pick(tl.load(histogram), tl.maximum(k - 1, 0))
    bin = coarse_bin(key, FUSED)
    # Both counts in one scan, 16 bits each.
    rival, above = (at < n) & (bin == best), (at < n) & (bin < best)
    packed = rival.to(tl.int32) | (above.to(tl.int32) << 16)
    tl.store(rivals + base + (tl.cumsum(packed, 0) & 0xFFFF) - 1, key, mask=rival)
    total = tl.sum(packed, 0)
    first_key, last_key = tl.min(tl.where(rival, key, 0xFFFFFFFF), 0), tl.max(tl.where(rival, key, 0), 0)
    return total & 0xFFFF, total >> 16, first_key, last_key


# --- stage 2: what is kept -------------------------------------------------------------------


@triton.jit
def _settle(
    rivals,
    tallies,
    shares,
    k,
    share,
    SHARE: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """From what all shares collected: the threshold and how many ties are kept.

    Also how many keys of earlier shares are above the threshold, and how many equal it.
    """
    STEP: tl.constexpr = max(SLOTS // SEGMENTS, 32)
    slot = tl.arange(0, SEGMENTS * STEP)
    owner, column = slot // STEP, slot % STEP
    limit = tl.load(tallies + 4 * owner, mask=owner < shares, other=0)
    each = 4 * tl.arange(0, SEGMENTS)
    real = each < 4 * shares
    above = tl.load(tallies + each + 1, mask=real, other=0)
    first_keys = tl.load(tallies + each + 2, mask=real, other=-1).to(tl.uint32, bitcast=True)
    last_keys = tl.load(tallies + each + 3, mask=real, other=0).to(tl.uint32, bitcast=True)
    end = tl.max(limit, 0)
    rivals += owner * SHARE + column
    threshold, ties = threshold_key(
        rivals, column, limit, end, k - tl.sum(above, 0), tl.min(first_keys, 0), tl.max(last_keys, 0), STEP
    )
    better, equal = tl.zeros(slot.shape, tl.int32), tl.zeros(slot.shape, tl.int32)
    for first in range(0, end, STEP):
        earlier = (column + first < limit) & (owner < share)
        key = tl.load(rivals + first, mask=earlier, other=0)
        better += (earlier & (key < threshold)).to(tl.int32)
        equal += (earlier & (key == threshold)).to(tl.int32)
    above_before = tl.sum(tl.where(each < 4 * share, above, 0), 0) + tl.sum(better, 0)
    return threshold, ties, above_before, tl.sum(equal, 0)


@triton.jit
def _load_rows(rows, base, n, CHUNK: tl.constexpr):
    at = base + tl.arange(0, CHUNK)
    return tl.load(rows + at, mask=at < n, other=0).to(tl.int32)


@triton.jit
def _rank(key, valid, threshold, ties, above_before, ties_before):
    """Who is kept, the keys above the threshold and the first ``ties`` at it, and how many up to and with each."""
    above = valid & (key < threshold)
    tied = valid & (key == threshold)
    through = tl.cumsum(above.to(tl.int32) | (tied.to(tl.int32) << 16), 0)
    tie = ties_before + (through >> 16)
    return above | (tied & (tie <= ties)), above_before + (through & 0xFFFF) + tl.minimum(tie, ties)


@triton.jit
def _emit(rows, chosen, rank, text, dense, candidates, texts, kept, active, n, m, base, CHUNK: tl.constexpr):
    """Write the kept ordinals of a chunk, and their rows with the text rows among them, to ascending places.

    ``text`` holds the first text rows. Where ``dense``, one list tells a row's rank in the other.
    """
    at = base + tl.arange(0, CHUNK)
    if dense:
        texts_below = rows - at
    else:
        texts_below = count_below(rows, chosen, texts, m)
    tl.store(kept + rank - 1, at.to(tl.int64), mask=chosen)
    tl.store(active + rank - 1 + texts_below, rows.to(tl.int64), mask=chosen)
    WIDTH: tl.constexpr = text.shape[0]
    for first in range(0, m, WIDTH):
        index = first + tl.arange(0, WIDTH)
        valid = index < m
        if dense:
            below = text - index
        else:
            below = count_below(text, valid, candidates, n)
        # Text rows before all candidates go with the first chunk.
        here = valid & (below > base - 1 + tl.minimum(base, 1)) & (below <= base + CHUNK)
        behind = here & (below > 0)
        kept_below = tl.where(behind, tl.gather(rank, tl.where(behind, below - 1 - base, 0), 0), 0)
        tl.store(active + index + kept_below, text.to(tl.int64), mask=here)
        text = _load_rows(texts, first + WIDTH, m, WIDTH)


@triton.jit(do_not_specialize=SIZES + STRIDES)
def _select_kernel(
    source,
    candidates,
    texts,
    counts,
    notes,
    counters,
    scores,
    kept,
    active,
    batch,
    scorers,
    shares,
    source_stride,
    peaks_at,
    candidate_stride,
    text_stride,
    widest,
    most_kept,
    width,
    HEADS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    SHARE: tl.constexpr,
    SEGMENTS: tl.constexpr,
    COARSE: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """``source``: logits if there are PARTS, else scores. A sample has ``scorers`` programs, and if rows are long
    (SEGMENTS is not 0 but a power of two, at least ``shares``) twice ``shares`` in the later stages.
    """
    TEXTS: tl.constexpr = 1024  # text rows at a time
    FUSED: tl.constexpr = PARTS > 0
    if SEGMENTS > 0:
        stage, sample, program = role(counters, scorers, shares, batch)
    else:
        stage, sample, program = 0, tl.program_id(0) // scorers, tl.program_id(0) % scorers
    length = tl.load(counts + batch + sample).to(tl.int32)
    n = tl.load(counts + 2 * batch + sample).to(tl.int32)
    m = tl.load(counts + 3 * batch + sample).to(tl.int32)
    k = tl.load(counts + 4 * batch + sample).to(tl.int32)
    row_of = sample.to(tl.int64)
    scores += row_of * widest
    kept += row_of * most_kept
    active += row_of * width
    candidates += row_of * candidate_stride
    texts += row_of * text_stride
    # For the launch itself: keys, rivals, and tallies of the shares; counters, zero before and after, and a histogram.
    keys = notes.to(tl.pointer_type(tl.uint32)) + row_of * widest
    rivals = keys + batch * widest
    tallies = notes + 2 * batch * widest + 4 * shares * sample
    scored = counters + 1 + 3 * sample
    collected, emitted = scored + 1, scored + 2
    histogram = counters + tl.cdiv(1 + 3 * batch, 8) * 8 + sample * COARSE + tl.arange(0, COARSE)
    fillers = width - m - k
    # Mostly candidates and texts are all rows there are.
    last_row = tl.maximum(
        tl.load(candidates + n - 1, mask=n > 0, other=-1), tl.load(texts + m - 1, mask=m > 0, other=-1)
    )
    dense = last_row + 1 == n + m
    # The first tile is shorter, so that rows in sequence begin where sectors of 8 logits do.
    lead = (tl.load(candidates, mask=n > 0, other=0) % 8).to(tl.int32)
    # Programs with a tile or share of this sample arrive, and of an empty sample the first one.
    scoring = tl.maximum(tl.minimum(tl.cdiv(n + lead, TILE), scorers), 1)
    sharing = tl.maximum(tl.cdiv(n, SHARE), 1)
    if stage == 0:
        _fill(scores, n, widest, -float("inf"), program, scorers, TILE)
        _fill(kept, k, most_kept, -1, program, scorers, TILE)
        _fill(active, 0, fillers, -1, program, scorers, TILE)
        if program < scoring:
            if FUSED:
                peaks = source + peaks_at + sample * PARTS * HEADS
                totals = peaks + batch * PARTS * HEADS
                source += row_of * HEADS * source_stride
                tiles = tl.cdiv(length, BLOCK)
                parts = tl.where(n > 0, tl.cdiv(tiles, tl.maximum(tl.cdiv(tiles, PARTS), 1)), 0)
                peak, weight = merge_parts(peaks, totals, parts, HEADS)
            else:
                source += row_of * source_stride
                peak, weight = 0.0, 0.0
            for first in range(program * TILE - lead, n, scorers * TILE):
                at = first + tl.arange(0, TILE)
                key, valid = _score_tile(
                    source, source_stride, peak, weight, candidates, scores, keys, at, n, FUSED, HEADS
                )
                tally = tl.histogram(coarse_bin(key, FUSED), COARSE, mask=valid)
                tl.atomic_add(histogram, tally, mask=tally > 0, sem="relaxed")
            arrived = arrive(scored)
            if SEGMENTS == 0 and arrived == scoring - 1:
                tl.store(scored, 0)
                rows, text = _load_rows(candidates, 0, n, SHARE), _load_rows(texts, 0, m, TEXTS)
                found, above, first_key, last_key = _collect(keys, rivals, histogram, n, k, 0, FUSED, SHARE)
                tl.debug_barrier()  # the rivals are read by other threads
                tl.store(histogram, tl.zeros([COARSE], tl.int32))
                slot = tl.arange(0, SLOTS)
                threshold, ties = threshold_key(
                    rivals + slot, slot, found, found, k - above, first_key, last_key, SLOTS
                )
                at = tl.arange(0, SHARE)
                key = tl.load(keys + at, mask=at < n, other=0)  # again, from the L1 cache: registers are short
                chosen, rank = _rank(key, at < n, threshold, ties, 0, 0)
                _emit(rows, chosen, rank, text, dense, candidates, texts, kept, active + fillers, n, m, 0, SHARE)
    elif SEGMENTS > 0 and program < sharing:
        if stage == 1:
            wait(scored, scoring)
            found, above, first_key, last_key = _collect(keys, rivals, histogram, n, k, program * SHARE, FUSED, SHARE)
            tallies += 4 * program
            tl.store(tallies, found)
            tl.store(tallies + 1, above)
            tl.store(tallies + 2, first_key.to(tl.int32, bitcast=True))
            tl.store(tallies + 3, last_key.to(tl.int32, bitcast=True))
            arrive(collected)
        else:
            base = program * SHARE
            rows, text = _load_rows(candidates, base, n, SHARE), _load_rows(texts, 0, m, TEXTS)
            at = base + tl.arange(0, SHARE)
            wait(collected, sharing)
            key = tl.load(keys + at, mask=at < n, other=0)
            threshold, ties, above_before, ties_before = _settle(
                rivals, tallies, sharing, k, program, SHARE, SEGMENTS, SLOTS
            )
            chosen, rank = _rank(key, at < n, threshold, ties, above_before, ties_before)
            _emit(rows, chosen, rank, text, dense, candidates, texts, kept, active + fillers, n, m, base, SHARE)
            if arrive(emitted) == sharing - 1:
                for counter in tl.static_range(3):
                    tl.store(scored + counter, 0)
                tl.store(histogram, tl.zeros([COARSE], tl.int32))


def run_select(source: Logits, candidates: Tensor, texts: Tensor, counts: Tensor, segments: Segments) -> Selection:
    """Launch the selection. ValueError for a row of more candidates than the kernel can count."""
    (batch, widest), device = candidates.shape, candidates.device
    if widest > MOST:
        raise ValueError(f"{widest} candidates in a row: the selection kernel counts up to {MOST}")
    most_kept, width = max(segments.keep), segments.width
    kept = torch.empty(batch, most_kept, dtype=torch.int64, device=device)
    active = torch.empty(batch, width, dtype=torch.int64, device=device)
    scores = torch.empty(batch, widest, dtype=torch.float32, device=device)
    share, shares = (SHARE, -(-widest // SHARE)) if widest > SHORT else (max(_power(widest), 1024), 0)
    tile = min(TILE, max(8192 // _power(source.heads), 16))  # by the model alone: it orders sums
    scorers = min(-(-(widest + 7) // tile), -(-processors(device) // batch))
    _variant(source.heads, source.parts, source.block, tile, share, _power(shares))(
        ((scorers + 2 * shares) * batch, 1, 1),
        source.logits,
        candidates,
        texts,
        counts,
        scratch("notes", batch * (2 * widest + 4 * shares), torch.int32, device),
        scratch("counters", batch * (COARSE + 3) + 8, torch.int32, device, zero=True),
        scores,
        kept,
        active,
        batch,
        scorers,
        shares,
        source.stride,
        source.peaks_at,
        candidates.stride(0),
        texts.stride(0),
        widest,
        most_kept,
        width,
    )
    return Selection(kept, active, scores)


def _power(size: int) -> int:
    """The power of two at or above ``size``; of 0 it is 0."""
    return 1 << (size - 1).bit_length() if size else 0


@lru_cache(maxsize=256)
def _variant(heads: int, parts: int, block: int, tile: int, share: int, segments: int) -> Variant:
    constants = {
        "HEADS": heads,
        "PARTS": parts,
        "BLOCK": block,
        "TILE": tile,
        "SHARE": share,
        "SEGMENTS": segments,
        "COARSE": COARSE,
        "SLOTS": SLOTS,
    }
    return Variant(_select_kernel, constants, num_warps=16, maxnreg=128, enable_fp_fusion=False)


def select(
    scores: Tensor, candidates: Tensor, texts: Tensor, segments: Segments, *, counts: Tensor | None = None
) -> Selection:
    """:func:`reroute_kernels.reference.select` in one launch, without a device synchronisation.

    counts: those of ``segments`` on the device, if they are there.
    """
    source = Logits(scores, scores.stride(0), 0, heads=1, parts=0, block=1)
    return run_select(source, candidates, texts, segments.counts(scores.device) if counts is None else counts, segments)
