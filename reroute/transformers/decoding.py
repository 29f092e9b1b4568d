"""New tokens on a cache with routed layers."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache

from ..core.prefill import PositionTables
from .adapters import ModelAdapter, in_form_of, no_rotation, tables_in
from .attention import decode_mask
from .cache import KeptStates, RoutedLayer, cache_of, keep_states, takes_any_step
from .forward import ForwardContext, Kwargs

__all__ = ["RoutedDecode", "tables_of"]


class RoutedDecode(ForwardContext):
    """New tokens on a cache with routed layers: decoding, or a later turn without pictures.

    Stages share the mask that their first layer needed.
    """

    def __init__(self, adapter: ModelAdapter, shape: tuple[int, int], kept: KeptStates | None = None) -> None:
        """``kept``: what the cache keeps for later turns, and shall keep of the new tokens too."""
        super().__init__(adapter, shape)
        self._masks: dict[tuple[Any, ...], tuple[torch.Tensor | None, torch.Tensor]] = {}
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
        """Give a routed layer the columns of the mask that it holds; nothing where there is no mask."""
        self._cache = cache = cache_of(kwargs)
        if self._kept_states is not None and index == self._kept_states.layer:
            self._kept_states = self._kept_states.followed_by(hidden, tables_of(kwargs, hidden, self._adapter.head_dim))
        layer = self._allow_update(cache, index)
        if layer is None:
            return hidden
        mask, first = kwargs.get("attention_mask"), layer.first_visible
        if mask is not None or layer.rows.has_fillers or first:
            kwargs["attention_mask"] = self._mask(layer, mask, hidden.shape[1], first)
        if layer.rows.position_offset is not None:
            kwargs["position_ids"] = ids = kwargs["position_ids"] - layer.rows.position_offset
            cos, sin = self._adapter.rope_tables(hidden, ids)
            kwargs["position_embeddings"] = in_form_of(kwargs["position_embeddings"], cos, sin)
        return hidden

    def finish(self) -> None:
        """See ``ForwardContext``."""
        if self._kept_states is not None and self._cache is not None:
            keep_states(self._cache, self._kept_states)
        super().finish()

    def _mask(self, layer: RoutedLayer, mask: torch.Tensor | None, new: int, first: int) -> torch.Tensor:
        """``mask``, or one that shows all from position ``first`` on, for the keys that ``layer`` has then."""
        key = (layer.rows.stage_key, type(layer), first, id(mask))
        if key not in self._masks:
            keys = layer.key_positions_with(new)
            adapted = decode_mask(mask, keys, layer.columns_with(new), first=first, mask_format=self._mask_format)
            self._masks[key] = mask, adapted
        return self._masks[key][1]


def tables_of(kwargs: Kwargs, hidden: torch.Tensor, width: int) -> PositionTables:
    """Rotary tables and position ids that a decoder gives to a layer with ``hidden`` (B, L, C).

    Without any, those (1, L, ``width``) that turn nothing.
    """
    tables, ids = tables_in(kwargs.get("position_embeddings")), kwargs.get("position_ids")
    if tables is None:
        tables = no_rotation(hidden, width)
    # Of the three of M-RoPE layers use what the tables are made of, and nothing else.
    return PositionTables(*tables, ids if ids is None or ids.ndim == 2 else None)
