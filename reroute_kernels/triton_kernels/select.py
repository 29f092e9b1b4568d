"""Exact top-k of every sample, in one launch: scores, rank keys, threshold, ascending indices and active rows.

Many programs make the scores. Of short rows the one that arrives last selects alone. Long rows have two more
stages, spread over shares of the row: one collects the keys near the threshold, one emits. What a program does
follows from a ticket that it takes when it starts, and it waits only for programs with lower tickets. These have
started, so they will arrive, however few programs the GPU holds at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from reroute_kernels.reference import Segments, Selection
from reroute_kernels.triton_kernels._common import device_counts, processors, scratch
from reroute_kernels.triton_kernels._ranks import COARSE, coarse_bin, count_below, pick, rank_key, threshold_key
from reroute_kernels.triton_kernels._softmax import head_mean, merge_parts

TILE = 256  # candidates scored at a time; fewer where a model has many heads
SHORT = 4096  # the longest row that one program selects from
SHARE = 2048  # candidates of one program in the later stages of a longer row

# Another batch, prompt or number of kept rows must not compile anew.
SIZES = (
    "batch",
    "scorers",
    "shares",
    "source_stride",
    "candidate_stride",
    "text_stride",
    "widest",
    "most_kept",
    "width",
)


class Logits(NamedTuple):
    """What the score launch leaves: (B, H, stride) logits in base 2; maxima and sums of (B, parts, H)."""

    logits: Tensor
    peaks: Tensor
    totals: Tensor
    heads: int
    stride: int
    parts: int
    block: int


# --- one launch, several stages --------------------------------------------------------------


@triton.jit
def _role(tickets, scorers, shares, batch):
    """Stage, sample, and number among the programs of that stage and sample."""
    ticket = tl.atomic_add(tickets, 1, sem="relaxed")
    if ticket == tl.num_programs(0) - 1:
        tl.atomic_xchg(tickets, 0, sem="relaxed")
    later = ticket - scorers * batch
    if later < 0:
        stage = 0
        sample, program = ticket // scorers, ticket % scorers
    else:
        stage = 1 + later // (shares * batch)
        sample, program = later // shares % batch, later % shares
    return stage, sample, program


@triton.jit
def _arrive(counter):
    """How many arrived before."""
    tl.debug_barrier()  # the stores of all threads come before the arrival of one
    return tl.atomic_add(counter, 1, sem="acq_rel")


@triton.jit
def _wait(counter, wanted):
    """Until ``wanted`` programs, all with lower tickets, have arrived."""
    while tl.atomic_add(counter, 0, sem="acquire") < wanted:
        pass


# --- stage 0: scores -------------------------------------------------------------------------


@triton.jit
def _score_tile(
    source, stride, peak, weight, candidates, scores, keys, at, n, FUSED: tl.constexpr, HEADS: tl.constexpr
):
    """Store the scores and keys of the candidates ``at``; the keys, and which are valid."""
    valid = at < n
    if FUSED:
        rows = tl.load(candidates + at, mask=valid, other=0)
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
def _collect(keys, rivals, found, above, histogram, n, k, share, FUSED: tl.constexpr, SHARE: tl.constexpr):
    """Copy the keys in the bin of the threshold to the front of the share's part of ``rivals``; count them and those
    in better bins.
    """
    at = share * SHARE + tl.arange(0, SHARE)
    key = tl.load(keys + at, mask=at < n, other=0)
    best, _ = pick(tl.load(histogram), tl.maximum(k - 1, 0))
    bin = coarse_bin(key, FUSED)
    rival = ((at < n) & (bin == best)).to(tl.int32)
    place = tl.cumsum(rival, 0) - rival
    tl.store(rivals + share * SHARE + place, key, mask=rival > 0)
    tl.store(found + share, tl.sum(rival, 0))
    tl.store(above + share, tl.sum(((at < n) & (bin < best)).to(tl.int32), 0))


# --- stage 2: what is kept -------------------------------------------------------------------


@triton.jit
def _settle(rivals, found, above, shares, k, share, SHARE: tl.constexpr, SEGMENTS: tl.constexpr):
    """From what all shares collected: the threshold, how many ties are kept, and how many keys of earlier shares
    are above it and equal to it.
    """
    STEP: tl.constexpr = max(2048 // SEGMENTS, 8)
    slot = tl.arange(0, SEGMENTS * STEP)
    owner, column = slot // STEP, slot % STEP
    limit = tl.load(found + owner, mask=owner < shares, other=0)
    most = tl.max(limit, 0)
    each = tl.arange(0, SEGMENTS)
    better = tl.load(above + each, mask=each < shares, other=0)
    rivals += owner * SHARE + column
    threshold, ties = threshold_key(rivals, column, limit, most, k - tl.sum(better, 0), STEP)
    above_before, ties_before = tl.sum(tl.where(each < share, better, 0), 0), tl.zeros([], tl.int32)
    for first in range(0, most, STEP):
        earlier = (column + first < limit) & (owner < share)
        key = tl.load(rivals + first, mask=earlier, other=0)
        above_before += tl.sum((earlier & (key < threshold)).to(tl.int32), 0)
        ties_before += tl.sum((earlier & (key == threshold)).to(tl.int32), 0)
    return threshold, ties, above_before, ties_before


@triton.jit
def _load_rows(rows, base, n, CHUNK: tl.constexpr):
    at = base + tl.arange(0, CHUNK)
    return tl.load(rows + at, mask=at < n, other=0).to(tl.int32)


@triton.jit
def _rank(key, valid, threshold, ties, above_before, ties_before):
    """Who is kept, the keys above the threshold and the first ``ties`` at it, and how many up to and with each."""
    above = valid & (key < threshold)
    tied = valid & (key == threshold)
    # Both counts in one scan, 16 bits each.
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
        here = valid & ((below > base) | (base == 0)) & (below <= base + CHUNK)
        behind = here & (below > 0)
        kept_below = tl.where(behind, tl.gather(rank, tl.where(behind, below - 1 - base, 0), 0), 0)
        tl.store(active + index + kept_below, text.to(tl.int64), mask=here)
        text = _load_rows(texts, first + WIDTH, m, WIDTH)


@triton.jit(do_not_specialize=SIZES)
def _select_kernel(
    source,
    peaks,
    totals,
    candidates,
    texts,
    counts,
    keys,
    rivals,
    tallies,
    histogram,
    progress,
    scores,
    kept,
    active,
    batch,
    scorers,
    shares,
    source_stride,
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
    SHARE: tl.constexpr,
    SEGMENTS: tl.constexpr,
    COARSE: tl.constexpr,
):
    """``source``: logits if FUSED, else scores. A sample has ``scorers`` programs, and if rows are long
    (SEGMENTS, a power of two, is not 0) twice ``shares``, at most SEGMENTS, in the later stages.
    """
    TEXTS: tl.constexpr = 1024  # text rows at a time
    if SEGMENTS > 0:
        stage, sample, program = _role(progress, scorers, shares, batch)
    else:
        stage, sample, program = 0, tl.program_id(0) // scorers, tl.program_id(0) % scorers
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
    keys += row_of * widest
    rivals += row_of * widest
    histogram += sample * COARSE + tl.arange(0, COARSE)
    found = tallies + sample * 2 * shares
    above = found + shares
    fillers = width - m - k
    # Mostly candidates and texts are all rows there are.
    last_row = tl.maximum(
        tl.load(candidates + n - 1, mask=n > 0, other=-1), tl.load(texts + m - 1, mask=m > 0, other=-1)
    )
    dense = last_row + 1 == n + m
    scored = progress + 1 + 3 * sample
    collected, emitted = scored + 1, scored + 2
    # Programs with a tile or share of this sample arrive, and of an empty sample the first one.
    scoring = tl.maximum(tl.minimum(tl.cdiv(n, TILE), scorers), 1)
    sharing = tl.maximum(tl.cdiv(n, SHARE), 1)
    if stage == 0:
        _fill(scores, n, widest, -float("inf"), program, scorers, TILE)
        _fill(kept, k, most_kept, -1, program, scorers, TILE)
        _fill(active, 0, fillers, -1, program, scorers, TILE)
        if program < scoring:
            if FUSED:
                source += row_of * HEADS * source_stride
                tiles = tl.cdiv(length, BLOCK)
                parts = tl.where(n > 0, tl.cdiv(tiles, tl.maximum(tl.cdiv(tiles, PARTS), 1)), 0)
                stats = sample * PARTS * HEADS
                peak, weight = merge_parts(peaks + stats, totals + stats, parts, HEADS)
            else:
                source += row_of * source_stride
                peak, weight = 0.0, 0.0
            for first in range(program * TILE, n, scorers * TILE):
                at = first + tl.arange(0, TILE)
                key, valid = _score_tile(
                    source, source_stride, peak, weight, candidates, scores, keys, at, n, FUSED, HEADS
                )
                if SEGMENTS > 0:
                    tally = tl.histogram(coarse_bin(key, FUSED), COARSE, mask=valid)
                    tl.atomic_add(histogram, tally, mask=tally > 0, sem="relaxed")
            arrived = _arrive(scored)
            if SEGMENTS == 0 and arrived == scoring - 1:
                tl.store(scored, 0)
                rows, text = _load_rows(candidates, 0, n, SHARE), _load_rows(texts, 0, m, TEXTS)
                at = tl.arange(0, SHARE)
                key = tl.load(keys + at, mask=at < n, other=0)
                threshold, ties = threshold_key(keys + at, at, n, n, k, SHARE)
                chosen, rank = _rank(key, at < n, threshold, ties, 0, 0)
                _emit(rows, chosen, rank, text, dense, candidates, texts, kept, active + fillers, n, m, 0, SHARE)
    elif SEGMENTS > 0 and program < sharing:
        if stage == 1:
            _wait(scored, scoring)
            _collect(keys, rivals, found, above, histogram, n, k, program, FUSED, SHARE)
            _arrive(collected)
        else:
            base = program * SHARE
            rows, text = _load_rows(candidates, base, n, SHARE), _load_rows(texts, 0, m, TEXTS)
            at = base + tl.arange(0, SHARE)
            _wait(collected, sharing)
            key = tl.load(keys + at, mask=at < n, other=0)
            threshold, ties, above_before, ties_before = _settle(
                rivals, found, above, sharing, k, program, SHARE, SEGMENTS
            )
            chosen, rank = _rank(key, at < n, threshold, ties, above_before, ties_before)
            _emit(rows, chosen, rank, text, dense, candidates, texts, kept, active + fillers, n, m, base, SHARE)
            if _arrive(emitted) == sharing - 1:
                for counter in tl.static_range(3):
                    tl.store(scored + counter, 0)
                tl.store(histogram, tl.zeros([COARSE], tl.int32))


def run_select(source: Tensor | Logits, candidates: Tensor, texts: Tensor, segments: Segments) -> Selection:
    """Launch the selection on ``source``, scores (B, Nmax) or logits."""
    (batch, widest), device = candidates.shape, candidates.device
    most_kept, width = max(segments.keep), segments.width
    kept = torch.empty(batch, most_kept, dtype=torch.int64, device=device)
    active = torch.empty(batch, width, dtype=torch.int64, device=device)
    scores = torch.empty(batch, widest, dtype=torch.float32, device=device)
    fused = isinstance(source, Logits)
    heads = source.heads if isinstance(source, Logits) else 1
    tile = min(TILE, max(8192 // triton.next_power_of_2(heads), 16))  # by the model alone: it orders sums
    scorers = max(min(-(-widest // tile), -(-processors(device) // batch)), 1)
    long = widest > SHORT
    shares = -(-widest // SHARE) if long else 0
    coarse = COARSE if long else 1
    keys, rivals = (scratch(name, batch * widest, torch.int32, device) for name in ("keys", "rivals"))
    _select_kernel[((scorers + 2 * shares) * batch,)](
        source.logits if isinstance(source, Logits) else source,
        source.peaks if isinstance(source, Logits) else None,
        source.totals if isinstance(source, Logits) else None,
        candidates,
        texts,
        device_counts(segments, device),
        keys.view(torch.uint32),
        rivals.view(torch.uint32),
        scratch("tallies", batch * 2 * shares, torch.int32, device),
        scratch("histogram", batch * coarse, torch.int32, device, zero=True),
        scratch("progress", 1 + 3 * batch, torch.int32, device, zero=True),
        scores,
        kept,
        active,
        batch,
        scorers,
        shares,
        source.stride if isinstance(source, Logits) else source.stride(0),
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
        SHARE=SHARE if long else max(triton.next_power_of_2(widest), 1024),
        SEGMENTS=triton.next_power_of_2(shares) if long else 0,
        COARSE=coarse,
        num_warps=16,
        enable_fp_fusion=False,
    )
    return Selection(kept, active, scores)


@torch.no_grad()
def select(scores: Tensor, candidates: Tensor, texts: Tensor, segments: Segments) -> Selection:
    """:func:`reroute_kernels.reference.select` in one launch, without a device synchronisation."""
    return run_select(scores, candidates, texts, segments)
