"""Block masks of flex attention: what may be seen is a function of indices, so it is told of the rows that run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

__all__ = ["block_mask"]

Mod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def block_mask(
    mask: BlockMask | None, rows: torch.Tensor, columns: torch.Tensor, *, is_causal: bool = True
) -> BlockMask:
    """Mask of S running rows and T keys.

    Args:
        mask: Transformers' for the logical sequence, whose function takes logical indices; None for one that shows what
            came before, or everything unless ``is_causal``.
        rows: (B, S) index in ``mask`` of every running row, -1 for fillers. Without one, it counts as ``columns`` do.
        columns: (B, T) index in ``mask`` of every key, -1 for what nobody sees.
    """
    logical = _causal if mask is None and is_causal else _everything if mask is None else mask.mask_mod

    def compact(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        row, column = rows[b, q], columns[b, k]
        shown = logical(b, h, row.clamp(min=0), column.clamp(min=0))
        return (column >= 0) & (shown | (row < 0))  # a filler sees all, since a row that sees nothing may become NaN

    batch, length = rows.shape
    return create_block_mask(compact, batch, None, length, columns.shape[1], device=rows.device)


def _causal(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return k <= q


def _everything(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return k >= 0
