"""Attention scores of the last prompt token, fused: rotary embedding, logits and softmax statistics in one launch.

A second launch (``reroute_kernels.triton_kernels.select``) turns logits into scores and selects. Only
the last query row exists at any time: (H, L) fp32 logits, about a tenth of the key bytes for grouped heads.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import AttentionSpec, RopeTables, Selection, SelectRows
from .launch import SpecializedKernel, last_dim_contiguous
from .select import Logits, launch_select
from .topk.row_state import clear_counters, num_counters

LOGIT_ALIGNMENT = 16  # logits of a head begin at multiples of it
FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


class Tiling(NamedTuple):
    """What a program takes at once."""

    num_warps: int
    kv_heads_per_warp: int
    block_h: int  # query heads of a warp, at most
    block_n: int  # keys


@triton.jit
def _load(ptrs, mask, FIRST: tl.constexpr, COUNT: tl.constexpr, BLOCK_D: tl.constexpr):
    """Features FIRST.. of the rows at ``ptrs`` [a, b]: [a, b, BLOCK_D], zeros from COUNT on and where not ``mask``."""
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = mask[:, :, None]
    if COUNT < BLOCK_D:
        mask_d = mask_d & (offs_d < COUNT)[None, None, :]
    return tl.load(ptrs[:, :, None] + (FIRST + offs_d)[None, None, :], mask=mask_d, other=0.0)  # [a, b, BLOCK_D]


@triton.jit
def _load_pairs(ptrs, mask, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The two features of every rotary pair of the rows at ``ptrs`` [a, b], with zeros to a power of two >= 16."""
    HALF: tl.constexpr = ROTARY_DIM // 2
    BLOCK_D: tl.constexpr = triton.next_power_of_2(HALF) if HALF > 16 else 16
    if INTERLEAVED:
        both = _load(ptrs, mask, 0, ROTARY_DIM, 2 * BLOCK_D)  # [a, b, 2 * BLOCK_D]
        first, second = tl.split(both.reshape(both.shape[0], both.shape[1], BLOCK_D, 2))
    else:
        first = _load(ptrs, mask, 0, HALF, BLOCK_D)  # [a, b, BLOCK_D]
        second = _load(ptrs, mask, HALF, HALF, BLOCK_D)  # [a, b, BLOCK_D]
    return first, second


@triton.jit
def _load_angles(ptrs, mask, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr, dtype: tl.constexpr):
    """One number per rotary pair: the tables hold each at both places."""
    if INTERLEAVED:
        angles, _ = _load_pairs(ptrs, mask, ROTARY_DIM, INTERLEAVED)  # [a, b, BLOCK_D]
    else:
        HALF: tl.constexpr = ROTARY_DIM // 2
        angles = _load(ptrs, mask, 0, HALF, triton.next_power_of_2(HALF) if HALF > 16 else 16)  # [a, b, BLOCK_D]
    return angles.to(dtype)


