"""Exact top-k of every sample, in one launch: scores, rank keys, threshold, ascending indices and active rows.

Many programs make the scores. Of short rows the one that arrives last selects alone. Long rows have more stages
(:mod:`reroute_kernels.triton_kernels._shares`), spread over shares of the row.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from reroute_kernels.reference import Segments, Selection
from reroute_kernels.triton_kernels._common import Variant, processors, rowwise
from reroute_kernels.triton_kernels._emission import choose, emit, fill, fill_inverse, lists_of, load_rows
from reroute_kernels.triton_kernels._notes import collect, notes_of, num_counters, num_notes
from reroute_kernels.triton_kernels._ranks import COARSE, MOST, SLOTS, coarse_bin, rank_key, threshold_key
from reroute_kernels.triton_kernels._shares import collect_share, emit_share, refine_share
from reroute_kernels.triton_kernels._softmax import head_mean, merge_parts
from reroute_kernels.triton_kernels._stages import arrive, role, wait

TILE = 256  # candidates scored at a time; fewer where a model has many heads
LEAST = 1024  # the shortest rows that a kernel is compiled for
SHORT = 4096  # the longest row that one program selects from
SHARE = 2048  # candidates of one program in the later stages of a longer row
CROWD = 8192  # more keys than that near its threshold are told apart in one more stage

# Another batch, prompt or number of kept rows must not compile anew, nor where in one upload the lists begin.
SIZES = ("batch", "scorers", "shares", "num_rows", "widest", "most_kept", "width")
STRIDES = ("source_stride", "candidate_stride", "text_stride")
LISTS = ("candidates", "texts", "positions", "counts")


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
def _make_scores(
    source,
    stride,
    peaks,
    parts,
    batch,
    lists,
    notes,
    scores,
    lead,
    program,
    scorers,
    HEADS: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Store the scores and keys of every ``scorers``-th tile of candidates, and count keys in coarse bins.

    The first tile is ``lead`` candidates shorter.
    """
    FUSED: tl.constexpr = PARTS > 0
    at = program * TILE - lead + tl.arange(0, TILE)
    # Rows are asked for a tile ahead, and of the first tile with the statistics: one wait less.
    rows = tl.load(lists.candidates + at, mask=(at >= 0) & (at < lists.n), other=0).to(tl.int32)
    if FUSED:
        peak, weight = merge_parts(peaks, peaks + batch * PARTS * HEADS, parts, HEADS)
    for _ in range(program * TILE - lead, lists.n, scorers * TILE):
        valid = (at >= 0) & (at < lists.n)
        if FUSED:
            score = head_mean(source, rows, valid, peak, weight, stride, HEADS)
        else:
            score = tl.load(source + at, mask=valid, other=0.0).to(tl.float32)
        key = rank_key(score)
        tl.store(scores + at, score, mask=valid)
        tl.store(notes.keys + at, key, mask=valid)
        at += scorers * TILE
        rows = tl.load(lists.candidates + at, mask=at < lists.n, other=0).to(tl.int32)
        tally = tl.histogram(coarse_bin(key, FUSED), COARSE, mask=valid)
        tl.atomic_add(notes.coarse + tl.arange(0, COARSE), tally, mask=tally > 0, sem="relaxed")


# --- a short row, whose scores are all there -----------------------------------------------


@triton.jit
def _select_alone(lists, notes, FUSED: tl.constexpr, CHUNK: tl.constexpr, TEXTS: tl.constexpr):
    """Of a row of up to CHUNK candidates whose scores are all there."""
    rows, text = load_rows(lists.candidates, 0, lists.n, CHUNK), load_rows(lists.texts, 0, lists.m, TEXTS)
    found, above, first_key, last_key = collect(notes, lists.n, lists.k, 0, FUSED, CHUNK, -1)
    tl.debug_barrier()  # the rivals are read by other threads
    slot = tl.arange(0, SLOTS)
    threshold, ties = threshold_key(
        notes.rivals + slot, slot, found, found, lists.k - above, first_key, last_key, SLOTS
    )
    at = tl.arange(0, CHUNK)
    key = tl.load(notes.keys + at, mask=at < lists.n, other=0)  # again, from the L1 cache: registers are short
    chosen, rank = choose(key, at < lists.n, threshold, ties, 0, 0)
    emit(lists, rows, chosen, rank, text, 0, CHUNK)


