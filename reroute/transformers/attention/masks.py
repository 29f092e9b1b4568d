"""Attention masks for rows and columns that were taken out of a logical sequence.

Transformers builds one mask per forward for the logical lengths. A routed layer runs on fewer rows and its cache
holds fewer columns, so it gets the rows and columns of that mask that are really there. ``None`` stays ``None``
wherever the attention is then right, because any mask keeps CUDA's fast kernels from being used.
"""

from __future__ import annotations

from typing import Any

import torch

from .blocks import block_mask
from .formats import MaskFormat

__all__ = ["decode_mask", "prefill_mask"]


def prefill_mask(
    mask: Any,
    rows: torch.Tensor,
    key_positions: torch.Tensor,
    *,
    past: int,
    has_fillers: bool,
    is_causal: bool = True,
    mask_format: MaskFormat,
    dtype: torch.dtype,
) -> Any:
    """Mask for a stage of a prefill.

    Args:
        mask: Transformers' mask for the logical sequence: None, (B|1, 1, L, past + L) bool or additive, (B, past + L)
            in the format ``padding``, or a ``BlockMask``. Of sliding layers it has only the last columns.
        rows: (B, S) position within this call of every running row, -1 for fillers.
        key_positions: (B, T) logical position of every key, -1 for fillers; the last S are those of ``rows``.
        past: logical length of the cache before this call.
        has_fillers: whether any row or column is a filler.
        is_causal: what a missing mask means: to see what came before, or everything.
        mask_format: of a mask built from nothing.
        dtype: of an additive mask built from nothing.
    """
    if mask_format == "block":
        if mask is None:
            return block_mask(None, torch.where(rows < 0, -1, rows + past), key_positions, is_causal=is_causal)
        return block_mask(mask, rows, _columns(key_positions, past + mask.shape[2], mask)[0])
    if mask is None:
        # Without a mask eager attention sees everything, and SDPA what comes before only where nothing is cached.
        means_it = mask_format == "padding" or (past == 0 and mask_format != "additive") or not is_causal
        if not has_fillers and means_it:
            return None
        if mask_format == "padding":
            return key_positions >= 0
        picked = (key_positions[:, None, :] <= (rows + past)[:, :, None]).unsqueeze(1)
        picked = picked if is_causal else torch.ones_like(picked)
        if mask_format == "additive":
            lowest = torch.finfo(dtype).min
            picked = torch.zeros_like(picked, dtype=dtype).masked_fill_(~picked, lowest)
    elif mask.ndim == 2:
        return _pick_2d(mask, key_positions)
    else:
        sample = torch.arange(rows.shape[0], device=mask.device)[:, None, None]
        key_positions, is_cut = _columns(key_positions, past + mask.shape[2], mask)
        has_fillers = has_fillers or is_cut
        mask = mask.expand(rows.shape[0], -1, -1, -1)
        # A filler, -1, picks the last row or column.
        picked = mask[sample, 0, rows[:, :, None], key_positions[:, None, :]].unsqueeze(1)
    return _without_fillers(picked, rows, key_positions) if has_fillers else picked


def decode_mask(mask: Any, key_positions: torch.Tensor, length: int, *, first: int = 0, mask_format: MaskFormat) -> Any:
    """Mask for new tokens on a cache with rows at ``key_positions`` (B, T), -1 for fillers; the last are the new ones.

    ``length`` is the logical one with them. With ``mask`` None every key from position ``first`` on that is not a
    filler is visible (Transformers passes None only then).
    """
    if mask_format == "block":
        rows = torch.arange(mask.shape[2], device=key_positions.device).expand(len(key_positions), -1)
        return block_mask(mask, rows, _columns(key_positions, length, mask)[0])
    if mask is None:
        present = key_positions >= first
        return present if mask_format == "padding" else present[:, None, None, :]
    if mask.ndim == 2:
        return _pick_2d(mask, key_positions)
    key_positions, _ = _columns(key_positions, length, mask)
    present = (key_positions >= 0)[:, None, None, :]
    index = key_positions.clamp(min=0)[:, None, None, :].expand(-1, -1, mask.shape[2], -1)
    picked = mask.expand(key_positions.shape[0], -1, -1, -1).gather(3, index)
    if picked.dtype == torch.bool:
        return picked & present
    return picked.masked_fill(~present, torch.finfo(picked.dtype).min)


def _columns(key_positions: torch.Tensor, length: int, mask: Any) -> tuple[torch.Tensor, bool]:
    """Which of the columns of ``mask``, the last ones of a logical sequence, are keys at ``key_positions`` (B, T).

    A key before all of them is hidden as fillers are, -1. Returns whether there may be some.
    """
    before = max(0, length - mask.shape[-1])
    return ((key_positions - before).clamp(min=-1), True) if before else (key_positions, False)


def _pick_2d(mask: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
    return mask.gather(1, key_positions.clamp(min=0)).bool() & (key_positions >= 0)


def _without_fillers(mask: torch.Tensor, rows: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
    """Hide filler columns, in place; let filler rows see all others, since a row that sees nothing may become NaN."""
    shown, hidden = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
    mask.masked_fill_((rows < 0)[:, None, :, None], shown)
    return mask.masked_fill_((key_positions < 0)[:, None, None, :], hidden)