@triton.jit
def _load_features(ptrs, mask, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Load features as (first halves, second halves, unrotated rest); a part that does not exist is left out."""
    BLOCK_REST: tl.constexpr = triton.next_power_of_2(HEAD_DIM - ROTARY_DIM) if HEAD_DIM - ROTARY_DIM > 16 else 16
    if ROTARY_DIM == HEAD_DIM:
        parts = _load_pairs(ptrs, mask, ROTARY_DIM, INTERLEAVED)  # [a, b, BLOCK_D] each
    elif ROTARY_DIM > 0:
        first, second = _load_pairs(ptrs, mask, ROTARY_DIM, INTERLEAVED)  # [a, b, BLOCK_D] each
        parts = (
            first,
            second,
            _load(ptrs, mask, ROTARY_DIM, HEAD_DIM - ROTARY_DIM, BLOCK_REST),  # [a, b, BLOCK_REST]
        )
    else:
        parts = (_load(ptrs, mask, ROTARY_DIM, HEAD_DIM - ROTARY_DIM, BLOCK_REST),)  # [a, b, BLOCK_REST]
    return parts


@triton.jit
def _promoted(a, b):
    """Of one dtype, as PyTorch's arithmetic makes them: fp32 if they differ, or fp64."""
    if a.dtype != b.dtype:
        if a.dtype == tl.float64 or b.dtype == tl.float64:
            a, b = a.to(tl.float64), b.to(tl.float64)
        else:
            a, b = a.to(tl.float32), b.to(tl.float32)
    return a, b


@triton.jit
def _square(part):
    """Sum of squares over features, fp32."""
    return tl.sum(part.to(tl.float32) * part.to(tl.float32), 2)  # [a, b]


@triton.jit
def _normalise(parts, weights, eps, HEAD_DIM: tl.constexpr):
    """Root-mean-square norm over the D features; what pads them is zero and stays so."""
    square = _square(parts[0])  # [a, b]
    for i in tl.static_range(1, len(parts)):
        square += _square(parts[i])
    factor = tl.rsqrt(square * (1 / HEAD_DIM) + eps)[:, :, None]  # [a, b, 1]
    normed = ()
    for i in tl.static_range(len(parts)):  # in fp32 and rounded before the weight, as models do it
        scaled = (parts[i].to(tl.float32) * factor).to(parts[i].dtype)  # [a, b, BLOCK_D]
        scaled, weight = _promoted(scaled, weights[i])
        normed = normed + (scaled * weight,)  # type: ignore[assignment]  # noqa: RUF005
    return normed


@triton.jit
def _rotate(parts, cos_ptrs, sin_ptrs, mask, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr):
    """In the dtype of the keys and rounded at every step, as the model's own rotation is."""
    if ROTARY_DIM > 0:
        first, second = parts[0], parts[1]
        c = _load_angles(cos_ptrs, mask, ROTARY_DIM, INTERLEAVED, first.dtype)  # [1, 1 or b, BLOCK_D]
        s = _load_angles(sin_ptrs, mask, ROTARY_DIM, INTERLEAVED, first.dtype)  # [1, 1 or b, BLOCK_D]
        parts = (first * c - second * s, second * c + first * s) + parts[2:]  # noqa: RUF005
    return parts


@triton.jit
def _add_products(logit, q, k):
    """``logit`` [warps, heads, rows] plus q [warps, heads, features] times k, whose leading axes are warps and rows.

    Both have been rotated in their own dtypes. Where these differ, or are wider, the products are those of fp32.
    """
    for i in tl.static_range(len(q)):
        queries, rows = q[i], k[i].reshape(logit.shape[0], logit.shape[2], k[i].shape[2])  # [warps, rows, features]
        if queries.dtype != rows.dtype or rows.dtype == tl.float64:
            queries, rows = queries.to(tl.float32), rows.to(tl.float32)
        logit = tl.dot(queries, rows.permute(0, 2, 1), logit, input_precision="ieee")  # [warps, heads, rows]
    return logit


# Where in one upload the index lists happen to begin must not compile anew, nor what divides the batch. A batch of one
# has a kernel of its own, which saves a hundredth of the instructions.
@triton.jit(do_not_specialize_on_alignment=["query_rows_ptr", "counts_ptr", "batch"])
def _score_kernel(
    query_ptr,
    keys_ptr,
    cos_ptr,
    sin_ptr,
    query_rows_ptr,
    norm_weight_ptr,
    counts_ptr,
    counters_ptr,
    logits_ptr,
    batch,
    stride_logits,
    stats_offset,
    scale,
    norm_eps,
    stride_qb,
    stride_qh,
    stride_kn,
    stride_kh,
    stride_cos,
    stride_sin,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NUM_WARPS: tl.constexpr,
    KV_HEADS_PER_WARP: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
):
    """Logits (base 2) of one split of one sample for a few key heads, and behind all logits their maximum and sum.

    Each warp takes KV_HEADS_PER_WARP key heads and up to BLOCK_H of their query heads. A sample is cut into at most
    NUM_SPLITS splits by its own length alone, so that its bits do not depend on its neighbours.
    """
    NUM_H_BLOCKS: tl.constexpr = (KV_HEADS_PER_WARP * GROUP_SIZE + BLOCK_H - 1) // BLOCK_H
    split, sample = tl.program_id(0), tl.program_id(2)
    if (split == 0) & (tl.program_id(1) == 0):
        clear_counters(counters_ptr, sample)
    start = tl.load(counts_ptr + sample).to(tl.int32)
    length = tl.load(counts_ptr + batch + sample).to(tl.int32)
    step = tl.cdiv(tl.cdiv(length, BLOCK_N), NUM_SPLITS) * BLOCK_N
    begin = split * step
    if begin < length and tl.load(counts_ptr + 2 * batch + sample) > 0:
        first_kv_head = tl.program_id(1) // NUM_H_BLOCKS * NUM_WARPS * KV_HEADS_PER_WARP
        kv_head = first_kv_head + tl.arange(0, NUM_WARPS * KV_HEADS_PER_WARP)
        offs_h = tl.program_id(1) % NUM_H_BLOCKS * BLOCK_H + tl.arange(0, BLOCK_H)
        qo_head = (first_kv_head + tl.arange(0, NUM_WARPS) * KV_HEADS_PER_WARP)[:, None] * GROUP_SIZE + offs_h[None, :]
        mask_h = tl.broadcast_to((offs_h < KV_HEADS_PER_WARP * GROUP_SIZE)[None, :], NUM_WARPS, BLOCK_H)
        mask_one = tl.full([1, 1], 1, tl.int1)
        query_row = tl.load(query_rows_ptr + sample) + tl.zeros([1, 1], tl.int64)  # [1, 1]
        q = _load_features(
            query_ptr + sample.to(tl.int64) * stride_qb + qo_head * stride_qh, mask_h, HEAD_DIM, ROTARY_DIM, INTERLEAVED
        )  # [NUM_WARPS, BLOCK_H, BLOCK_D] each
        q = _rotate(
            q, cos_ptr + query_row * stride_cos, sin_ptr + query_row * stride_sin, mask_one, ROTARY_DIM, INTERLEAVED
        )
        if norm_weight_ptr is not None:
            # + query_row * 0: a [1, 1] tensor of pointers, as _load_features takes rows.
            weights = _load_features(
                norm_weight_ptr + query_row * 0, mask_one, HEAD_DIM, ROTARY_DIM, INTERLEAVED
            )  # [1, 1, BLOCK_D] each
        out_ptrs = logits_ptr + (sample.to(tl.int64) * NUM_KV_HEADS * GROUP_SIZE + qo_head)[:, :, None] * stride_logits
        m_i = tl.full([NUM_WARPS, BLOCK_H], -float("inf"), tl.float32)
        l_i = tl.zeros([NUM_WARPS, BLOCK_H], tl.float32)
        for start_n in range(begin, tl.minimum(begin + step, length), BLOCK_N):
            offs_n = start_n + tl.arange(0, BLOCK_N)[None, :]  # [1, BLOCK_N]
            mask_n = offs_n < length
            key_row = (start + offs_n).to(tl.int64)  # [1, BLOCK_N]
            key_ptrs = keys_ptr + key_row * stride_kn + kv_head.to(tl.int64)[:, None] * stride_kh
            k = _load_features(
                key_ptrs,
                tl.broadcast_to(mask_n, NUM_WARPS * KV_HEADS_PER_WARP, BLOCK_N),
                HEAD_DIM,
                ROTARY_DIM,
                INTERLEAVED,
            )  # [NUM_WARPS * KV_HEADS_PER_WARP, BLOCK_N, BLOCK_D] each
            if norm_weight_ptr is not None:
                k = _normalise(k, weights, norm_eps, HEAD_DIM)
            k = _rotate(
                k, cos_ptr + key_row * stride_cos, sin_ptr + key_row * stride_sin, mask_n, ROTARY_DIM, INTERLEAVED
            )
            logit = _add_products(tl.zeros([NUM_WARPS, BLOCK_H, KV_HEADS_PER_WARP * BLOCK_N], tl.float32), q, k)
            if KV_HEADS_PER_WARP > 1:  # each query head keeps what belongs to its own key head
                mask_own = (offs_h // GROUP_SIZE)[:, None] == tl.arange(0, KV_HEADS_PER_WARP)[None, :]
                by_kv_head = logit.reshape(NUM_WARPS, BLOCK_H, KV_HEADS_PER_WARP, BLOCK_N)
                logit = tl.sum(tl.where(mask_own[None, :, :, None], by_kv_head, 0.0), 2)
            logit = tl.where(mask_n[:, None, :], logit * scale, -float("inf"))  # [NUM_WARPS, BLOCK_H, BLOCK_N]
            tl.store(out_ptrs + offs_n[:, None, :], logit, mask=mask_h[:, :, None])  # whole tiles, for wide stores
            m_new = tl.maximum(m_i, tl.max(logit, 2))  # [NUM_WARPS, BLOCK_H]
            m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)  # -inf minus -inf would be NaN
            l_i = l_i * tl.exp2(m_i - m_safe) + tl.sum(tl.exp2(logit - m_safe[:, :, None]), 2)
            m_i = m_new
        stats_ptrs = logits_ptr + stats_offset + (sample * NUM_SPLITS + split) * NUM_KV_HEADS * GROUP_SIZE + qo_head
        tl.store(stats_ptrs, m_i, mask=mask_h)
        tl.store(stats_ptrs + batch * NUM_SPLITS * NUM_KV_HEADS * GROUP_SIZE, l_i, mask=mask_h)


def score_topk(
    query: Tensor,
    keys: Tensor,
    tables: RopeTables,
    rows: SelectRows,
    spec: AttentionSpec,
    *,
    counts: Tensor | None = None,
) -> Selection:
    """``reroute_kernels.reference.score_topk`` in two launches, without a device synchronisation.

    16-byte loads need contiguous features, and strides and a head_dim that are multiples of 16 elements, as
    projections make them; all else is right but slower. So are query, keys and norm of different dtypes, which have no
    tensor cores: each is rounded in its own, as by the reference, and none is copied.

    Args:
        counts: those of ``rows.metadata`` on the device, if they are there.

    Raises:
        ValueError: see ``check_inputs``.
    """
    check_inputs(query, keys, tables, spec)
    (scale, rope, key_norm), metadata = spec, rows.metadata
    (batch, num_qo_heads, head_dim), num_kv_heads = query.shape, keys.shape[1]
    query, keys, cos, sin, query_rows = map(last_dim_contiguous, (query, keys, *tables))
    norm_weight, norm_eps = key_norm or (None, 0.0)
    device, length = query.device, max(metadata.kv_lens)
    is_mixed = query.dtype != keys.dtype or (norm_weight is not None and norm_weight.dtype != keys.dtype)
    itemsize = 4 if is_mixed else keys.element_size()
    tile = tiling(num_qo_heads, num_kv_heads, head_dim, itemsize, key_norm is not None)
    max_splits = most_splits(tile)
    stride_logits = -(-length // LOGIT_ALIGNMENT) * LOGIT_ALIGNMENT
    stats_offset = batch * num_qo_heads * stride_logits
    counts = metadata.counts(device) if counts is None else counts
    logits = torch.empty(stats_offset + 2 * batch * max_splits * num_qo_heads, dtype=torch.float32, device=device)
    counters = torch.empty(num_counters(batch), dtype=torch.int32, device=device)  # the launch clears them
    num_splits, num_h_blocks = (
        max(min(-(-length // tile.block_n), max_splits), 1),
        -(-tile.kv_heads_per_warp * num_qo_heads // (num_kv_heads * tile.block_h)),
    )
    _specialized(
        num_kv_heads,
        num_qo_heads // num_kv_heads,
        head_dim,
        cos.shape[-1],
        rope == "interleaved",
        tile,
        max_splits,
        batch == 1,
    )(
        (num_splits, num_kv_heads // (tile.num_warps * tile.kv_heads_per_warp) * num_h_blocks, batch),
        query,
        keys,
        cos,
        sin,
        query_rows,
        None if norm_weight is None else norm_weight.contiguous(),
        counts,
        counters,
        logits,
        batch,
        stride_logits,
        stats_offset,
        scale * math.log2(math.e),
        norm_eps,
        *query.stride()[:2],
        *keys.stride()[:2],
        cos.stride(0),
        sin.stride(0),
    )
    source = Logits(logits, stride_logits, stats_offset, num_qo_heads, max_splits, tile.block_n)
    return launch_select(source, rows, counts, counters)


def check_inputs(query: Tensor, keys: Tensor, tables: RopeTables, spec: AttentionSpec) -> None:
    """Check what ``score_topk`` gets, also where it is only traced.

    Raises:
        ValueError: head counts, the rope layout, the norm or a dtype that it cannot have.
    """
    num_qo_heads, num_kv_heads, head_dim = query.shape[1], keys.shape[1], keys.shape[2]
    if num_qo_heads % num_kv_heads:
        raise ValueError(f"{num_qo_heads} query heads cannot share {num_kv_heads} key heads")
    if spec.rope not in ("half", "interleaved"):
        raise ValueError(f"unknown rope layout {spec.rope!r}; known: 'half', 'interleaved'")
    if spec.key_norm is not None and spec.key_norm.weight.shape != keys.shape[2:]:
        raise ValueError(f"a key norm of {tuple(spec.key_norm.weight.shape)} features is not one of {head_dim}")
    dtypes = {query.dtype, keys.dtype, tables.cos.dtype, tables.sin.dtype}
    if spec.key_norm is not None:
        dtypes.add(spec.key_norm.weight.dtype)
    if not dtypes <= FLOATS:
        known, other = (", ".join(sorted(map(str, some))) for some in (FLOATS, dtypes - FLOATS))
        raise ValueError(
            f"score_topk takes a query, keys, cos, sin and key norm of {known}, not of {other}: convert them before"
        )


@lru_cache(maxsize=256)
def _specialized(
    num_kv_heads: int,
    group_size: int,
    head_dim: int,
    rotary_dim: int,
    interleaved: bool,
    tile: Tiling,
    num_splits: int,
    is_one_prompt: bool,
) -> SpecializedKernel:
    constants = {
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP_SIZE": group_size,
        "HEAD_DIM": head_dim,
        "ROTARY_DIM": rotary_dim,
        "INTERLEAVED": interleaved,
        "NUM_WARPS": tile.num_warps,
        "KV_HEADS_PER_WARP": tile.kv_heads_per_warp,
        "BLOCK_H": tile.block_h,
        "BLOCK_N": tile.block_n,
        "NUM_SPLITS": num_splits,
    }
    name = "score, one prompt" if is_one_prompt else "score, several prompts"
    return SpecializedKernel(
        name, _score_kernel, constants, num_stages=1, num_warps=tile.num_warps, enable_fp_fusion=False
    )


@cache
def tiling(num_qo_heads: int, num_kv_heads: int, head_dim: int, itemsize: int, norm: bool) -> Tiling:
    """A function of the model alone, for results must not depend on the batch.

    A program takes many key heads, as it reads cos and sin once for all of them. A warp takes one key head, and the
    16 query heads that a tensor core takes at once; or two key heads, where all their query heads fit. What else
    differs saves registers: a norm and wide heads mean smaller tiles, and fp32 has no tensor cores that keep its
    precision.
    """
    if itemsize > 2:
        return Tiling(math.gcd(num_kv_heads, 4), kv_heads_per_warp=1, block_h=4, block_n=8)
    if head_dim > 128:
        return Tiling(math.gcd(num_kv_heads, 4), kv_heads_per_warp=1, block_h=16, block_n=8)
    if norm:
        return Tiling(math.gcd(num_kv_heads, 8), kv_heads_per_warp=1, block_h=16, block_n=8)
    if num_kv_heads % 8 == 0 and num_qo_heads // num_kv_heads <= 8:
        return Tiling(math.gcd(num_kv_heads, 16) // 2, kv_heads_per_warp=2, block_h=16, block_n=8)
    return Tiling(math.gcd(num_kv_heads, 4), kv_heads_per_warp=1, block_h=16, block_n=16)


def most_splits(tile: Tiling) -> int:
    """Most splits of one sample, by the model alone too: more would only lengthen the merge of their statistics."""
    return min(1024 // tile.num_warps, 256)
