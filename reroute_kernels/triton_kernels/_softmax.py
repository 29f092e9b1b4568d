"""Scores from logits, inside a kernel: the mean over heads of a softmax whose statistics come in parts."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def merge_parts(peaks, totals, parts, HEADS: tl.constexpr):
    """Per head the maximum over all parts, and the weight 1 / (H * sum of powers)."""
    WIDTH: tl.constexpr = triton.next_power_of_2(HEADS)
    STEP: tl.constexpr = max(4096 // WIDTH, 1)  # few steps, for each waits for its loads
    head = tl.arange(0, WIDTH)
    peak = tl.full([WIDTH], -float("inf"), tl.float32)
    total = tl.zeros([WIDTH], tl.float32)
    for first in range(0, parts, STEP):
        part = first + tl.arange(0, STEP)
        place = part[:, None] * HEADS + head[None, :]
        mask = (part < parts)[:, None] & (head < HEADS)[None, :]
        part_peak = tl.load(peaks + place, mask=mask, other=-float("inf"))
        part_total = tl.load(totals + place, mask=mask, other=0.0)
        grown = tl.maximum(peak, tl.max(part_peak, 0))
        shift = tl.where(grown == -float("inf"), 0.0, grown)  # -inf minus -inf would be NaN
        total = total * tl.exp2(peak - shift) + tl.sum(part_total * tl.exp2(part_peak - shift[None, :]), 0)
        peak = grown
    real = head < HEADS
    return tl.where(real, peak, 0.0), tl.where(real, 1.0 / (total * HEADS), 0.0)


@triton.jit
def head_mean(logits, rows, valid, peak, weight, stride, HEADS: tl.constexpr):
    """Mean over heads of the softmax at ``rows``; all heads at once, so that one wait covers their loads."""
    head = tl.arange(0, peak.shape[0])
    mask = valid[None, :] & (head < HEADS)[:, None]
    # Triton 3.6 would lay lanes along heads, a sector for each logit. The hint lays them along rows.
    at = tl.max_contiguous(logits + (head[:, None] * stride + rows[None, :]), [1, 2])
    logit = tl.load(at, mask=mask, other=-float("inf"))
    return tl.sum(tl.exp2(logit - peak[:, None]) * weight[:, None], 0)
