"""Exact order statistics of fp32 scores, inside a kernel: integer keys and the key of a given rank.

Only counts decide, never the order in which anything was counted.
"""

from __future__ import annotations

import triton
import triton.language as tl

COARSE = tl.constexpr(512)  # bins of `coarse_bin`
FINE = tl.constexpr(256)  # bins of `fine_bin`
MOST = 2**31 // COARSE.value  # elements that `pick` can count
SLOTS = tl.constexpr(512)  # keys that `threshold_key` looks at together: mostly all of them


@triton.jit
def rank_key(score):
    """uint32 keys that ascend as the score descends: -0.0 equals +0.0, and a NaN of any sign comes first."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    ascending = tl.where(score != score, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return ascending.to(tl.uint32, bitcast=True) ^ 0x7FFFFFFF


@triton.jit
def coarse_bin(key, SOFTMAX: tl.constexpr):
    """One of 512 bins, ascending with the key: for softmax scores 16 to the octave between 2 and 2^-31."""
    if SOFTMAX:
        return tl.minimum(tl.maximum((key >> 19).to(tl.int32) - 0x800, 0), 511)
    else:
        return (key >> 23).to(tl.int32)


@triton.jit
def fine_bin(key, SOFTMAX: tl.constexpr):
    """One of 256 bins, ascending with those keys that are of one coarse bin and :func:`are_of_one_bin`."""
    return ((key >> (11 if SOFTMAX else 15)) & 255).to(tl.int32)


@triton.jit
def are_of_one_bin(first_key, last_key, SOFTMAX: tl.constexpr):
    """Whether the keys from the first to the last differ only below coarse bins; the outermost ones are wider."""
    return ((first_key ^ last_key) >> (19 if SOFTMAX else 23)) == 0


@triton.jit
def pick(counts, rank):
    """The bin of the element with this rank, from 0, and its rank in that bin."""
    BINS: tl.constexpr = counts.shape[0]
    before = tl.cumsum(counts, 0) - counts
    # One reduction for both.
    last = tl.max(tl.where((counts > 0) & (before <= rank), before * BINS + tl.arange(0, BINS), 0), 0)
    return last % BINS, rank - last // BINS


@triton.jit
def threshold_key(keys, column, limit, end, need, first_key, last_key, STEP: tl.constexpr):
    """The need-th of some keys, and how many equal to it are needed; none if ``need`` is 0.

    They lie between ``first_key`` and ``last_key``, and are those at ``keys + i`` where ``column + i`` is below
    ``limit``, for i = 0, STEP, ... below ``end``.
    """
    # Bits to the left of the shift are the same in all; none are to the right where all keys are equal.
    shift, differing = 0, first_key ^ last_key
    while differing > 0:
        shift += 5
        differing = differing >> 5
    known = tl.where(shift < 35, first_key >> tl.minimum(shift, 30), 0)
    rank = tl.maximum(need - 1, 0)
    while shift > 0:
        shift -= 5
        counts = tl.zeros([32], tl.int32)  # five bits at a time: each warp has all bins, so to pick needs no barrier
        for first in range(0, end, STEP):
            valid = column + first < limit
            digit = (tl.load(keys + first, mask=valid, other=0) >> shift) ^ (known << 5)
            counts += tl.histogram((digit & 31).to(tl.int32), 32, mask=valid & (digit < 32))
        digit, rank = pick(counts, rank)
        known = (known << 5) | digit.to(tl.uint32)
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
