"""Attention scores of the last prompt token, fused: rotary embedding, logits and softmax statistics in one launch.

A second launch (:mod:`reroute_kernels.triton_kernels.select`) turns logits into scores and selects. Only
the last query row exists at any time: (H, L) fp32 logits, about a tenth of the key bytes for grouped heads.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from reroute_kernels.reference import Rope, Segments, Selection
from reroute_kernels.triton_kernels._common import device_counts, processors, scratch
from reroute_kernels.triton_kernels.select import Logits, run_select

BLOCK = 64  # keys per tile
HEAD_BLOCK = 16  # query heads per tl.dot; fewer are padded, which the tensor cores do not notice


@triton.jit
def _load(rows, FIRST: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """Features FIRST.. of ``rows``, (n, WIDTH) with zeros from COUNT on; without a mask where WIDTH is COUNT."""
    column = tl.arange(0, WIDTH)
    at = rows[:, None] + (FIRST + column)[None, :]
    if COUNT == WIDTH:
        features = tl.load(at)
    else:
        features = tl.load(at, mask=(column < COUNT)[None, :], other=0.0)
    return features


@triton.jit
def _load_pairs(rows, HALF: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The two features of every rotary pair, (n, WIDTH) each."""
    if INTERLEAVED:
        both = _load(rows, 0, 2 * HALF, 2 * WIDTH)
        first, second = tl.split(both.reshape(both.shape[0], WIDTH, 2))
    else:
        first = _load(rows, 0, HALF, WIDTH)
        second = _load(rows, HALF, HALF, WIDTH)
    return first, second


@triton.jit
def _load_angles(rows, HALF: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr):
    """One number per rotary pair, (n, WIDTH): the tables hold each at both places."""
    if INTERLEAVED:
        angles, _ = _load_pairs(rows, HALF, WIDTH, INTERLEAVED)
    else:
        angles = _load(rows, 0, HALF, WIDTH)
    return angles


