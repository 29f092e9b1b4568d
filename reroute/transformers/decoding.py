"""New tokens on a cache with routed layers."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache

from ..core.prefill import PositionTables
from .adapters import ModelAdapter, no_rotation, tables_in
from .cache import KeptStates, cache_of, keep_states, takes_any_step
from .forward import ForwardContext, Kwargs
from .stage_arguments import StageArguments

__all__ = ["RoutedDecode", "tables_of"]


class RoutedDecode(ForwardContext):
    """New tokens on a cache with routed layers: decoding, or a later turn without pictures."""

    def __init__(self, adapter: ModelAdapter, shape: tuple[int, int], kept: KeptStates | None = None) -> None:
        """``kept``: what the cache keeps for later turns, and shall keep of the new tokens too."""
        super().__init__(adapter, shape)
        self._arguments = StageArguments(adapter)
        self._kept_states = kept
        self._cache: Cache | None = None

    def before_layer(self, index: int, hidden: torch.Tensor, kwargs: Kwargs) -> torch.Tensor:
        """Adapt what layers get, one by one, unless it can be told at once that none needs it."""
        cache = cache_of(kwargs)
        has_no_mask = self._adapter.has_one_kind and kwargs.get("attention_mask") is None
        if has_no_mask and self._kept_states is None and takes_any_step(cache):
            self.is_idle = True
            self._allow_updates(cache, index)
            return hidden
        return self.adapt(index, hidden, kwargs)

    def adapt(self, index: int, hidden: torch.Tensor, kwargs: Kwargs) -> torch.Tensor:
        """Give a routed layer what it needs instead of what the decoder gives: see ``StageArguments``."""
        self._cache = cache = cache_of(kwargs)
        if self._kept_states is not None and index == self._kept_states.layer:
            self._kept_states = self._kept_states.followed_by(hidden, tables_of(kwargs, hidden, self._adapter.head_dim))
        layer = self._allow_update(cache, index)
        if layer is None:
            return hidden
        self._arguments.adapt(layer, hidden, kwargs)
        return hidden

    def finish(self) -> None:
        """See ``ForwardContext``."""
        if self._kept_states is not None and self._cache is not None:
            keep_states(self._cache, self._kept_states)
        super().finish()


def tables_of(kwargs: Kwargs, hidden: torch.Tensor, width: int) -> PositionTables:
    """Rotary tables and position ids that a decoder gives to a layer with ``hidden`` (B, L, C).

    Without any, those (1, L, ``width``) that turn nothing.
    """
    tables, ids = tables_in(kwargs.get("position_embeddings")), kwargs.get("position_ids")
    if tables is None:
        tables = no_rotation(hidden, width)
    # Of the three of M-RoPE layers use what the tables are made of, and nothing else.
    return PositionTables(*tables, ids if ids is None or ids.ndim == 2 else None)
