"""Exact top-k of every sample, in one launch: scores, ordered keys, pivot, ascending indices and active rows.

Many programs make the scores. Of short rows the one that arrives last selects alone. Long rows have more phases
(``reroute_kernels.triton_kernels.topk.chunks``), with a program for every chunk of the row.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import Selection, SelectRows
from .launch import SpecializedKernel, last_dim_contiguous, num_sms
from .topk.chunks import collect_chunk, emit_chunk, refine_chunk
from .topk.emit import (
    choose,
    emit,
    fill,
    fill_inverse,
    load_rows,
    make_row_inputs,
    make_row_outputs,
)
from .topk.phases import arrive, tile_scheduler, wait
from .topk.radix import (
    COARSE_BUCKETS,
    MAX_COUNT,
    RADIX_BLOCK,
    coarse_bucket,
    radix_select,
    to_ordered,
)
from .topk.row_state import collect, make_row_state, num_counters, num_state_words
from .topk.softmax import combine_splits, head_mean

BLOCK_N = 256  # candidates scored at a time; fewer where a model has many heads
MIN_CHUNK = 1024  # the shortest rows that a kernel is compiled for
MAX_ONE_PROGRAM = 4096  # the longest row that one program selects from
CHUNK = 2048  # candidates of one program in the later phases of a longer row
MAX_BUCKET_KEYS = 8192  # more keys than that in the bucket of the pivot are told apart in one more phase

# Another batch, prompt or k must not compile anew, nor where in one upload the index lists begin.
SIZES = ("batch", "num_score_programs", "num_chunks", "num_rows", "max_candidates", "max_k", "compact_length")
STRIDES = ("stride_source", "stride_candidates", "stride_texts")
LISTS = ("candidates_ptr", "texts_ptr", "positions_ptr", "counts_ptr")


class Logits(NamedTuple):
    """What the score launch leaves: (B, H, stride) logits in base 2, and from ``stats_offset`` on the maxima and then
    the sums of (B, num_splits, H). With one head and no splits it is scores.
    """

    logits: Tensor
    stride: int
    stats_offset: int
    num_qo_heads: int
    num_splits: int
    split_block_n: int


# --- phase 0: scores -------------------------------------------------------------------------


@triton.jit
def _make_scores(
    source_ptr,
    stride_h,
    stats_ptr,
    num_splits,
    batch,
    inputs,
    state,
    scores_ptr,
    align_offset,
    program,
    num_score_programs,
    NUM_QO_HEADS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Store the scores and keys of every ``num_score_programs``-th tile of candidates, and count keys in buckets.

    The first tile is ``align_offset`` candidates shorter.
    """
    FUSED: tl.constexpr = NUM_SPLITS > 0
    offs_n = program * BLOCK_N - align_offset + tl.arange(0, BLOCK_N)
    # Rows [BLOCK_N] are asked for a tile ahead, and of the first tile with the statistics: one wait less.
    rows = tl.load(inputs.candidates_ptr + offs_n, mask=(offs_n >= 0) & (offs_n < inputs.n), other=0).to(tl.int32)
    if FUSED:
        m_i, weight = combine_splits(stats_ptr, stats_ptr + batch * NUM_SPLITS * NUM_QO_HEADS, num_splits, NUM_QO_HEADS)
    for _ in range(program * BLOCK_N - align_offset, inputs.n, num_score_programs * BLOCK_N):
        mask_n = (offs_n >= 0) & (offs_n < inputs.n)
        if FUSED:
            score = head_mean(source_ptr, rows, mask_n, m_i, weight, stride_h, NUM_QO_HEADS)  # [BLOCK_N]
        else:
            score = tl.load(source_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)  # [BLOCK_N]
        key = to_ordered(score)
        tl.store(scores_ptr + offs_n, score, mask=mask_n)
        tl.store(state.keys_ptr + offs_n, key, mask=mask_n)
        offs_n += num_score_programs * BLOCK_N
        rows = tl.load(inputs.candidates_ptr + offs_n, mask=offs_n < inputs.n, other=0).to(tl.int32)  # [BLOCK_N]
        histogram = tl.histogram(coarse_bucket(key, FUSED), COARSE_BUCKETS, mask=mask_n)
        tl.atomic_add(state.coarse_ptr + tl.arange(0, COARSE_BUCKETS), histogram, mask=histogram > 0, sem="relaxed")


