"""Diverse selection: rounds of picks that are unlike each other, each round one pass over the candidates.

Two passes come first: norms, with the sum of all unit rows, and how central each row is in that sum. Then a launch a
round compares all candidates with the picks of the round before, and its program that arrives last picks. The last
round is the selection by scores (``reroute_kernels.triton_kernels.select``), which finds all picks again.

Rows are multiplied as they are, on tensor cores, and the products scaled by the norms: no unit row is ever stored.
"""

from __future__ import annotations

from functools import cache, lru_cache, partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ranking import most_rounds, picks_per_round
from ..reference import Selection, SelectRows
from .launch import SpecializedKernel, last_dim_contiguous
from .select import select
from .topk.emit import fill
from .topk.phases import arrive
from .topk.pick import TAKEN, pick_smallest, similarity_to_ordered
from .topk.radix import MAX_COUNT, coarse_bucket, to_ordered
from .topk.row_state import clear_counters, make_row_state, num_counters, num_state_words

MAX_SPLITS = 128  # parts of the sum of a sample's unit rows
SPLIT_ROWS = tl.constexpr(16)  # candidates of the shortest one, for each part is a row of fp32
SUM_BLOCK_C = 64  # features that one program sums up
PICK_CHUNKS = 1024, 2048  # keys that the picking program looks at together, of short rows and of longer ones
FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32})

# Another batch, prompt, k or round must not compile anew, nor where in one upload the index lists begin.
SIZES = ("batch", "stride_candidates", "max_candidates", "max_k")
LISTS = ("candidates_ptr", "counts_ptr")


class Tiling(NamedTuple):
    """What a program takes at once."""

    block_r: int  # whole rows, in the first two passes
    block_m: int  # picks
    block_n: int  # candidates
    block_c: int  # features of both
    num_stages: int


# --- whole rows: norms and their sum, centrality ------------------------------------------------


@triton.jit
def _split_rows(n, MAX_SPLITS: tl.constexpr):
    """Candidates of one split: by the sample's own length alone, as it orders a sum."""
    return tl.cdiv(n, MAX_SPLITS * SPLIT_ROWS) * SPLIT_ROWS


@triton.jit
def _load_rows(states_ptr, stride_states, rows_ptr, start, offs_n, mask_n, HIDDEN_SIZE, BLOCK_C: tl.constexpr):
    """Whole rows of candidates, fp32."""
    offs_c = tl.arange(0, BLOCK_C)
    row = start + tl.load(rows_ptr + offs_n, mask=mask_n, other=0)  # [BLOCK_R]
    mask = mask_n[:, None] & (offs_c < HIDDEN_SIZE)[None, :]
    x = tl.load(states_ptr + row[:, None] * stride_states + offs_c[None, :], mask=mask, other=0.0)  # [BLOCK_R, BLOCK_C]
    return x.to(tl.float32)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=LISTS)
