"""Scores from logits, inside a kernel: the mean over heads of a softmax whose statistics come in splits."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def combine_splits(m_ptr, l_ptr, num_splits, NUM_QO_HEADS: tl.constexpr):
    """Per query head the maximum over all splits, and the weight 1 / (H * sum of powers)."""
    BLOCK_H: tl.constexpr = triton.next_power_of_2(NUM_QO_HEADS)
    BLOCK_S: tl.constexpr = max(4096 // BLOCK_H, 1)  # few steps, for each waits for its loads
    offs_h = tl.arange(0, BLOCK_H)
    m_i = tl.full([BLOCK_H], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK_H], tl.float32)
    for first in range(0, num_splits, BLOCK_S):
        offs_s = first + tl.arange(0, BLOCK_S)
        offs = offs_s[:, None] * NUM_QO_HEADS + offs_h[None, :]
        mask = (offs_s < num_splits)[:, None] & (offs_h < NUM_QO_HEADS)[None, :]
        m_s = tl.load(m_ptr + offs, mask=mask, other=-float("inf"))  # [BLOCK_S, BLOCK_H]
        l_s = tl.load(l_ptr + offs, mask=mask, other=0.0)  # [BLOCK_S, BLOCK_H]
        m_new = tl.maximum(m_i, tl.max(m_s, 0))
        m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)  # -inf minus -inf would be NaN
        l_i = l_i * tl.exp2(m_i - m_safe) + tl.sum(l_s * tl.exp2(m_s - m_safe[None, :]), 0)
        m_i = m_new
    mask_h = offs_h < NUM_QO_HEADS
    return tl.where(mask_h, m_i, 0.0), tl.where(mask_h, 1.0 / (l_i * NUM_QO_HEADS), 0.0)


@triton.jit
def head_mean(logits_ptr, rows, mask_n, m_i, weight, stride_h, NUM_QO_HEADS: tl.constexpr):
    """Mean over heads of the softmax at ``rows``; all heads at once, so that one wait covers their loads."""
    offs_h = tl.arange(0, m_i.shape[0])
    mask = mask_n[None, :] & (offs_h < NUM_QO_HEADS)[:, None]
    # Triton 3.6 would lay lanes along heads, a sector for each logit. The hint lays them along rows.
    ptrs = tl.max_contiguous(logits_ptr + (offs_h[:, None] * stride_h + rows[None, :]), [1, 2])
    logit = tl.load(ptrs, mask=mask, other=-float("inf"))  # [BLOCK_H, BLOCK_N]
    return tl.sum(tl.exp2(logit - m_i[:, None]) * weight[:, None], 0)
