"""The later stages of a long row's selection: programs that each have a share of it.

They collect the keys that are in the bin of the threshold, its rivals. Where these are a crowd, they find a finer bin
and collect once more, for every program that emits looks at the rivals of all shares. Then they emit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from reroute_kernels.triton_kernels._emission import choose, emit, load_rows
from reroute_kernels.triton_kernels._notes import collect, compact
from reroute_kernels.triton_kernels._ranks import FINE, SLOTS, are_of_one_bin, fine_bin, pick, threshold_key
from reroute_kernels.triton_kernels._stages import arrive, wait


@triton.jit
def _note(tallies, shares, share, found, above, first_key, last_key):
    """What one share tells: its rivals, how many keys are better, and the first and the last of the rivals."""
    tallies += share
    tl.store(tallies, found)
    tl.store(tallies + shares, above)
    tl.store(tallies + 2 * shares, first_key.to(tl.int32, bitcast=True))
    tl.store(tallies + 3 * shares, last_key.to(tl.int32, bitcast=True))


@triton.jit
def _read(tallies, shares, SEGMENTS: tl.constexpr):
    """What all shares tell: rivals and better keys of each, and the first and the last of all rivals."""
    each = tl.arange(0, SEGMENTS)
    real = each < shares
    found = tl.load(tallies + each, mask=real, other=0)
    above = tl.load(tallies + shares + each, mask=real, other=0)
    first_keys = tl.load(tallies + 2 * shares + each, mask=real, other=-1).to(tl.uint32, bitcast=True)
    last_keys = tl.load(tallies + 3 * shares + each, mask=real, other=0).to(tl.uint32, bitcast=True)
    return found, above, tl.min(first_keys, 0), tl.max(last_keys, 0)


@triton.jit
def _is_crowd(found, first_key, last_key, FUSED: tl.constexpr, CROWD: tl.constexpr):
    """Whether the rivals are told apart by fine bins."""
    return (tl.sum(found, 0) > CROWD) & (first_key != last_key) & are_of_one_bin(first_key, last_key, FUSED)


@triton.jit
def collect_share(notes, n, k, shares, share, FUSED: tl.constexpr, SHARE: tl.constexpr, CROWD: tl.constexpr):
    """Collect the rivals of one share."""
    found, above, first_key, last_key = collect(notes, n, k, share * SHARE, FUSED, SHARE, CROWD)
    _note(notes.tallies, shares, share, found, above, first_key, last_key)
    arrive(notes.collected)


@triton.jit
def refine_share(
    notes, k, shares, share, FUSED: tl.constexpr, SHARE: tl.constexpr, CROWD: tl.constexpr, SEGMENTS: tl.constexpr
):
    """Once all shares are collected, and if the rivals are a crowd: keep those of this share in the fine bin."""
    wait(notes.collected, shares)
    found, above, first_key, last_key = _read(notes.tallies, shares, SEGMENTS)
    if _is_crowd(found, first_key, last_key, FUSED, CROWD):
        need = tl.maximum(k - tl.sum(above, 0), 1)
        best, _ = pick(tl.load(notes.fine + tl.arange(0, FINE)), need - 1)
        at, own = tl.arange(0, SHARE), notes.rivals + share * SHARE
        mine = tl.load(notes.tallies + share)
        key = tl.load(own + at, mask=at < mine, other=0)
        tl.debug_barrier()  # all have read before one writes
        bin = fine_bin(key, FUSED)
        left, better, first_key, last_key = compact(own, key, (at < mine) & (bin == best), (at < mine) & (bin < best))
        better += tl.load(notes.tallies + shares + share)
        _note(notes.tallies + 4 * shares, shares, share, left, better, first_key, last_key)
        arrive(notes.refined)


@triton.jit
def _settle(
    notes, shares, k, share, FUSED: tl.constexpr, SHARE: tl.constexpr, CROWD: tl.constexpr, SEGMENTS: tl.constexpr
):
    """From what all shares tell: the threshold and how many ties are kept.

    Also how many keys of earlier shares are above the threshold, and how many equal it.
    """
    STEP: tl.constexpr = max(SLOTS // SEGMENTS, 32)
    tallies = notes.tallies
    found, above, first_key, last_key = _read(tallies, shares, SEGMENTS)
    if _is_crowd(found, first_key, last_key, FUSED, CROWD):
        wait(notes.refined, shares)
        tallies += 4 * shares
        found, above, first_key, last_key = _read(tallies, shares, SEGMENTS)
    slot = tl.arange(0, SEGMENTS * STEP)
    owner, column = slot // STEP, slot % STEP
    limit = tl.load(tallies + owner, mask=owner < shares, other=0)
    end = tl.max(found, 0)
    rivals = notes.rivals + owner * SHARE + column
    threshold, ties = threshold_key(rivals, column, limit, end, k - tl.sum(above, 0), first_key, last_key, STEP)
    better, equal = tl.zeros(slot.shape, tl.int32), tl.zeros(slot.shape, tl.int32)
    for first in range(0, end, STEP):
        earlier = (column + first < limit) & (owner < share)
        key = tl.load(rivals + first, mask=earlier, other=0)
        better += (earlier & (key < threshold)).to(tl.int32)
        equal += (earlier & (key == threshold)).to(tl.int32)
    above_before = tl.sum(tl.where(tl.arange(0, SEGMENTS) < share, above, 0), 0) + tl.sum(better, 0)
    return threshold, ties, above_before, tl.sum(equal, 0)


@triton.jit
def emit_share(
    lists,
    notes,
    shares,
    share,
    FUSED: tl.constexpr,
    SHARE: tl.constexpr,
    CROWD: tl.constexpr,
    SEGMENTS: tl.constexpr,
    TEXTS: tl.constexpr,
):
    """Once all shares are collected, what is kept of this one."""
    base = share * SHARE
    rows, text = load_rows(lists.candidates, base, lists.n, SHARE), load_rows(lists.texts, 0, lists.m, TEXTS)
    wait(notes.collected, shares)
    at = base + tl.arange(0, SHARE)
    key = tl.load(notes.keys + at, mask=at < lists.n, other=0)
    threshold, ties, above_before, ties_before = _settle(notes, shares, lists.k, share, FUSED, SHARE, CROWD, SEGMENTS)
    chosen, rank = choose(key, at < lists.n, threshold, ties, above_before, ties_before)
    emit(lists, rows, chosen, rank, text, base, SHARE)
