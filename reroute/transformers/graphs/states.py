"""Layers that keep a state, in a graph: their rows turned so that fillers come first, and change none of it."""

from __future__ import annotations

import torch

from ...graphs import in_one, picked

__all__ = ["FillersFirst"]


class FillersFirst:
    """The rows of a stage as layers need them whose state is that of the last row: real ones at the end.

    In a graph fillers come last, and how many there are only the device knows. So rows go round by their number before
    such a layer, and back behind it. The layer is told which are real, as it is of padding: what it hides leaves a
    state of zeros as it is (``adapters.recurrent`` has checked that).
    """

    def __init__(self, is_real: torch.Tensor) -> None:
        """``is_real`` (B, S): True of real rows, which come first."""
        length = is_real.shape[1]
        row = torch.arange(length, device=is_real.device)
        count = is_real.sum(1, keepdim=True)
        self._there, self._back = (in_one(torch.remainder(row + by, length), length) for by in (count, -count))
        self.mask = row >= length - count
        """(B, S): True of real rows, which come last."""

    def turned(self, hidden: torch.Tensor) -> torch.Tensor:
        """Rows (B, S, C) with fillers first."""
        return picked(hidden, self._there)

    def restored(self, hidden: torch.Tensor) -> torch.Tensor:
        """What ``turned`` was given, of what it has returned."""
        return picked(hidden, self._back)
