"""The few smallest of a row's keys, found and marked as taken by one program, however long the row is."""

from __future__ import annotations

import triton
import triton.language as tl

from .emit import choose
from .radix import COARSE_BUCKETS, RADIX_BLOCK, coarse_bucket, find_bucket, radix_select
from .row_state import compact

TAKEN = tl.constexpr(0xFFFFFFFF)  # the key of a candidate that was picked: behind all others


@triton.jit
def similarity_to_ordered(similarity):
    """uint32 keys that ascend with a similarity of 0 to 1; a NaN comes first.

    An offset brings them where ``coarse_bucket`` of softmax scores has 16 buckets to the octave.
    """
    return tl.where(similarity == similarity, similarity.to(tl.uint32, bitcast=True) + 0x10000000, 0)


@triton.jit
def pick_smallest(state, picks_ptr, n, count, SOFTMAX: tl.constexpr, CHUNK: tl.constexpr):
    """Write the ascending indices of the ``count`` smallest keys, ties to the lower one, and mark them as ``TAKEN``.

    All keys that are not taken have been counted in ``coarse_bucket``, and are at least ``count``.
    """
    counts = tl.load(state.coarse_ptr + tl.arange(0, COARSE_BUCKETS))  # [COARSE_BUCKETS]
    bucket, _ = find_bucket(counts, count - 1)
    offs = tl.arange(0, CHUNK)
    bucket_count, gt_count, min_key, max_key = 0, 0, tl.full([], TAKEN, tl.uint32), tl.full([], 0, tl.uint32)
    next_key = tl.load(state.keys_ptr + offs, mask=offs < n, other=TAKEN)  # [CHUNK], a chunk ahead: one wait for all
    for base in range(0, n, CHUNK):
        key, mask = next_key, offs < n - base
        next_key = tl.load(state.keys_ptr + base + CHUNK + offs, mask=offs < n - base - CHUNK, other=TAKEN)  # [CHUNK]
        key_bucket = coarse_bucket(key, SOFTMAX)
        bucket_keys_ptr = state.bucket_keys_ptr + bucket_count
        found, better, least, greatest = compact(
            bucket_keys_ptr, key, mask & (key_bucket == bucket), mask & (key_bucket < bucket)
        )
        bucket_count += found
        gt_count += better
        min_key, max_key = tl.minimum(min_key, least), tl.maximum(max_key, greatest)
    tl.debug_barrier()  # the bucket keys are read by other threads
    offs_r = tl.arange(0, RADIX_BLOCK)
    pivot, num_ties = radix_select(
        state.bucket_keys_ptr + offs_r, offs_r, bucket_count, bucket_count, count - gt_count, min_key, max_key,
        RADIX_BLOCK,
    )  # fmt: skip
    gt_before, eq_before = 0, 0
    next_key = tl.load(state.keys_ptr + offs, mask=offs < n, other=TAKEN)  # [CHUNK]
    for base in range(0, n, CHUNK):
        key, mask = next_key, offs < n - base
        next_key = tl.load(state.keys_ptr + base + CHUNK + offs, mask=offs < n - base - CHUNK, other=TAKEN)  # [CHUNK]
        mask_pick, rank = choose(key, mask, pivot, num_ties, gt_before, eq_before)  # [CHUNK] each
        tl.store(picks_ptr + rank - 1, base + offs, mask=mask_pick)
        tl.store(state.keys_ptr + base + offs, tl.full([CHUNK], TAKEN, tl.uint32), mask=mask_pick)
        gt_before += tl.sum((mask & (key < pivot)).to(tl.int32), 0)
        eq_before += tl.sum((mask & (key == pivot)).to(tl.int32), 0)