# --- a short row, whose scores are all there -----------------------------------------------


@triton.jit
def _select_alone(inputs, outputs, state, FUSED: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr):
    """Select from a row of up to CHUNK candidates whose scores are all there."""
    rows = load_rows(inputs.candidates_ptr, 0, inputs.n, CHUNK)  # [CHUNK]
    texts = load_rows(inputs.texts_ptr, 0, inputs.m, BLOCK_T)  # [BLOCK_T]
    bucket_count, gt_count, min_key, max_key = collect(state, inputs.n, inputs.k, 0, FUSED, CHUNK, -1)
    tl.debug_barrier()  # the bucket keys are read by other threads
    offs = tl.arange(0, RADIX_BLOCK)
    keys_ptr, remaining_k = state.bucket_keys_ptr + offs, inputs.k - gt_count
    pivot, num_ties = radix_select(
        keys_ptr, offs, bucket_count, bucket_count, remaining_k, min_key, max_key, RADIX_BLOCK
    )
    offs_n = tl.arange(0, CHUNK)
    # Read again, from the L1 cache: registers are short.
    key = tl.load(state.keys_ptr + offs_n, mask=offs_n < inputs.n, other=0)  # [CHUNK]
    mask_kept, rank = choose(key, offs_n < inputs.n, pivot, num_ties, 0, 0)  # [CHUNK] each
    emit(inputs, outputs, rows, mask_kept, rank, texts, 0, CHUNK)