def _diverse_norm_kernel(
    states_ptr,
    candidates_ptr,
    counts_ptr,
    counters_ptr,
    inverse_norm_ptr,
    partial_ptr,
    batch,
    stride_states,
    stride_candidates,
    max_candidates,
    HIDDEN_SIZE: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Inverse norms of one split of a sample, and the sum of its unit rows; zero for rows of zeros."""
    split, sample = tl.program_id(0), tl.program_id(1)
    if split == 0:
        clear_counters(counters_ptr, sample)
    start = tl.load(counts_ptr + sample)
    n = tl.load(counts_ptr + 2 * batch + sample).to(tl.int32)
    k = tl.load(counts_ptr + 4 * batch + sample)
    step = _split_rows(n, MAX_SPLITS)
    begin, end = split * step, tl.minimum(split * step + step, n)
    if (begin < n) & (k > 0):
        rows_ptr = candidates_ptr + sample.to(tl.int64) * stride_candidates
        inverse_norm_ptr += sample.to(tl.int64) * max_candidates
        total = tl.zeros([BLOCK_C], tl.float32)
        for first in range(begin, end, BLOCK_R):
            offs_n = first + tl.arange(0, BLOCK_R)
            mask_n = offs_n < end
            x = _load_rows(states_ptr, stride_states, rows_ptr, start, offs_n, mask_n, HIDDEN_SIZE, BLOCK_C)
            square = tl.sum(x * x, 1)  # [BLOCK_R]
            # Rounded as by PyTorch, for exact norms give exact cosines; times zero, so that an overflow is NaN.
            inverse_norm = tl.where(square == 0, 0.0, tl.div_rn(square * 0 + 1, tl.sqrt_rn(square)))
            tl.store(inverse_norm_ptr + offs_n, inverse_norm, mask=mask_n)
            total += tl.sum(x * inverse_norm[:, None], 0)
        offs_c = tl.arange(0, BLOCK_C)
        partial_ptr += (sample * tl.num_programs(0) + split).to(tl.int64) * HIDDEN_SIZE
        tl.store(partial_ptr + offs_c, total, mask=offs_c < HIDDEN_SIZE)


@triton.jit(do_not_specialize=["batch", "max_splits"], do_not_specialize_on_alignment=["counts_ptr"])
def _diverse_sum_kernel(
    counts_ptr,
    partial_ptr,
    total_ptr,
    batch,
    max_splits,
    HIDDEN_SIZE: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A few features of the sum of a sample's unit rows."""
    sample = tl.program_id(1)
    n = tl.load(counts_ptr + 2 * batch + sample).to(tl.int32)
    k = tl.load(counts_ptr + 4 * batch + sample)
    num_splits = tl.where(k > 0, tl.cdiv(n, tl.maximum(_split_rows(n, MAX_SPLITS), 1)), 0)
    offs_s, offs_c = tl.arange(0, MAX_SPLITS), tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    partial_ptrs = partial_ptr + (sample * max_splits + offs_s).to(tl.int64)[:, None] * HIDDEN_SIZE + offs_c[None, :]
    mask = (offs_s < num_splits)[:, None] & (offs_c < HIDDEN_SIZE)[None, :]
    partial = tl.load(partial_ptrs, mask=mask, other=0.0)  # [MAX_SPLITS, BLOCK_C]
    tl.store(total_ptr + sample.to(tl.int64) * HIDDEN_SIZE + offs_c, tl.sum(partial, 0), mask=offs_c < HIDDEN_SIZE)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=LISTS)
