"""Workspace that the programs of a selection share for a sample: ordered keys, those in the bucket of the pivot, counts
of each chunk, arrival counters and histograms.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .radix import (
    COARSE_BUCKETS,
    FINE_BUCKETS,
    coarse_bucket,
    find_bucket,
    fine_bucket,
)

NUM_COUNTERS = tl.constexpr(COARSE_BUCKETS.value + FINE_BUCKETS.value + 8)  # of one sample: histograms, arrivals


class RowState(NamedTuple):
    """Pointers to the state of one sample."""

    keys_ptr: Any  # [N] ordered keys of all candidates
    bucket_keys_ptr: Any  # [N] of each chunk, those in the coarse bucket of the pivot
    chunk_stats_ptr: Any  # [2, 4, num_chunks] see `store_chunk_stats`; before and after refining
    scored_ptr: Any  # programs that have arrived at the end of each phase
    collected_ptr: Any
    refined_ptr: Any
    coarse_ptr: Any  # [COARSE_BUCKETS] histogram of all keys
    fine_ptr: Any  # [FINE_BUCKETS] histogram of the bucket keys


def num_counters(batch: int) -> int:
    """How many counters a selection needs."""
    return batch * int(NUM_COUNTERS.value)


def num_state_words(batch: int, max_candidates: int, num_chunks: int) -> int:
    """Size of the workspace of a batch, in int32: two lists of keys, and twice four numbers of each chunk."""
    return batch * (2 * max_candidates + 8 * num_chunks)


@triton.jit
def clear_counters(counters_ptr, sample):
    """Make the counters of a sample zero, as the selection must find them."""
    offs = tl.arange(0, 1024)
    tl.store(counters_ptr + sample * NUM_COUNTERS + offs, tl.zeros([1024], tl.int32), mask=offs < NUM_COUNTERS)


@triton.jit
def make_row_state(workspace_ptr, counters_ptr, batch, sample, num_chunks, max_candidates):
    """The state of a sample in the workspace of a batch of rows with up to ``max_candidates`` in ``num_chunks``."""
    keys_ptr = workspace_ptr.to(tl.pointer_type(tl.uint32)) + sample.to(tl.int64) * max_candidates
    chunk_stats_ptr = workspace_ptr + 2 * batch * max_candidates + 8 * num_chunks * sample
    counters_ptr += sample * NUM_COUNTERS
    return RowState(
        keys_ptr,
        keys_ptr + batch * max_candidates,
        chunk_stats_ptr,
        counters_ptr + 1,
        counters_ptr + 2,
        counters_ptr + 3,
        counters_ptr + 8,
        counters_ptr + 8 + COARSE_BUCKETS,
    )


@triton.jit
def collect(state, n, k, base, FUSED: tl.constexpr, CHUNK: tl.constexpr, MAX_BUCKET_KEYS: tl.constexpr):
    """Copy the keys of a chunk that are in the coarse bucket of the pivot to the chunk's part of the bucket keys.

    Returns their number, that of the keys in better buckets, and the least and the greatest of them. If the bucket
    holds more than MAX_BUCKET_KEYS keys of all chunks, they are counted in fine buckets; -1 switches that off.
    """
    offs_n = base + tl.arange(0, CHUNK)
    key = tl.load(state.keys_ptr + offs_n, mask=offs_n < n, other=0)  # [CHUNK]
    counts = tl.load(state.coarse_ptr + tl.arange(0, COARSE_BUCKETS))  # [COARSE_BUCKETS]
    bucket, _ = find_bucket(counts, tl.maximum(k - 1, 0))
    key_bucket = coarse_bucket(key, FUSED)
    mask_bucket, mask_gt = (offs_n < n) & (key_bucket == bucket), (offs_n < n) & (key_bucket < bucket)
    bucket_size = tl.sum(tl.where(tl.arange(0, COARSE_BUCKETS) == bucket, counts, 0), 0)
    if MAX_BUCKET_KEYS >= 0 and bucket_size > MAX_BUCKET_KEYS:
        histogram = tl.histogram(fine_bucket(key, FUSED), FINE_BUCKETS, mask=mask_bucket)
        tl.atomic_add(state.fine_ptr + tl.arange(0, FINE_BUCKETS), histogram, mask=histogram > 0, sem="relaxed")
    return compact(state.bucket_keys_ptr + base, key, mask_bucket, mask_gt)


@triton.jit
def compact(bucket_keys_ptr, key, mask_bucket, mask_gt):
    """Write the keys of ``mask_bucket`` one after the other.

    Returns their number, that of ``mask_gt``, and the least and the greatest of the keys written.
    """
    # Both counts in one scan, 16 bits each.
    packed = mask_bucket.to(tl.int32) | (mask_gt.to(tl.int32) << 16)
    tl.store(bucket_keys_ptr + (tl.cumsum(packed, 0) & 0xFFFF) - 1, key, mask=mask_bucket)
    total = tl.sum(packed, 0)
    min_key, max_key = tl.min(tl.where(mask_bucket, key, 0xFFFFFFFF), 0), tl.max(tl.where(mask_bucket, key, 0), 0)
    return total & 0xFFFF, total >> 16, min_key, max_key
