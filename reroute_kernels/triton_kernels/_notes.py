"""What the programs of a selection tell each other about a sample, and the first thing they tell: the keys near the
threshold.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from reroute_kernels.triton_kernels._ranks import COARSE, FINE, coarse_bin, fine_bin, pick

COUNTERS = tl.constexpr(COARSE.value + FINE.value + 8)  # of one sample: two histograms, and arrivals


class Notes(NamedTuple):
    """Of one sample: keys, those near the threshold, which are rivals for the last places, and what is noted of each
    share of them; how many programs have scored, collected and refined; the histograms of all keys and of rivals.
    """

    keys: Any
    rivals: Any
    tallies: Any
    scored: Any
    collected: Any
    refined: Any
    coarse: Any
    fine: Any


def num_counters(batch: int) -> int:
    """How many counters a selection needs."""
    return batch * int(COUNTERS.value)


def num_notes(batch: int, widest: int, shares: int) -> int:
    """How many notes: two lists of keys, and of each share two times four numbers."""
    return batch * (2 * widest + 8 * shares)


@triton.jit
def clear_counters(counters, sample):
    """Make the counters of a sample zero, as the selection must find them."""
    at = tl.arange(0, 1024)
    tl.store(counters + sample * COUNTERS + at, tl.zeros([1024], tl.int32), mask=at < COUNTERS)


@triton.jit
def notes_of(notes, counters, batch, sample, shares, widest):
    """The notes of a sample of a batch, of which no row is longer than ``widest`` or has more than ``shares``."""
    keys = notes.to(tl.pointer_type(tl.uint32)) + sample.to(tl.int64) * widest
    tallies = notes + 2 * batch * widest + 8 * shares * sample
    counters += sample * COUNTERS
    return Notes(
        keys,
        keys + batch * widest,
        tallies,
        counters + 1,
        counters + 2,
        counters + 3,
        counters + 8,
        counters + 8 + COARSE,
    )


@triton.jit
def collect(notes, n, k, base, FUSED: tl.constexpr, SHARE: tl.constexpr, CROWD: tl.constexpr):
    """Copy the keys of a share that are in the bin of the threshold to the share's place among the rivals.

    Their number, that of the keys in better bins, and the first and the last of them. If the bin holds more than CROWD
    keys of all shares, they are counted in fine bins; a CROWD of -1 is none.
    """
    at = base + tl.arange(0, SHARE)
    key = tl.load(notes.keys + at, mask=at < n, other=0)
    counts = tl.load(notes.coarse + tl.arange(0, COARSE))
    best, _ = pick(counts, tl.maximum(k - 1, 0))
    bin = coarse_bin(key, FUSED)
    rival, above = (at < n) & (bin == best), (at < n) & (bin < best)
    if CROWD >= 0 and tl.sum(tl.where(tl.arange(0, COARSE) == best, counts, 0), 0) > CROWD:
        tally = tl.histogram(fine_bin(key, FUSED), FINE, mask=rival)
        tl.atomic_add(notes.fine + tl.arange(0, FINE), tally, mask=tally > 0, sem="relaxed")
    return compact(notes.rivals + base, key, rival, above)


@triton.jit
def compact(rivals, key, rival, better):
    """Write the keys that are rivals one after the other.

    Their number, that of the better keys, and the first and the last of the rivals.
    """
    # Both counts in one scan, 16 bits each.
    packed = rival.to(tl.int32) | (better.to(tl.int32) << 16)
    tl.store(rivals + (tl.cumsum(packed, 0) & 0xFFFF) - 1, key, mask=rival)
    total = tl.sum(packed, 0)
    first_key, last_key = tl.min(tl.where(rival, key, 0xFFFFFFFF), 0), tl.max(tl.where(rival, key, 0), 0)
    return total & 0xFFFF, total >> 16, first_key, last_key