def _diverse_first_kernel(
    states_ptr,
    candidates_ptr,
    counts_ptr,
    inverse_norm_ptr,
    total_ptr,
    workspace_ptr,
    counters_ptr,
    scores_ptr,
    picks_ptr,
    batch,
    stride_states,
    stride_candidates,
    max_candidates,
    max_k,
    HIDDEN_SIZE: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Keys by centrality and scores of zero of one split; who arrives last picks the least central candidate."""
    split, sample = tl.program_id(0), tl.program_id(1)
    start = tl.load(counts_ptr + sample)
    n = tl.load(counts_ptr + 2 * batch + sample).to(tl.int32)
    k = tl.load(counts_ptr + 4 * batch + sample)
    step = _split_rows(n, MAX_SPLITS)
    begin, end = split * step, tl.minimum(split * step + step, n)
    scores_ptr += sample.to(tl.int64) * max_candidates
    if k == 0:
        fill(scores_ptr, begin, end, 0.0, 0, 1, BLOCK_C)
    elif begin < n:
        state = make_row_state(workspace_ptr, counters_ptr, batch, sample, 0, max_candidates)
        rows_ptr = candidates_ptr + sample.to(tl.int64) * stride_candidates
        inverse_norm_ptr += sample.to(tl.int64) * max_candidates
        offs_c = tl.arange(0, BLOCK_C)
        total_ptrs = total_ptr + sample.to(tl.int64) * HIDDEN_SIZE + offs_c
        total = tl.load(total_ptrs, mask=offs_c < HIDDEN_SIZE, other=0.0)  # [BLOCK_C]
        for first in range(begin, end, BLOCK_R):
            offs_n = first + tl.arange(0, BLOCK_R)
            mask_n = offs_n < end
            x = _load_rows(states_ptr, stride_states, rows_ptr, start, offs_n, mask_n, HIDDEN_SIZE, BLOCK_C)
            inverse_norm = tl.load(inverse_norm_ptr + offs_n, mask=mask_n, other=0.0)  # [BLOCK_R]
            centrality = tl.sum(x * total[None, :], 1) * inverse_norm
            centrality += tl.where(inverse_norm == 0, n * 0.5, 0.0)  # of a zero row
            key = to_ordered(0.0 - centrality)
            tl.store(scores_ptr + offs_n, tl.abs(centrality) * 0, mask=mask_n)
            tl.store(state.keys_ptr + offs_n, key, mask=mask_n)
            tl.atomic_add(state.coarse_ptr + coarse_bucket(key, False), 1, mask=mask_n, sem="relaxed")
        if arrive(state.scored_ptr) == tl.cdiv(n, step) - 1:
            picks_ptr += sample.to(tl.int64) * max_k
            pick_smallest(state, picks_ptr, n, 1, False, CHUNK)
            tl.debug_barrier()  # the pick is read by other threads, and the counts have been
            clear_counters(counters_ptr, sample)
            pick = tl.load(picks_ptr)
            tl.store(scores_ptr + pick, tl.load(scores_ptr + pick) + 1)


# --- a round: similarities to the last picks -----------------------------------------------------


@triton.jit
def _highest_similarity(
    states_ptr,
    stride_states,
    rows_ptr,
    start,
    inverse_norm_ptr,
    picks_ptr,
    num_picks,
    offs_n,
    mask_n,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Of each candidate [BLOCK_N] to the picks, or 0."""
    offs_c = tl.arange(0, BLOCK_C)
    row = start + tl.load(rows_ptr + offs_n, mask=mask_n, other=0)  # [BLOCK_N]
    row_ptrs = states_ptr + row[:, None] * stride_states + offs_c[None, :]
    highest = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, num_picks, BLOCK_M):
        offs_m = first + tl.arange(0, BLOCK_M)
        mask_m = offs_m < num_picks
        pick = tl.load(picks_ptr + offs_m, mask=mask_m, other=0)  # [BLOCK_M]
        pick_row = start + tl.load(rows_ptr + pick, mask=mask_m, other=0)  # [BLOCK_M]
        inverse_norm = tl.load(inverse_norm_ptr + pick, mask=mask_m, other=0.0)  # [BLOCK_M]
        pick_ptrs = states_ptr + pick_row[:, None] * stride_states + offs_c[None, :]
        product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first_c in range(0, HIDDEN_SIZE, BLOCK_C):
            mask_c = (offs_c < HIDDEN_SIZE - first_c)[None, :]
            picks = tl.load(pick_ptrs + first_c, mask=mask_m[:, None] & mask_c, other=0.0)  # [BLOCK_M, BLOCK_C]
            x = tl.load(row_ptrs + first_c, mask=mask_n[:, None] & mask_c, other=0.0)  # [BLOCK_N, BLOCK_C]
            product = tl.dot(picks, x.T, product, input_precision="ieee")
        highest = tl.maximum(highest, tl.max(product * inverse_norm[:, None], 0))
    return highest * tl.load(inverse_norm_ptr + offs_n, mask=mask_n, other=0.0)


