"""Attention scores of the last prompt token, fused: rotary embedding, logits and softmax statistics in one launch.

A second launch (:mod:`reroute_kernels.triton_kernels.select`) turns logits into scores and selects. Only
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

from reroute_kernels.reference import RMSNorm, Rope, Segments, Selection
from reroute_kernels.triton_kernels._common import Variant, rowwise
from reroute_kernels.triton_kernels._notes import clear_counters, num_counters
from reroute_kernels.triton_kernels.select import Logits, run_select

STRIDE = 16  # logits of a head begin at multiples of it


class Tiling(NamedTuple):
    """What a program of ``warps`` warps takes at once.

    joined: key heads of a warp. rows: query heads of a warp, at most. block: keys.
    """

    warps: int
    joined: int
    rows: int
    block: int


@triton.jit
def _load(rows, mask, FIRST: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """Features FIRST.. of ``rows`` (a, b): (a, b, WIDTH), zeros from COUNT on and where not ``mask``."""
    column = tl.arange(0, WIDTH)
    wanted = mask[:, :, None]
    if COUNT < WIDTH:
        wanted = wanted & (column < COUNT)[None, None, :]
    return tl.load(rows[:, :, None] + (FIRST + column)[None, None, :], mask=wanted, other=0.0)


@triton.jit
def _load_pairs(rows, mask, ROT: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The two features of every rotary pair of ``rows`` (a, b), with zeros to a power of two of at least 16."""
    HALF: tl.constexpr = ROT // 2
    WIDTH: tl.constexpr = triton.next_power_of_2(HALF) if HALF > 16 else 16
    if INTERLEAVED:
        both = _load(rows, mask, 0, ROT, 2 * WIDTH)
        first, second = tl.split(both.reshape(both.shape[0], both.shape[1], WIDTH, 2))
    else:
        first = _load(rows, mask, 0, HALF, WIDTH)
        second = _load(rows, mask, HALF, HALF, WIDTH)
    return first, second


@triton.jit
def _load_angles(rows, mask, ROT: tl.constexpr, INTERLEAVED: tl.constexpr, dtype: tl.constexpr):
    """One number per rotary pair: the tables hold each at both places."""
    if INTERLEAVED:
        angles, _ = _load_pairs(rows, mask, ROT, INTERLEAVED)
    else:
        HALF: tl.constexpr = ROT // 2
        angles = _load(rows, mask, 0, HALF, triton.next_power_of_2(HALF) if HALF > 16 else 16)
    return angles.to(dtype)


@triton.jit
def _load_features(rows, mask, D: tl.constexpr, ROT: tl.constexpr, INTERLEAVED: tl.constexpr):
    """A tuple of the parts that exist: first and second halves of the rotary pairs, features that do not rotate."""
    REST: tl.constexpr = triton.next_power_of_2(D - ROT) if D - ROT > 16 else 16
    if ROT == D:
        parts = _load_pairs(rows, mask, ROT, INTERLEAVED)
    elif ROT > 0:
        first, second = _load_pairs(rows, mask, ROT, INTERLEAVED)
        parts = (first, second, _load(rows, mask, ROT, D - ROT, REST))
    else:
        parts = (_load(rows, mask, ROT, D - ROT, REST),)
    return parts


@triton.jit
def _square(part):
    """Sum of squares over features, fp32."""
    return tl.sum(part.to(tl.float32) * part.to(tl.float32), 2)


@triton.jit
def _normalise(parts, weights, eps, D: tl.constexpr):
    """Root-mean-square norm over the D features; what pads them is zero and stays so."""
    square = _square(parts[0])
    for i in tl.static_range(1, len(parts)):
        square += _square(parts[i])
    factor = tl.rsqrt(square * (1 / D) + eps)[:, :, None]
    normed = ()
    for i in tl.static_range(len(parts)):  # in fp32 and rounded before the weight, as models do it
        scaled = (parts[i].to(tl.float32) * factor).to(parts[i].dtype)
        normed = normed + (scaled * weights[i].to(scaled.dtype),)  # type: ignore[assignment]  # noqa: RUF005
    return normed


@triton.jit
def _rotate(parts, cos, sin, mask, ROT: tl.constexpr, INTERLEAVED: tl.constexpr):
    """In the dtype of the keys and rounded at every step, as the model's own rotation is."""
    if ROT > 0:
        first, second = parts[0], parts[1]
        c = _load_angles(cos, mask, ROT, INTERLEAVED, first.dtype)
        s = _load_angles(sin, mask, ROT, INTERLEAVED, first.dtype)
        parts = (first * c - second * s, second * c + first * s) + parts[2:]  # noqa: RUF005
    return parts