@triton.jit(do_not_specialize=SIZES + STRIDES, do_not_specialize_on_alignment=LISTS)
def _select_kernel(
    source_ptr,
    candidates_ptr,
    texts_ptr,
    positions_ptr,
    counts_ptr,
    workspace_ptr,
    counters_ptr,
    scores_ptr,
    kept_ptr,
    active_rows_ptr,
    active_positions_ptr,
    inverse_ptr,
    batch,
    num_score_programs,
    num_chunks,
    num_rows,
    stride_source,
    stats_offset,
    stride_candidates,
    stride_texts,
    max_candidates,
    max_k,
    compact_length,
    NUM_QO_HEADS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    SPLIT_BLOCK_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    MAX_BUCKET_KEYS: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    FILLERS_LAST: tl.constexpr,
):
    """``source_ptr``: logits if there are NUM_SPLITS, else scores.

    A sample has ``num_score_programs`` programs, and if rows are long (MAX_CHUNKS is not 0 but a power of two, at
    least ``num_chunks``) ``num_chunks`` more in each of three later phases.
    """
    BLOCK_T: tl.constexpr = 1024  # text rows at a time
    FUSED: tl.constexpr = NUM_SPLITS > 0
    if MAX_CHUNKS > 0:
        phase, sample, program = tile_scheduler(counters_ptr, num_score_programs, num_chunks, batch)
    else:
        phase, sample, program = 0, tl.program_id(0) // num_score_programs, tl.program_id(0) % num_score_programs
    # Loaded along with the counts, hence before it is known whether there is one.
    first_row = tl.load(candidates_ptr + sample.to(tl.int64) * stride_candidates, mask=max_candidates > 0, other=0)
    inputs = make_row_inputs(
        candidates_ptr, texts_ptr, positions_ptr, counts_ptr, batch, sample, stride_candidates, stride_texts
    )
    outputs = make_row_outputs(
        inputs, kept_ptr, active_rows_ptr, active_positions_ptr, inverse_ptr, sample, max_k, compact_length,
        FILLERS_LAST,
    )  # fmt: skip
    state = make_row_state(workspace_ptr, counters_ptr, batch, sample, num_chunks, max_candidates)
    sample_i64, n = sample.to(tl.int64), inputs.n
    # The first tile is shorter, so that rows in sequence begin where sectors of 8 logits do.
    align_offset = tl.where(n > 0, first_row % 8, 0).to(tl.int32)
    # Programs with a tile or chunk of this sample arrive, and of an empty sample the first one.
    num_scoring = tl.maximum(tl.minimum(tl.cdiv(n + align_offset, BLOCK_N), num_score_programs), 1)
    num_chunks_here = tl.maximum(tl.cdiv(n, CHUNK), 1)
    if phase == 0:
        scores_ptr += sample_i64 * max_candidates
        fill(scores_ptr, n, max_candidates, -float("inf"), program, num_score_programs, BLOCK_N)
        fill(outputs.kept_ptr, inputs.k, max_k, -1, program, num_score_programs, BLOCK_N)
        begin, end = outputs.fillers, outputs.end_fillers
        fill(outputs.active_rows_ptr, begin, end, -1, program, num_score_programs, BLOCK_N)
        fill(outputs.active_positions_ptr, begin, end, -1, program, num_score_programs, BLOCK_N)
        if program < num_scoring:
            fill_inverse(inputs, outputs, counts_ptr, batch, sample, num_rows, program, num_scoring, BLOCK_N)
            num_tiles = tl.cdiv(tl.load(counts_ptr + batch + sample).to(tl.int32), SPLIT_BLOCK_N)
            tiles_per_split = tl.maximum(tl.cdiv(num_tiles, NUM_SPLITS), 1) if FUSED else 1
            num_splits = tl.where(n > 0, tl.cdiv(num_tiles, tiles_per_split), 0) if FUSED else 0
            stats_ptr = source_ptr + stats_offset + sample * NUM_SPLITS * NUM_QO_HEADS
            source_ptr += sample_i64 * NUM_QO_HEADS * stride_source
            _make_scores(
                source_ptr, stride_source, stats_ptr, num_splits, batch, inputs, state, scores_ptr, align_offset,
                program, num_score_programs, NUM_QO_HEADS, NUM_SPLITS, BLOCK_N,
            )  # fmt: skip
            arrived = arrive(state.scored_ptr)
            if MAX_CHUNKS == 0 and arrived == num_scoring - 1:
                _select_alone(inputs, outputs, state, FUSED, CHUNK, BLOCK_T)
    elif MAX_CHUNKS > 0 and program < num_chunks_here:
        if phase == 1:
            wait(state.scored_ptr, num_scoring)
            collect_chunk(state, n, inputs.k, num_chunks_here, program, FUSED, CHUNK, MAX_BUCKET_KEYS)
        elif phase == 2:
            refine_chunk(state, inputs.k, num_chunks_here, program, FUSED, CHUNK, MAX_BUCKET_KEYS, MAX_CHUNKS)
        else:
            emit_chunk(
                inputs, outputs, state, num_chunks_here, program, FUSED, CHUNK, MAX_BUCKET_KEYS, MAX_CHUNKS, BLOCK_T
            )


