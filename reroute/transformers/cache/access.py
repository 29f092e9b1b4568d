"""What routing asks of a cache, and makes of its layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ...errors import UnsupportedCacheError
from .layers import GuardedLayer, RoutedLayer

__all__ = [
    "allow_update",
    "cache_of",
    "check_cache",
    "guard",
    "past_length",
    "route_layer",
    "routed_layer",
    "stored_length",
]


def cache_of(kwargs: Mapping[str, Any]) -> Cache | None:
    """The cache among keyword arguments: ``cache`` since Transformers 5.24, ``past_key_values`` before."""
    cache: Cache | None = kwargs.get("cache")
    return kwargs.get("past_key_values") if cache is None else cache


def past_length(cache: Cache | None) -> int:
    """Logical length of ``cache``."""
    return 0 if cache is None else int(cache.get_seq_length())


def check_cache(cache: Cache, layers: Iterable[int]) -> None:
    """Refuse a cache that cannot hold a different length in each of ``layers``.

    Raises:
        UnsupportedCacheError: static, sliding, quantised and paged caches; says what to use.
    """
    if isinstance(cache, DynamicCache):
        present = [cache.layers[i] for i in layers if i < len(cache.layers)]
        wrong = {type(layer).__name__ for layer in present} - {"DynamicLayer", "GuardedLayer", "RoutedLayer"}
        later = cache.layer_class_to_replicate
        if later not in (None, DynamicLayer):
            wrong.add(later.__name__)
        if not wrong:
            return
        what = ", ".join(sorted(wrong))
    else:
        what = type(cache).__name__
    raise UnsupportedCacheError(
        f"Routing needs cache layers that may differ in length; {what} cannot. Use a DynamicCache of full-attention "
        "layers (what generate() makes by default), or disable routing for this call."
    )


def routed_layer(cache: Cache | None, index: int) -> RoutedLayer | None:
    """Layer ``index`` of ``cache`` if it lacks rows, else None."""
    if cache is None or index >= len(cache.layers):
        return None
    layer = cache.layers[index]
    return layer if isinstance(layer, RoutedLayer) else None


def stored_length(cache: Cache, index: int) -> int:
    """Rows that layer ``index`` of ``cache`` holds, of which a layer without any may be missing."""
    layer: Any = cache.layers[index] if index < len(cache.layers) else None
    return 0 if layer is None or layer.keys is None else int(layer.keys.shape[-2])


def allow_update(cache: Cache | None, index: int) -> None:
    """Let layer ``index`` store the tokens of the forward that now runs, to which routing adapts it."""
    if cache is not None and index < len(cache.layers) and isinstance(layer := cache.layers[index], GuardedLayer):
        layer.allow_update()


def guard(cache: Cache, logical: int) -> None:
    """Make the layers of a routed ``cache`` that hold everything refuse what the others must, before any changes.

    ``logical``: see ``GuardedLayer``.
    """
    layer: Any
    for layer in cache.layers:
        if type(layer) in (DynamicLayer, GuardedLayer) and layer.keys is not None:
            layer.__class__, layer.logical = GuardedLayer, logical


def route_layer(
    cache: Cache,
    index: int,
    key_positions: torch.Tensor,
    logical: int,
    has_fillers: bool,
    position_offset: torch.Tensor | None,
    stage_key: tuple[int, ...],
) -> None:
    """Mark layer ``index`` as holding just ``key_positions`` (B, T) of a logical sequence; see ``RoutedLayer``."""
    layer: Any = cache.layers[index]
    layer.__class__ = RoutedLayer
    layer.key_positions, layer.logical, layer.has_fillers = key_positions, logical, has_fillers
    layer.position_offset, layer.stage_key = position_offset, stage_key
