"""Cache layers that keep a window of the rows that a stage ran on."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad
from transformers.cache_utils import DynamicSlidingWindowLayer, StaticSlidingWindowLayer

from .layers import RoutedLayer, stored_as
from .storage import visible_columns

__all__ = ["RoutedSlidingLayer", "RoutedStaticSlidingLayer"]


@stored_as(lambda plain: plain is DynamicSlidingWindowLayer)
class RoutedSlidingLayer(RoutedLayer):  # type: ignore[no-untyped-call]
    """A routed layer that keeps the last W - 1 of its rows, for a window of W.

    Between two rows of a sample there are no more rows than logical positions. So whatever the window of a later token
    shows is among them; what else is, its mask hides. ``cumulative_length`` counts all rows that were ever stored.
    """

    sliding_window: int

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``GuardedLayer``. Returns as many rows as ``key_positions_with`` says, also while more are recorded."""
        seen = visible_columns(self, 0) + key_states.shape[-2]
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys[..., -seen:, :], values[..., -seen:, :]

    @property
    def first_visible(self) -> int:
        """See ``RoutedLayer``: where the window of the next token begins."""
        return max(0, self.get_seq_length() - self.sliding_window + 1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of Transformers' masks and the position of the first one, as of a layer that lacks no rows."""
        first = self.first_visible
        return self.get_seq_length() - first + query_length, first


@stored_as(lambda plain: plain is StaticSlidingWindowLayer)
class RoutedStaticSlidingLayer(RoutedLayer):  # type: ignore[no-untyped-call]
    """A routed layer that keeps the last of its rows in memory that it has allocated for good.

    While the memory is not full, all of it is given away; what is empty yet is hidden as fillers are. The host counts,
    in the plain layer too. ``max_cache_len`` is the logical window, or the logical room if that is shorter.
    """

    keys: torch.Tensor
    max_cache_len: int

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``GuardedLayer``. Returns as many rows as ``key_positions_with`` says."""
        logical, self.max_cache_len = self.max_cache_len, self.unlisted_room
        try:
            return super().update(key_states, value_states, *args, **kwargs)
        finally:
            self.max_cache_len = logical

    @property
    def first_visible(self) -> int:
        """See ``RoutedLayer``: where the window of the next token begins."""
        return max(0, self.get_seq_length() - self.max_cache_len + 1)

    @property
    def unlisted_room(self) -> int:
        """See ``RoutedLayer``."""
        return int(self.keys.shape[-2])

    def key_positions_with(self, new: int) -> torch.Tensor:
        """See ``RoutedLayer``: of all that is given away, with fillers for what is empty."""
        positions = super().key_positions_with(new)
        return pad(positions, (0, max(0, self.unlisted_room - positions.shape[1])), value=-1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of Transformers' masks and the position of the first one, as of a layer that lacks no rows."""
        first = self.first_visible
        return max(self.max_cache_len, self.get_seq_length() + query_length) - first, first
