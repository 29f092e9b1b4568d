"""The later phases of a long row's selection, each with a program for every chunk of the row.

Collect copies the keys in the coarse bucket of the pivot. Where they are many, refine finds the fine bucket of the
pivot and keeps only the keys in it, since every program of the last phase reads the bucket keys of all chunks. Emit
writes what is kept.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .emit import choose, emit, load_rows
from .phases import arrive, wait
from .radix import (
    FINE_BUCKETS,
    RADIX_BLOCK,
    find_bucket,
    fine_bucket,
    in_same_bucket,
    radix_select,
)
from .row_state import collect, compact


@triton.jit
def store_chunk_stats(chunk_stats_ptr, num_chunks, chunk, bucket_count, gt_count, min_key, max_key):
    """Publish the counts of one chunk: keys in the bucket, better keys, least and greatest key in the bucket."""
    chunk_stats_ptr += chunk
    tl.store(chunk_stats_ptr, bucket_count)
    tl.store(chunk_stats_ptr + num_chunks, gt_count)
    tl.store(chunk_stats_ptr + 2 * num_chunks, min_key.to(tl.int32, bitcast=True))
    tl.store(chunk_stats_ptr + 3 * num_chunks, max_key.to(tl.int32, bitcast=True))


@triton.jit
def load_chunk_stats(chunk_stats_ptr, num_chunks, MAX_CHUNKS: tl.constexpr):
    """Read the counts of all chunks [MAX_CHUNKS], and the least and the greatest key in the bucket."""
    offs_c = tl.arange(0, MAX_CHUNKS)
    mask_c = offs_c < num_chunks  # [MAX_CHUNKS], as all that is loaded here
    bucket_count = tl.load(chunk_stats_ptr + offs_c, mask=mask_c, other=0)
    gt_count = tl.load(chunk_stats_ptr + num_chunks + offs_c, mask=mask_c, other=0)
    min_keys = tl.load(chunk_stats_ptr + 2 * num_chunks + offs_c, mask=mask_c, other=-1).to(tl.uint32, bitcast=True)
    max_keys = tl.load(chunk_stats_ptr + 3 * num_chunks + offs_c, mask=mask_c, other=0).to(tl.uint32, bitcast=True)
    return bucket_count, gt_count, tl.min(min_keys, 0), tl.max(max_keys, 0)


@triton.jit
def needs_refine(bucket_count, min_key, max_key, FUSED: tl.constexpr, MAX_BUCKET_KEYS: tl.constexpr):
    """Whether the keys in the bucket are told apart by fine buckets."""
    return (tl.sum(bucket_count, 0) > MAX_BUCKET_KEYS) & (min_key != max_key) & in_same_bucket(min_key, max_key, FUSED)


@triton.jit
def collect_chunk(
    state, n, k, num_chunks, chunk, FUSED: tl.constexpr, CHUNK: tl.constexpr, MAX_BUCKET_KEYS: tl.constexpr
):
    """Collect the bucket keys of one chunk."""
    bucket_count, gt_count, min_key, max_key = collect(state, n, k, chunk * CHUNK, FUSED, CHUNK, MAX_BUCKET_KEYS)
    store_chunk_stats(state.chunk_stats_ptr, num_chunks, chunk, bucket_count, gt_count, min_key, max_key)
    arrive(state.collected_ptr)


@triton.jit
def refine_chunk(
    state,
    k,
    num_chunks,
    chunk,
    FUSED: tl.constexpr,
    CHUNK: tl.constexpr,
    MAX_BUCKET_KEYS: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
):
    """Once all chunks are collected, and if their bucket keys are many: keep those of this chunk in the fine bucket."""
    wait(state.collected_ptr, num_chunks)
    bucket_count, gt_count, min_key, max_key = load_chunk_stats(state.chunk_stats_ptr, num_chunks, MAX_CHUNKS)
    if needs_refine(bucket_count, min_key, max_key, FUSED, MAX_BUCKET_KEYS):
        remaining_k = tl.maximum(k - tl.sum(gt_count, 0), 1)
        bucket, _ = find_bucket(
            tl.load(state.fine_ptr + tl.arange(0, FINE_BUCKETS)),  # [FINE_BUCKETS]
            remaining_k - 1,
        )
        offs, own_keys_ptr = tl.arange(0, CHUNK), state.bucket_keys_ptr + chunk * CHUNK
        own_count = tl.load(state.chunk_stats_ptr + chunk)
        key = tl.load(own_keys_ptr + offs, mask=offs < own_count, other=0)  # [CHUNK]
        tl.debug_barrier()  # all have read before one writes
        key_bucket = fine_bucket(key, FUSED)
        mask_bucket, mask_gt = (offs < own_count) & (key_bucket == bucket), (offs < own_count) & (key_bucket < bucket)
        left, better, min_key, max_key = compact(own_keys_ptr, key, mask_bucket, mask_gt)
        better += tl.load(state.chunk_stats_ptr + num_chunks + chunk)
        refined_stats_ptr = state.chunk_stats_ptr + 4 * num_chunks
        store_chunk_stats(refined_stats_ptr, num_chunks, chunk, left, better, min_key, max_key)
        arrive(state.refined_ptr)


@triton.jit
def find_pivot(
    state,
    num_chunks,
    k,
    chunk,
    FUSED: tl.constexpr,
    CHUNK: tl.constexpr,
    MAX_BUCKET_KEYS: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
):
    """From the counts of all chunks: the pivot, and how many keys equal to it are kept.

    Also how many keys of earlier chunks are better than the pivot, and how many equal it.
    """
    BLOCK: tl.constexpr = max(RADIX_BLOCK // MAX_CHUNKS, 32)
    chunk_stats_ptr = state.chunk_stats_ptr
    bucket_count, gt_count, min_key, max_key = load_chunk_stats(chunk_stats_ptr, num_chunks, MAX_CHUNKS)
    if needs_refine(bucket_count, min_key, max_key, FUSED, MAX_BUCKET_KEYS):
        wait(state.refined_ptr, num_chunks)
        chunk_stats_ptr += 4 * num_chunks
        bucket_count, gt_count, min_key, max_key = load_chunk_stats(chunk_stats_ptr, num_chunks, MAX_CHUNKS)
    offs = tl.arange(0, MAX_CHUNKS * BLOCK)
    owner, column = offs // BLOCK, offs % BLOCK
    counts = tl.load(chunk_stats_ptr + owner, mask=owner < num_chunks, other=0)  # [MAX_CHUNKS * BLOCK]
    end = tl.max(bucket_count, 0)
    bucket_keys_ptr = state.bucket_keys_ptr + owner * CHUNK + column
    pivot, num_ties = radix_select(
        bucket_keys_ptr, column, counts, end, k - tl.sum(gt_count, 0), min_key, max_key, BLOCK
    )
    gt_earlier, eq_earlier = tl.zeros(offs.shape, tl.int32), tl.zeros(offs.shape, tl.int32)
    for first in range(0, end, BLOCK):
        mask_earlier = (column + first < counts) & (owner < chunk)
        key = tl.load(bucket_keys_ptr + first, mask=mask_earlier, other=0)  # [MAX_CHUNKS * BLOCK]
        gt_earlier += (mask_earlier & (key < pivot)).to(tl.int32)
        eq_earlier += (mask_earlier & (key == pivot)).to(tl.int32)
    gt_before = tl.sum(tl.where(tl.arange(0, MAX_CHUNKS) < chunk, gt_count, 0), 0) + tl.sum(gt_earlier, 0)
    return pivot, num_ties, gt_before, tl.sum(eq_earlier, 0)


@triton.jit
def emit_chunk(
    inputs,
    outputs,
    state,
    num_chunks,
    chunk,
    FUSED: tl.constexpr,
    CHUNK: tl.constexpr,
    MAX_BUCKET_KEYS: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Once all chunks are collected: write what is kept of this one."""
    base = chunk * CHUNK
    rows = load_rows(inputs.candidates_ptr, base, inputs.n, CHUNK)  # [CHUNK]
    texts = load_rows(inputs.texts_ptr, 0, inputs.m, BLOCK_T)  # [BLOCK_T]
    wait(state.collected_ptr, num_chunks)
    offs_n = base + tl.arange(0, CHUNK)
    key = tl.load(state.keys_ptr + offs_n, mask=offs_n < inputs.n, other=0)  # [CHUNK]
    pivot, num_ties, gt_before, eq_before = find_pivot(
        state, num_chunks, inputs.k, chunk, FUSED, CHUNK, MAX_BUCKET_KEYS, MAX_CHUNKS
    )
    mask_kept, rank = choose(key, offs_n < inputs.n, pivot, num_ties, gt_before, eq_before)  # [CHUNK] each
    emit(inputs, outputs, rows, mask_kept, rank, texts, base, CHUNK)