@triton.jit(do_not_specialize=SIZES + STRIDES, do_not_specialize_on_alignment=LISTS)
def _select_kernel(
    source,
    candidates,
    texts,
    positions,
    counts,
    notes,
    counters,
    scores,
    kept,
    active,
    active_positions,
    inverse,
    batch,
    scorers,
    shares,
    num_rows,
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
    CROWD: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """``source``: logits if there are PARTS, else scores. A sample has ``scorers`` programs, and if rows are long
    (SEGMENTS is not 0 but a power of two, at least ``shares``) thrice ``shares`` in the later stages.
    """
    TEXTS: tl.constexpr = 1024  # text rows at a time
    FUSED: tl.constexpr = PARTS > 0
    if SEGMENTS > 0:
        stage, sample, program = role(counters, scorers, shares, batch)
    else:
        stage, sample, program = 0, tl.program_id(0) // scorers, tl.program_id(0) % scorers
    # Asked for with the counts, hence before it is known whether there is one.
    first_row = tl.load(candidates + sample.to(tl.int64) * candidate_stride, mask=widest > 0, other=0)
    lists = lists_of(
        candidates, texts, positions, counts, kept, active, active_positions, inverse, batch, sample,
        candidate_stride, text_stride, most_kept, width,
    )  # fmt: skip
    notes = notes_of(notes, counters, batch, sample, shares, widest)
    row, n = sample.to(tl.int64), lists.n
    # The first tile is shorter, so that rows in sequence begin where sectors of 8 logits do.
    lead = tl.where(n > 0, first_row % 8, 0).to(tl.int32)
    # Programs with a tile or share of this sample arrive, and of an empty sample the first one.
    scoring = tl.maximum(tl.minimum(tl.cdiv(n + lead, TILE), scorers), 1)
    sharing = tl.maximum(tl.cdiv(n, SHARE), 1)
    if stage == 0:
        scores += row * widest
        fill(scores, n, widest, -float("inf"), program, scorers, TILE)
        fill(lists.kept, lists.k, most_kept, -1, program, scorers, TILE)
        fill(lists.active, sample * width, lists.first, -1, program, scorers, TILE)
        fill(lists.active_positions, sample * width, lists.first, -1, program, scorers, TILE)
        if program < scoring:
            fill_inverse(lists, counts, batch, sample, num_rows, program, scoring, TILE)
            tiles = tl.cdiv(tl.load(counts + batch + sample).to(tl.int32), BLOCK)
            parts = tl.where(n > 0, tl.cdiv(tiles, tl.maximum(tl.cdiv(tiles, PARTS), 1)), 0) if FUSED else 0
            peaks = source + peaks_at + sample * PARTS * HEADS
            source += row * HEADS * source_stride
            _make_scores(
                source, source_stride, peaks, parts, batch, lists, notes, scores, lead, program, scorers,
                HEADS, PARTS, TILE,
            )  # fmt: skip
            arrived = arrive(notes.scored)
            if SEGMENTS == 0 and arrived == scoring - 1:
                _select_alone(lists, notes, FUSED, SHARE, TEXTS)
    elif SEGMENTS > 0 and program < sharing:
        if stage == 1:
            wait(notes.scored, scoring)
            collect_share(notes, n, lists.k, sharing, program, FUSED, SHARE, CROWD)
        elif stage == 2:
            refine_share(notes, lists.k, sharing, program, FUSED, SHARE, CROWD, SEGMENTS)
        else:
            emit_share(lists, notes, sharing, program, FUSED, SHARE, CROWD, SEGMENTS, TEXTS)


def run_select(
    source: Logits,
    candidates: Tensor,
    texts: Tensor,
    positions: Tensor,
    counts: Tensor,
    counters: Tensor,
    segments: Segments,
) -> Selection:
    """Launch the selection. ValueError for a row of more candidates than the kernel can count.

    counters: ``num_counters(B)`` zeros, int32.
    """
    (batch, widest), device = candidates.shape, candidates.device
    if widest > MOST:
        raise ValueError(f"{widest} candidates in a row: the selection kernel counts up to {MOST}")
    candidates, texts, positions = map(rowwise, (candidates, texts, positions))
    most_kept, width = max(segments.keep), segments.width
    kept = torch.empty(batch, most_kept, dtype=torch.int64, device=device)
    active, active_positions = (torch.empty(batch, width, dtype=torch.int64, device=device) for _ in range(2))
    inverse = torch.empty(positions.shape, dtype=torch.int64, device=device)
    scores = torch.empty(batch, widest, dtype=torch.float32, device=device)
    share, most_shares = _cut(widest)
    shares = -(-widest // share) if most_shares else 0
    tile = min(TILE, max(8192 // _power(source.heads), 16))  # by the model alone: it orders sums
    scorers = min(-(-(widest + 7) // tile), -(-processors(device) // batch))
    _variant(source.heads, source.parts, source.block, tile, share, CROWD if shares else -1, most_shares)(
        ((scorers + 3 * shares) * batch, 1, 1),
        source.logits,
        candidates,
        texts,
        positions,
        counts,
        torch.empty(num_notes(batch, widest, shares), dtype=torch.int32, device=device),
        counters,
        scores,
        kept,
        active,
        active_positions,
        inverse,
        batch,
        scorers,
        shares,
        positions.shape[0],
        source.stride,
        source.peaks_at,
        candidates.stride(0),
        texts.stride(0),
        widest,
        most_kept,
        width,
    )
    return Selection(kept, active, active_positions, inverse, scores)


def _cut(widest: int) -> tuple[int, int]:
    """SHARE and SEGMENTS for rows of up to ``widest`` candidates: each pair of them is compiled for once.

    Of long rows few pairs, since what exceeds the shares is masked: up to 16384 candidates, 65536 and so on.
    """
    if widest <= SHORT:
        return max(_power(widest), LEAST), 0
    segments = 8
    while segments * SHARE < widest:
        segments *= 4
    return SHARE, segments


def widths(most: int) -> list[int]:
    """Of rows of 1 to ``most`` candidates, the shortest one for each kernel that they need."""
    first, shortest = 1, []
    while first <= most:
        shortest.append(first)
        share, segments = _cut(first)
        first = share * max(segments, 1) + 1
    return shortest


def _power(size: int) -> int:
    """The power of two at or above ``size``; of 0 it is 0."""
    return 1 << (size - 1).bit_length() if size else 0


@lru_cache(maxsize=256)
def _variant(heads: int, parts: int, block: int, tile: int, share: int, crowd: int, segments: int) -> Variant:
    constants = {
        "HEADS": heads,
        "PARTS": parts,
        "BLOCK": block,
        "TILE": tile,
        "SHARE": share,
        "CROWD": crowd,
        "SEGMENTS": segments,
    }
    name = f"select, up to {share * max(segments, 1)} candidates"
    return Variant(name, _select_kernel, constants, num_warps=16, maxnreg=128, enable_fp_fusion=False)


def select(
    scores: Tensor,
    candidates: Tensor,
    texts: Tensor,
    positions: Tensor,
    segments: Segments,
    *,
    counts: Tensor | None = None,
) -> Selection:
    """:func:`reroute_kernels.reference.select` in one launch, without a device synchronisation.

    counts: those of ``segments`` on the device, if they are there.
    """
    scores = rowwise(scores)
    source = Logits(scores, scores.stride(0), 0, heads=1, parts=0, block=1)
    counts = segments.counts(scores.device) if counts is None else counts
    counters = counts.new_zeros(num_counters(len(scores)), dtype=torch.int32)
    return run_select(source, candidates, texts, positions, counts, counters, segments)