@triton.jit(do_not_specialize=(*SIZES, "round_index"), do_not_specialize_on_alignment=LISTS)
def _diverse_round_kernel(
    states_ptr,
    candidates_ptr,
    counts_ptr,
    inverse_norm_ptr,
    workspace_ptr,
    counters_ptr,
    scores_ptr,
    picks_ptr,
    round_index,
    batch,
    stride_states,
    stride_candidates,
    max_candidates,
    max_k,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Scores of one tile after the picks of the round before; unless it is the sample's last round, who arrives last
    picks.
    """
    tile, sample = tl.program_id(0), tl.program_id(1)
    start = tl.load(counts_ptr + sample)
    n = tl.load(counts_ptr + 2 * batch + sample).to(tl.int32)
    k = tl.load(counts_ptr + 4 * batch + sample).to(tl.int32)
    size = tl.maximum(k // 8, 1)  # `picks_per_round`
    begin = 1 + (round_index - 1) * size
    if (tile * BLOCK_N < n) & (begin < k):
        state = make_row_state(workspace_ptr, counters_ptr, batch, sample, 0, max_candidates)
        rows_ptr = candidates_ptr + sample.to(tl.int64) * stride_candidates
        inverse_norm_ptr += sample.to(tl.int64) * max_candidates
        picks_ptr += sample.to(tl.int64) * max_k
        offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < n
        earlier = tl.maximum(begin - size, 0)  # picks before those that are compared
        similarity = _highest_similarity(
            states_ptr, stride_states, rows_ptr, start, inverse_norm_ptr, picks_ptr + earlier, begin - earlier, offs_n,
            mask_n, HIDDEN_SIZE, BLOCK_M, BLOCK_N, BLOCK_C,
        )  # [BLOCK_N]  # fmt: skip
        score_ptrs = scores_ptr + sample.to(tl.int64) * max_candidates + offs_n
        score = tl.load(score_ptrs, mask=mask_n, other=0.0)  # [BLOCK_N]
        mask_open = mask_n & (tl.load(state.keys_ptr + offs_n, mask=mask_n, other=TAKEN) != TAKEN)  # [BLOCK_N]
        tl.debug_barrier()  # several threads hold the same candidates: all have read before one writes
        score = tl.minimum(score, 0.0 - similarity, propagate_nan=tl.PropagateNan.ALL)
        tl.store(score_ptrs, score, mask=mask_open)
        if begin + size < k:
            key = similarity_to_ordered(0.0 - score)
            tl.store(state.keys_ptr + offs_n, key, mask=mask_open)
            tl.atomic_add(state.coarse_ptr + coarse_bucket(key, True), 1, mask=mask_open, sem="relaxed")
            if arrive(state.scored_ptr) == tl.cdiv(n, BLOCK_N) - 1:
                pick_smallest(state, picks_ptr + begin, n, size, True, CHUNK)
                tl.debug_barrier()  # all have read the counts
                clear_counters(counters_ptr, sample)


def diverse_topk(states: Tensor, rows: SelectRows, *, counts: Tensor | None = None) -> Selection:
    """``reroute_kernels.reference.diverse_topk``: ``diversity_scores``, and a selection by them.

    Args:
        counts: those of ``rows.metadata`` on the device, if they are there.

    Raises:
        ValueError: see ``diversity_scores``.
    """
    counts = rows.metadata.counts(states.device) if counts is None else counts
    return select(diversity_scores(states, rows, counts), rows, counts=counts)


def diversity_scores(states: Tensor, rows: SelectRows, counts: Tensor) -> Tensor:
    """``reroute_kernels.ranking.diversity_scores`` of each sample (B, Nmax), in three launches and one for each round
    but the first, without a device synchronisation. What lies beyond a sample's candidates is not written.

    16-byte loads need contiguous features, and a stride and C that are multiples of 16 elements; all else is right but
    slower. So is fp32, which has no tensor cores that keep its precision.

    Args:
        counts: those of ``rows.metadata`` on the device.

    Raises:
        ValueError: see ``check_inputs``; or a row has more candidates than the kernel can count.
    """
    check_inputs(states)
    (batch, max_candidates), metadata, device = rows.candidates.shape, rows.metadata, states.device
    if max_candidates > MAX_COUNT:
        raise ValueError(f"{max_candidates} candidates in a row: the selection kernel counts up to {MAX_COUNT}")
    max_k = max(metadata.k)
    if max_k == 0:
        return torch.zeros(batch, max_candidates, device=device)
    states, candidates = map(last_dim_contiguous, (states, rows.candidates))
    hidden_size = states.shape[1]
    tile = tiling(hidden_size, states.element_size())
    float32, int32 = (partial(torch.empty, dtype=dtype, device=device) for dtype in (torch.float32, torch.int32))
    inverse_norm, scores = float32(batch, max_candidates), float32(batch, max_candidates)
    if metadata.static_length is None:
        num_splits = max(-(-n // split_size(n)) for n in metadata.num_candidates)
        num_rounds = max(len(picks_per_round(k)) for k in metadata.k)
    else:  # neither grows with n or k throughout, so as many as any prompt within the capacities needs
        num_splits = min(-(-max(metadata.num_candidates) // int(SPLIT_ROWS.value)), MAX_SPLITS)
        num_rounds = most_rounds(max_k)
    parts, total = float32(batch, num_splits, hidden_size), float32(batch, hidden_size)
    picks, workspace = int32(batch, max_k), int32(num_state_words(batch, max_candidates, 0))
    counters = int32(num_counters(batch))  # the first launch clears them
    chunk = PICK_CHUNKS[max_candidates > PICK_CHUNKS[0]]
    norm, add, first_pick, one_round = _specialized(hidden_size, tile, MAX_SPLITS, chunk)
    lists = states, candidates, counts
    sizes = batch, states.stride(0), candidates.stride(0), max_candidates
    found = workspace, counters, scores, picks
    norm((num_splits, batch, 1), *lists, counters, inverse_norm, parts, *sizes)
    add((-(-hidden_size // SUM_BLOCK_C), batch, 1), counts, parts, total, batch, num_splits)
    first_pick((num_splits, batch, 1), *lists, inverse_norm, total, *found, *sizes, max_k)
    num_tiles = -(-max(metadata.num_candidates) // tile.block_n)
    for index in range(1, num_rounds):
        one_round((num_tiles, batch, 1), *lists, inverse_norm, *found, index, *sizes, max_k)
    return scores


def split_size(n: int) -> int:
    """``_split_rows`` on the host; 1 if there are none."""
    rows = int(SPLIT_ROWS.value)
    return max(-(-n // (MAX_SPLITS * rows)) * rows, 1)


def check_inputs(states: Tensor) -> None:
    """Check what ``diverse_topk`` gets, also where it is only traced. ValueError for a dtype that it cannot have."""
    if states.dtype not in FLOATS:
        known = ", ".join(sorted(map(str, FLOATS)))
        raise ValueError(f"diverse_topk takes states of {known}, not of {states.dtype}: convert them before")


@cache
def tiling(hidden_size: int, itemsize: int) -> Tiling:
    """A function of the model alone, for results must not depend on the batch."""
    block_r = max(min(16384 // triton.next_power_of_2(hidden_size), 16), 1)
    if itemsize > 2:
        return Tiling(block_r, block_m=16, block_n=32, block_c=64, num_stages=1)
    return Tiling(block_r, block_m=32, block_n=64, block_c=64, num_stages=4)


@lru_cache(maxsize=256)
def _specialized(
    hidden_size: int, tile: Tiling, max_splits: int, chunk: int
) -> tuple[SpecializedKernel, SpecializedKernel, SpecializedKernel, SpecializedKernel]:
    """Norms and their sums, the first pick, and a round."""
    block_r, block_m, block_n, block_c, num_stages = tile
    whole = {"HIDDEN_SIZE": hidden_size, "MAX_SPLITS": max_splits}
    rows = {**whole, "BLOCK_R": block_r, "BLOCK_C": triton.next_power_of_2(hidden_size)}
    row_warps = max(min(block_r * rows["BLOCK_C"] // 1024, 16), 4)
    tiled = {"HIDDEN_SIZE": hidden_size, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_C": block_c, "CHUNK": chunk}

    def specialized(name: str, kernel: object, constants: dict[str, int], num_warps: int) -> SpecializedKernel:
        options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": 128, "enable_fp_fusion": False}
        return SpecializedKernel(f"diverse, {name}", kernel, constants, **options)

    return (
        specialized("norms", _diverse_norm_kernel, rows, row_warps),
        specialized("their sum", _diverse_sum_kernel, {**whole, "BLOCK_C": SUM_BLOCK_C}, 8),
        specialized("first pick", _diverse_first_kernel, {**rows, "CHUNK": chunk}, row_warps),
        specialized("a round", _diverse_round_kernel, tiled, 8),
    )