@triton.jit
def _load_rotated(rows, cos_rows, sin_rows, HALF: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Rotated features, the firsts of all pairs before the seconds: an order that queries and keys share."""
    first, second = _load_pairs(rows, HALF, WIDTH, INTERLEAVED)
    cos = _load_angles(cos_rows, HALF, WIDTH, INTERLEAVED).to(first.dtype)
    sin = _load_angles(sin_rows, HALF, WIDTH, INTERLEAVED).to(first.dtype)
    # In the dtype of the keys and rounded at every step, as the model's own rotation is.
    rotated = tl.join(first * cos - second * sin, second * cos + first * sin)
    return rotated.permute(0, 2, 1).reshape(first.shape[0], 2 * WIDTH)


@triton.jit
def _score_kernel(
    query,
    keys,
    cos,
    sin,
    query_rows,
    counts,
    logits,
    peaks,
    totals,
    batch,
    logit_stride,
    scale,
    query_stride,
    query_head,
    key_stride,
    key_group,
    cos_stride,
    sin_stride,
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    ROT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SHARED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
):
    """Logits (base 2) of one part of one sample for SHARED key heads, and their maximum and sum of powers.

    A sample is cut into at most PARTS parts by its own length alone, so that its bits do not depend on
    its neighbours.
    """
    HALF: tl.constexpr = ROT // 2
    WIDTH: tl.constexpr = triton.next_power_of_2(HALF) if HALF > 8 else 8
    REST: tl.constexpr = triton.next_power_of_2(D - ROT) if D - ROT > 16 else 16
    part, sample = tl.program_id(0), tl.program_id(2)
    start = tl.load(counts + sample)
    length = tl.load(counts + batch + sample)
    step = tl.cdiv(tl.cdiv(length, BLOCK), PARTS) * BLOCK
    begin = part * step
    if begin < length and tl.load(counts + 2 * batch + sample) > 0:
        query += sample * query_stride
        last = tl.load(query_rows + sample)
        logits += sample.to(tl.int64) * GROUPS * HEADS * logit_stride
        for turn in range(SHARED * tl.cdiv(HEADS, HEAD_BLOCK)):
            group = tl.program_id(1) * SHARED + turn % SHARED
            member = turn // SHARED * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)
            real = member < HEADS
            head = group * HEADS + member
            # Rows beyond the end repeat the last one: no load needs a mask, and no result uses them.
            q_row = query + tl.minimum(head, GROUPS * HEADS - 1) * query_head
            if HALF > 0:
                table = last + member * 0
                q = _load_rotated(q_row, cos + table * cos_stride, sin + table * sin_stride, HALF, WIDTH, INTERLEAVED)
            if ROT < D:
                q_rest = _load(q_row, ROT, D - ROT, REST)
            peak = tl.full([HEAD_BLOCK], -float("inf"), tl.float32)
            total = tl.zeros([HEAD_BLOCK], tl.float32)
            for tile in range(begin, tl.minimum(begin + step, length), BLOCK):
                row = tile + tl.arange(0, BLOCK)
                valid = row < length
                place = (start + tl.minimum(row, length - 1)).to(tl.int64)
                k_row = keys + place * key_stride + group.to(tl.int64) * key_group
                logit = tl.zeros([HEAD_BLOCK, BLOCK], tl.float32)
                if HALF > 0:
                    k = _load_rotated(
                        k_row, cos + place * cos_stride, sin + place * sin_stride, HALF, WIDTH, INTERLEAVED
                    )
                    logit = tl.dot(q, tl.trans(k), logit, input_precision="ieee")
                if ROT < D:
                    k_rest = _load(k_row, ROT, D - ROT, REST)
                    logit = tl.dot(q_rest, tl.trans(k_rest), logit, input_precision="ieee")
                logit = tl.where(valid[None, :], logit * scale, -float("inf"))
                out = logits + head.to(tl.int64)[:, None] * logit_stride + row[None, :]
                tl.store(out, logit, mask=real[:, None])  # whole tiles, for wide stores
                grown = tl.maximum(peak, tl.max(logit, 1))
                shift = tl.where(grown == -float("inf"), 0.0, grown)  # -inf minus -inf would be NaN
                total = total * tl.exp2(peak - shift) + tl.sum(tl.exp2(logit - shift[:, None]), 1)
                peak = grown
            stats = (sample * PARTS + part) * GROUPS * HEADS + head
            tl.store(peaks + stats, peak, mask=real)
            tl.store(totals + stats, total, mask=real)


@torch.no_grad()
def score_topk(
    query: Tensor,
    keys: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_rows: Tensor,
    candidates: Tensor,
    texts: Tensor,
    segments: Segments,
    *,
    scale: float,
    rope: Rope = "half",
) -> Selection:
    """:func:`reroute_kernels.reference.score_topk` in two launches, without a device synchronisation.

    16-byte loads need contiguous features, and strides and D that are multiples of 16 elements, as
    projections make them; all else is right but slower.
    """
    (batch, heads, features), groups = query.shape, keys.shape[1]
    if heads % groups:
        raise ValueError(f"{heads} query heads cannot share {groups} key heads")
    if rope not in ("half", "interleaved"):
        raise ValueError(f"unknown rope layout {rope!r}; known: 'half', 'interleaved'")
    query, keys, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, keys, cos, sin))
    device, length = query.device, max(segments.lengths)
    logit_stride = -(-length // BLOCK) * BLOCK
    most = most_parts(groups)
    parts = min(-(-length // BLOCK), most)
    counts = device_counts(segments, device)
    logits = scratch("logits", batch * heads * logit_stride, torch.float32, device)
    peaks, totals = (scratch(name, batch * most * heads, torch.float32, device) for name in ("peaks", "totals"))
    if max(segments.candidates) > 0:
        shared = key_heads_per_program(groups, batch * parts * groups, device)
        _score_kernel[(parts, groups // shared, batch)](
            query,
            keys,
            cos,
            sin,
            query_rows,
            counts,
            logits,
            peaks,
            totals,
            batch,
            logit_stride,
            scale * math.log2(math.e),
            query.stride(0),
            query.stride(1),
            keys.stride(0),
            keys.stride(1),
            cos.stride(0),
            sin.stride(0),
            GROUPS=groups,
            HEADS=heads // groups,
            D=features,
            ROT=cos.shape[-1],
            INTERLEAVED=rope == "interleaved",
            SHARED=shared,
            PARTS=most,
            BLOCK=BLOCK,
            HEAD_BLOCK=HEAD_BLOCK,
            num_stages=1,
            num_warps=4 if features <= 128 else 8,
            enable_fp_fusion=False,
        )
    return run_select(Logits(logits, peaks, totals, heads, logit_stride, most, BLOCK), candidates, texts, segments)


def most_parts(groups: int) -> int:
    """Most parts of one sample: a function of the model alone, for results must not depend on the batch.

    About 1024 programs per long sample fill any GPU; more would only lengthen the merge of their statistics.
    """
    return min(max(1024 // int(triton.next_power_of_2(groups)), 32), 256)


def key_heads_per_program(groups: int, programs: int, device: torch.device) -> int:
    """Key heads that one program takes in turn, to read cos and sin once for all, as long as the GPU stays full."""
    shared = 1
    while groups % (2 * shared) == 0 and programs >= 8 * shared * processors(device):
        shared *= 2
    return shared
