"""Tensors that tests of the reference and of the kernels are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

NEGATIVE_NAN = torch.tensor([0xFFC00001 - 2**32], dtype=torch.int32).view(torch.float32).item()


def padded(
    rows: Sequence[Sequence[int] | Tensor],
    *,
    width: int = 0,
    device: torch.device | str = "cpu",
    align: Literal["left", "right"] = "left",
) -> Tensor:
    """(B, longest or ``width``) int64 of ragged lists: -1 behind them, or before them if aligned to the right."""
    lists = [torch.as_tensor(row, dtype=torch.int64) for row in rows]
    out = torch.full((len(lists), max(width, *map(len, lists), 0)), -1)
    for target, source in zip(out, lists, strict=True):
        target[slice(len(source)) if align == "left" else slice(len(target) - len(source), None)] = source
    return out.to(device)
