"""Attention masks for rows and columns that were taken out of a logical sequence.

Transformers builds one mask per forward for the logical lengths. A routed layer runs on fewer rows and its cache
holds fewer columns, so it gets the rows and columns of that mask that are really there. ``None`` stays ``None``
wherever the attention is then right, because any mask keeps CUDA's fast kernels from being used.
"""

from __future__ import annotations

import torch

__all__ = ["decode_mask", "prefill_mask"]


def prefill_mask(
    mask: torch.Tensor | None,
    rows: torch.Tensor,
    columns: torch.Tensor,
    *,
    past: int,
    fillers: bool,
    implementation: str,
    dtype: torch.dtype,
) -> torch.Tensor | None:
    """Mask for a stage of a prefill.

    Args:
        mask: Transformers' mask for the logical sequence: None, (B|1, 1, L, past + L) bool or additive, or
            (B, past + L) for flash attention.
        rows: (B, S) position within this call of every running row, -1 for fillers.
        columns: (B, T) logical position of every key, -1 for fillers; the last S are those of ``rows``.
        past: logical length of the cache before this call.
        fillers: whether any row or column is a filler.
        implementation: the model's attention implementation, which fixes the form of a mask built from nothing.
        dtype: of an additive mask built from nothing.
    """
    if mask is None:
        if not fillers and (past == 0 or implementation.startswith("flash")):
            return None
        if implementation.startswith("flash"):
            return columns >= 0
        visible = columns[:, None, :] <= (rows + past)[:, :, None]
        return _finish(visible.unsqueeze(1), rows, columns, additive=implementation == "eager", dtype=dtype)
    if mask.ndim == 2:
        return _pick_2d(mask, columns)
    sample = torch.arange(rows.shape[0], device=mask.device)[:, None, None]
    mask = mask.expand(rows.shape[0], -1, -1, -1)
    picked = mask[sample, 0, rows.clamp(min=0)[:, :, None], columns.clamp(min=0)[:, None, :]].unsqueeze(1)
    return _finish(picked, rows, columns, additive=picked.dtype != torch.bool, dtype=dtype)


def decode_mask(mask: torch.Tensor | None, columns: torch.Tensor, *, implementation: str) -> torch.Tensor:
    """Mask for new tokens on a cache whose rows lie at ``columns`` (B, T), -1 for fillers; the last are the new ones.

    With ``mask`` None every key that is not a filler is visible (Transformers passes None only then).
    """
    if mask is None:
        present = columns >= 0
        return present if implementation.startswith("flash") else present[:, None, None, :]
    if mask.ndim == 2:
        return _pick_2d(mask, columns)
    present = (columns >= 0)[:, None, None, :]
    index = columns.clamp(min=0)[:, None, None, :].expand(-1, -1, mask.shape[2], -1)
    picked = mask.expand(columns.shape[0], -1, -1, -1).gather(3, index)
    if picked.dtype == torch.bool:
        return picked & present
    return picked.masked_fill(~present, torch.finfo(picked.dtype).min)


def _pick_2d(mask: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return mask.gather(1, columns.clamp(min=0)).bool() & (columns >= 0)


def _finish(
    mask: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, *, additive: bool, dtype: torch.dtype
) -> torch.Tensor:
    """Hide filler columns; let filler rows see themselves, since a row that sees nothing may become NaN."""
    hidden = (columns < 0)[:, None, None, :]
    length, start = rows.shape[1], columns.shape[1] - rows.shape[1]
    itself = torch.ones(length, length, dtype=torch.bool, device=rows.device).diag().diag()
    itself = torch.nn.functional.pad(itself, (start, 0)) & (rows < 0)[:, None, :, None]
    if not additive:
        return (mask & ~hidden) | itself
    if mask.dtype == torch.bool:
        lowest = torch.finfo(dtype).min
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, lowest)
    return mask.masked_fill(hidden, torch.finfo(mask.dtype).min).masked_fill(itself, 0.0)
