"""Radix select of fp32 scores, inside a kernel: ordered integer keys, their buckets, and the key of a given rank.

Only counts decide, never the order in which anything was counted.
"""

from __future__ import annotations

import triton
import triton.language as tl

COARSE_BUCKETS = tl.constexpr(512)  # of `coarse_bucket`
FINE_BUCKETS = tl.constexpr(256)  # of `fine_bucket`
MAX_COUNT = 2**31 // COARSE_BUCKETS.value  # elements that `find_bucket` can count
RADIX_BLOCK = tl.constexpr(512)  # keys of the pivot's bucket that are read together: mostly all of them


@triton.jit
def to_ordered(score):
    """uint32 keys that ascend as the score descends: -0.0 equals +0.0, and a NaN of any sign comes first."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    ascending = tl.where(score != score, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return ascending.to(tl.uint32, bitcast=True) ^ 0x7FFFFFFF


@triton.jit
def coarse_bucket(key, SOFTMAX: tl.constexpr):
    """One of 512 buckets, ascending with the key: for softmax scores 16 to the octave between 2 and 2^-31."""
    if SOFTMAX:
        return tl.minimum(tl.maximum((key >> 19).to(tl.int32) - 0x800, 0), 511)
    else:
        return (key >> 23).to(tl.int32)


@triton.jit
def fine_bucket(key, SOFTMAX: tl.constexpr):
    """One of 256 buckets, ascending with those keys of one coarse bucket that are ``in_same_bucket``."""
    return ((key >> (11 if SOFTMAX else 15)) & 255).to(tl.int32)


@triton.jit
def in_same_bucket(min_key, max_key, SOFTMAX: tl.constexpr):
    """Whether the keys from ``min_key`` to ``max_key`` differ only in lower bits than coarse buckets tell apart.

    Not so in the outermost coarse buckets, which are wider.
    """
    return ((min_key ^ max_key) >> (19 if SOFTMAX else 23)) == 0


@triton.jit
def find_bucket(counts, rank):
    """The bucket of the element with this rank (from 0), and the rank of the element in that bucket."""
    NUM_BUCKETS: tl.constexpr = counts.shape[0]
    count_before = tl.cumsum(counts, 0) - counts
    # One reduction for both.
    last = tl.max(
        tl.where((counts > 0) & (count_before <= rank), count_before * NUM_BUCKETS + tl.arange(0, NUM_BUCKETS), 0), 0
    )
    return last % NUM_BUCKETS, rank - last // NUM_BUCKETS


@triton.jit
def radix_select(keys_ptr, offs, limit, end, remaining_k, min_key, max_key, BLOCK: tl.constexpr):
    """The pivot, which is the ``remaining_k``-th of some keys, and how many keys equal to it are needed.

    The keys lie between ``min_key`` and ``max_key``, and are those at ``keys_ptr + i`` where ``offs + i`` is below
    ``limit``, for i = 0, BLOCK, ... below ``end``. None is needed if ``remaining_k`` is 0.
    """
    # Bits to the left of the shift are the same in all; none are to the right where all keys are equal.
    shift, differing = 0, min_key ^ max_key
    while differing > 0:
        shift += 5
        differing = differing >> 5
    prefix = tl.where(shift < 35, min_key >> tl.minimum(shift, 30), 0)
    rank = tl.maximum(remaining_k - 1, 0)
    while shift > 0:
        shift -= 5
        # Five bits at a time: each warp has all buckets, so find_bucket needs no barrier.
        counts = tl.zeros([32], tl.int32)
        for first in range(0, end, BLOCK):
            mask = offs + first < limit
            digit = (tl.load(keys_ptr + first, mask=mask, other=0) >> shift) ^ (prefix << 5)  # shape of offs
            counts += tl.histogram((digit & 31).to(tl.int32), 32, mask=mask & (digit < 32))
        digit, rank = find_bucket(counts, rank)
        prefix = (prefix << 5) | digit.to(tl.uint32)
    return prefix, tl.minimum(rank + 1, remaining_k)


@triton.jit
def lower_bound(values, mask, sorted_ptr, count):
    """How many of the ``count`` ascending numbers at ``sorted_ptr`` are below each of ``values``: a binary search."""
    low = tl.zeros(values.shape, tl.int32)
    high = low + count
    span = count
    while span > 0:
        middle = (low + high) // 2
        mask_open = mask & (low < high)
        below = mask_open & (tl.load(sorted_ptr + middle, mask=mask_open, other=0) < values)  # shape of values
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
        span = span // 2
    return low