def launch_select(source: Logits, rows: SelectRows, counts: Tensor, counters: Tensor) -> Selection:
    """Launch the selection.

    Args:
        source: logits, or scores.
        rows: what is selected from.
        counts: (5, B) int64, those of ``rows.metadata`` on the device.
        counters: ``num_counters(B)`` zeros, int32.

    Raises:
        ValueError: a row has more candidates than the kernel can count.
    """
    (batch, max_candidates), device, metadata = rows.candidates.shape, rows.candidates.device, rows.metadata
    if max_candidates > MAX_COUNT:
        raise ValueError(f"{max_candidates} candidates in a row: the selection kernel counts up to {MAX_COUNT}")
    candidates, text_rows, positions = map(last_dim_contiguous, rows[:3])
    max_k, compact_length = max(metadata.k), metadata.compact_length
    kept = torch.empty(batch, max_k, dtype=torch.int64, device=device)
    active_rows, active_positions = (
        torch.empty(batch, compact_length, dtype=torch.int64, device=device) for _ in range(2)
    )
    inverse_index = torch.empty(positions.shape, dtype=torch.int64, device=device)
    scores = torch.empty(batch, max_candidates, dtype=torch.float32, device=device)
    chunk, max_chunks = _chunking(max_candidates)
    num_chunks = -(-max_candidates // chunk) if max_chunks else 0
    block_n = min(BLOCK_N, max(8192 // _next_power_of_2(source.num_qo_heads), 16))  # by the model alone: it orders sums
    num_score_programs = min(-(-(max_candidates + 7) // block_n), -(-num_sms(device) // batch))
    _specialized(
        source.num_qo_heads,
        source.num_splits,
        source.split_block_n,
        block_n,
        chunk,
        MAX_BUCKET_KEYS if num_chunks else -1,
        max_chunks,
        metadata.static_length is not None,
    )(
        ((num_score_programs + 3 * num_chunks) * batch, 1, 1),
        source.logits,
        candidates,
        text_rows,
        positions,
        counts,
        torch.empty(num_state_words(batch, max_candidates, num_chunks), dtype=torch.int32, device=device),
        counters,
        scores,
        kept,
        active_rows,
        active_positions,
        inverse_index,
        batch,
        num_score_programs,
        num_chunks,
        positions.shape[0],
        source.stride,
        source.stats_offset,
        candidates.stride(0),
        text_rows.stride(0),
        max_candidates,
        max_k,
        compact_length,
    )
    return Selection(kept, active_rows, active_positions, inverse_index, scores)


def _chunking(max_candidates: int) -> tuple[int, int]:
    """CHUNK and MAX_CHUNKS for rows of up to ``max_candidates`` candidates: each pair of them is compiled for once.

    Of long rows few pairs, since what exceeds the shares is masked: up to 16384 candidates, 65536 and so on.
    """
    if max_candidates <= MAX_ONE_PROGRAM:
        return max(_next_power_of_2(max_candidates), MIN_CHUNK), 0
    chunks = 8
    while chunks * CHUNK < max_candidates:
        chunks *= 4
    return CHUNK, chunks


def row_classes(most: int) -> list[int]:
    """Of rows of 1 to ``most`` candidates, the shortest one for each kernel that they need."""
    first, shortest = 1, []
    while first <= most:
        shortest.append(first)
        chunk, chunks = _chunking(first)
        first = chunk * max(chunks, 1) + 1
    return shortest


def _next_power_of_2(size: int) -> int:
    """The power of two at or above ``size``; of 0 it is 0."""
    return 1 << (size - 1).bit_length() if size else 0


@lru_cache(maxsize=256)
def _specialized(
    num_qo_heads: int,
    num_splits: int,
    split_block_n: int,
    block_n: int,
    chunk: int,
    max_bucket_keys: int,
    max_chunks: int,
    fillers_last: bool,
) -> SpecializedKernel:
    constants = {
        "NUM_QO_HEADS": num_qo_heads,
        "NUM_SPLITS": num_splits,
        "SPLIT_BLOCK_N": split_block_n,
        "BLOCK_N": block_n,
        "CHUNK": chunk,
        "MAX_BUCKET_KEYS": max_bucket_keys,
        "MAX_CHUNKS": max_chunks,
        "FILLERS_LAST": fillers_last,
    }
    name = f"select, up to {chunk * max(max_chunks, 1)} candidates{', fillers last' if fillers_last else ''}"
    return SpecializedKernel(name, _select_kernel, constants, num_warps=16, maxnreg=128, enable_fp_fusion=False)


def select(scores: Tensor, rows: SelectRows, *, counts: Tensor | None = None) -> Selection:
    """``reroute_kernels.reference.select`` in one launch, without a device synchronisation.

    Args:
        counts: those of ``rows.metadata`` on the device, if they are there.
    """
    scores = last_dim_contiguous(scores)
    source = Logits(scores, scores.stride(0), 0, num_qo_heads=1, num_splits=0, split_block_n=1)
    counts = rows.metadata.counts(scores.device) if counts is None else counts
    counters = counts.new_zeros(num_counters(len(scores)), dtype=torch.int32)
    return launch_select(source, rows, counts, counters)
