"""Exact order statistics of fp32 scores, inside a kernel: integer keys and the key of a given rank.

Only counts decide, never the order in which anything was counted.
"""

from __future__ import annotations

import triton
import triton.language as tl

COARSE = 1024  # bins of `coarse_bin`


@triton.jit
def rank_key(score):
    """uint32 keys that ascend as the score descends: -0.0 equals +0.0, and a NaN of any sign comes first."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    ascending = tl.where(score != score, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return ascending.to(tl.uint32, bitcast=True) ^ 0x7FFFFFFF


@triton.jit
def coarse_bin(key, SOFTMAX: tl.constexpr):
    """One of 1024 bins, ascending with the key: for softmax scores 32 to the octave between 1 and 2^-32."""
    if SOFTMAX:
        FIRST: tl.constexpr = 0x407FFFFF  # the key of 1.0
        behind = tl.where(key > FIRST, key - FIRST, 0) >> 18
        return tl.minimum(behind, 1023).to(tl.int32)
    else:
        return (key >> 22).to(tl.int32)


@triton.jit
def pick(counts, rank):
    """The bin of the element with this rank, from 0, and its rank in that bin."""
    before = tl.cumsum(counts, 0) - counts
    # One reduction for both; of the bins that are not empty each has another number before it.
    skipped, bin = tl.max(tl.where((counts > 0) & (before <= rank), before, -1), 0, return_indices=True)
    return bin, rank - skipped


@triton.jit
def threshold_key(keys, column, limit, most, need, STEP: tl.constexpr):
    """The need-th of all keys, eight bits at a time, and how many equal to it are needed; none if ``need`` is 0.

    The keys are those at ``keys + i`` where ``column + i`` is below ``limit``, for i = 0, STEP, ... below ``most``.
    """
    known = tl.zeros([], tl.uint32)
    rank = tl.maximum(need - 1, 0)
    for shift in tl.static_range(24, -1, -8):
        counts = tl.zeros([256], tl.int32)  # more bins would take fewer turns, but each costs in proportion
        for first in range(0, most, STEP):
            valid = column + first < limit
            key = tl.load(keys + first, mask=valid, other=0) >> shift
            counts += tl.histogram((key & 255).to(tl.int32), 256, mask=valid & ((key ^ known) < 256))
        bin, rank = pick(counts, rank)
        known = known | bin.to(tl.uint32)
        if shift > 0:
            known = known << 8
    return known, tl.minimum(rank + 1, need)


@triton.jit
def count_below(values, valid, ascending, count):
    """How many of ``ascending[:count]`` are below each of ``values``: a binary search."""
    low = tl.zeros(values.shape, tl.int32)
    high = low + count
    span = count
    while span > 0:
        middle = (low + high) // 2
        open = valid & (low < high)
        below = open & (tl.load(ascending + middle, mask=open, other=0) < values)
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
        span = span // 2
    return low
