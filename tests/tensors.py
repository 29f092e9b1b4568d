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


def rows_of_exact_cosines(n: int, features: int = 16) -> Tensor:
    """(n, features) fp32, each row 0, 1, 4 or 16 times plus or minus a power of two, so few different ones.

    Their norms are powers of two and all cosines fractions of 16: sums of them have no rounding, so that many are equal
    whatever the order of summation. ``features``: at least 16.
    """
    signs = torch.randint(0, 2, (n, features)) * 2.0 - 1
    count = torch.tensor([0, 1, 4, 16])[torch.randint(0, 4, (n, 1))]
    chosen = torch.arange(features) < count
    moved = (torch.arange(features) + torch.randint(0, 3, (n, 1))) % features
    return (signs * chosen).gather(1, moved) * 2.0 ** torch.randint(-3, 4, (n, 1))