@triton.jit
def _add_products(logit, q, k):
    """``logit`` (warps, heads, rows) plus q (warps, heads, features) times k, whose leading axes are warps and rows."""
    for i in tl.static_range(len(q)):
        rows = k[i].reshape(logit.shape[0], logit.shape[2], k[i].shape[2])
        logit = tl.dot(q[i], rows.permute(0, 2, 1), logit, input_precision="ieee")
    return logit


# Where in one upload the index lists happen to begin must not compile anew, nor what divides the batch; a batch of one
# is compiled for by itself, which saves a hundredth of the instructions.
@triton.jit(do_not_specialize_on_alignment=["query_rows", "counts", "batch"])
def _score_kernel(
    query,
    keys,
    cos,
    sin,
    query_rows,
    norm_weight,
    counts,
    counters,
    logits,
    batch,
    logit_stride,
    peaks_at,
    scale,
    norm_eps,
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
    WARPS: tl.constexpr,
    JOINED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Logits (base 2) of one part of one sample for a few key heads, and behind all logits their maximum and sum.

    Each warp takes JOINED key heads and up to ROWS of their query heads. A sample is cut into at most PARTS
    parts by its own length alone, so that its bits do not depend on its neighbours.
    """
    TURNS: tl.constexpr = (JOINED * HEADS + ROWS - 1) // ROWS
    part, sample = tl.program_id(0), tl.program_id(2)
    if (part == 0) & (tl.program_id(1) == 0):
        clear_counters(counters, sample)
    start = tl.load(counts + sample).to(tl.int32)
    length = tl.load(counts + batch + sample).to(tl.int32)
    step = tl.cdiv(tl.cdiv(length, BLOCK), PARTS) * BLOCK
    begin = part * step
    if begin < length and tl.load(counts + 2 * batch + sample) > 0:
        first_group = tl.program_id(1) // TURNS * WARPS * JOINED
        group = first_group + tl.arange(0, WARPS * JOINED)
        member = tl.program_id(1) % TURNS * ROWS + tl.arange(0, ROWS)
        head = (first_group + tl.arange(0, WARPS) * JOINED)[:, None] * HEADS + member[None, :]
        real = tl.broadcast_to((member < JOINED * HEADS)[None, :], WARPS, ROWS)
        one = tl.full([1, 1], 1, tl.int1)
        last = tl.load(query_rows + sample) + tl.zeros([1, 1], tl.int64)
        q = _load_features(query + sample.to(tl.int64) * query_stride + head * query_head, real, D, ROT, INTERLEAVED)
        q = _rotate(q, cos + last * cos_stride, sin + last * sin_stride, one, ROT, INTERLEAVED)
        if norm_weight is not None:
            weights = _load_features(norm_weight + last * 0, one, D, ROT, INTERLEAVED)
        out = logits + (sample.to(tl.int64) * GROUPS * HEADS + head)[:, :, None] * logit_stride
        peak = tl.full([WARPS, ROWS], -float("inf"), tl.float32)
        total = tl.zeros([WARPS, ROWS], tl.float32)
        for tile in range(begin, tl.minimum(begin + step, length), BLOCK):
            row = tile + tl.arange(0, BLOCK)[None, :]
            valid = row < length
            place = (start + row).to(tl.int64)
            at = keys + place * key_stride + group.to(tl.int64)[:, None] * key_group
            k = _load_features(at, tl.broadcast_to(valid, WARPS * JOINED, BLOCK), D, ROT, INTERLEAVED)
            if norm_weight is not None:
                k = _normalise(k, weights, norm_eps, D)
            k = _rotate(k, cos + place * cos_stride, sin + place * sin_stride, valid, ROT, INTERLEAVED)
            logit = _add_products(tl.zeros([WARPS, ROWS, JOINED * BLOCK], tl.float32), q, k)
            if JOINED > 1:  # each query head keeps what belongs to its own key head
                own = (member // HEADS)[:, None] == tl.arange(0, JOINED)[None, :]
                each = logit.reshape(WARPS, ROWS, JOINED, BLOCK)
                logit = tl.sum(tl.where(own[None, :, :, None], each, 0.0), 2)
            logit = tl.where(valid[:, None, :], logit * scale, -float("inf"))
            tl.store(out + row[:, None, :], logit, mask=real[:, :, None])  # whole tiles, for wide stores
            grown = tl.maximum(peak, tl.max(logit, 2))
            shift = tl.where(grown == -float("inf"), 0.0, grown)  # -inf minus -inf would be NaN
            total = total * tl.exp2(peak - shift) + tl.sum(tl.exp2(logit - shift[:, :, None]), 2)
            peak = grown
        stats = logits + peaks_at + (sample * PARTS + part) * GROUPS * HEADS + head
        tl.store(stats, peak, mask=real)
        tl.store(stats + batch * PARTS * GROUPS * HEADS, total, mask=real)


def score_topk(
    query: Tensor,
    keys: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_rows: Tensor,
    candidates: Tensor,
    texts: Tensor,
    positions: Tensor,
    segments: Segments,
    *,
    scale: float,
    rope: Rope = "half",
    key_norm: RMSNorm | None = None,
    counts: Tensor | None = None,
) -> Selection:
    """:func:`reroute_kernels.reference.score_topk` in two launches, without a device synchronisation.

    counts: those of ``segments`` on the device, if they are there.

    16-byte loads need contiguous features, and strides and D that are multiples of 16 elements, as
    projections make them; all else is right but slower.
    """
    (batch, heads, features), groups = query.shape, keys.shape[1]
    if heads % groups:
        raise ValueError(f"{heads} query heads cannot share {groups} key heads")
    if rope not in ("half", "interleaved"):
        raise ValueError(f"unknown rope layout {rope!r}; known: 'half', 'interleaved'")
    query, keys, cos, sin, query_rows = map(rowwise, (query, keys, cos, sin, query_rows))
    if key_norm is not None and key_norm.weight.shape != keys.shape[2:]:
        raise ValueError(f"a key norm of {tuple(key_norm.weight.shape)} features is not one of {features}")
    norm_weight, norm_eps = key_norm or (None, 0.0)
    device, length = query.device, max(segments.lengths)
    shape = tiling(heads, groups, features, keys.element_size(), key_norm is not None)
    most = most_parts(shape)
    logit_stride = -(-length // STRIDE) * STRIDE
    peaks_at = batch * heads * logit_stride
    counts = segments.counts(device) if counts is None else counts
    logits = torch.empty(peaks_at + 2 * batch * most * heads, dtype=torch.float32, device=device)
    counters = torch.empty(num_counters(batch), dtype=torch.int32, device=device)  # the launch clears them
    parts, turns = max(min(-(-length // shape.block), most), 1), -(-shape.joined * heads // (groups * shape.rows))
    _variant(groups, heads // groups, features, cos.shape[-1], rope == "interleaved", shape, most, batch == 1)(
        (parts, groups // (shape.warps * shape.joined) * turns, batch),
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
        logit_stride,
        peaks_at,
        scale * math.log2(math.e),
        norm_eps,
        *query.stride()[:2],
        *keys.stride()[:2],
        cos.stride(0),
        sin.stride(0),
    )
    source = Logits(logits, logit_stride, peaks_at, heads, most, shape.block)
    return run_select(source, candidates, texts, positions, counts, counters, segments)


@lru_cache(maxsize=256)
def _variant(
    groups: int, heads: int, features: int, rot: int, interleaved: bool, shape: Tiling, parts: int, alone: bool
) -> Variant:
    constants = {
        "GROUPS": groups,
        "HEADS": heads,
        "D": features,
        "ROT": rot,
        "INTERLEAVED": interleaved,
        "WARPS": shape.warps,
        "JOINED": shape.joined,
        "ROWS": shape.rows,
        "BLOCK": shape.block,
        "PARTS": parts,
    }
    name = "score, one prompt" if alone else "score, several prompts"
    return Variant(name, _score_kernel, constants, num_stages=1, num_warps=shape.warps, enable_fp_fusion=False)


@cache
def tiling(heads: int, groups: int, features: int, itemsize: int, norm: bool) -> Tiling:
    """A function of the model alone, for results must not depend on the batch.

    A program takes many key heads, as it reads cos and sin once for all of them. A warp takes one key head, and the
    16 query heads that a tensor core takes at once; or two key heads, where all their query heads fit. What else
    differs saves registers: a norm and wide heads mean smaller tiles, and fp32 has no tensor cores that keep its
    precision.
    """
    if itemsize > 2:
        return Tiling(math.gcd(groups, 4), joined=1, rows=4, block=8)
    if features > 128:
        return Tiling(math.gcd(groups, 4), joined=1, rows=16, block=8)
    if norm:
        return Tiling(math.gcd(groups, 8), joined=1, rows=16, block=8)
    if groups % 8 == 0 and heads // groups <= 8:
        return Tiling(math.gcd(groups, 16) // 2, joined=2, rows=16, block=8)
    return Tiling(math.gcd(groups, 4), joined=1, rows=16, block=16)


def most_parts(shape: Tiling) -> int:
    """Most parts of one sample, by the model alone too: more would only lengthen the merge of their statistics."""
    return min(1024 // shape.warps, 256)
