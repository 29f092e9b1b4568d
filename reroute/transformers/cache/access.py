"""What routing asks of a cache, and makes of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ...errors import UnsupportedCacheError
from .layers import (
    HALF_FILLED,
    GuardedLayer,
    GuardedSlidingLayer,
    RoutedLayer,
    RoutedSlidingLayer,
    RowPositions,
    TornLayer,
    columns_of,
    empty_like,
    visible_columns,
)
from .states import KeptStates

__all__ = [
    "cache_of",
    "check_cache",
    "check_whole",
    "cut",
    "fill_layer",
    "guard",
    "guarded_layer",
    "has_windows",
    "is_renumbered",
    "is_routed",
    "is_torn",
    "keep_states",
    "past_length",
    "route_layer",
    "routed_layers",
    "states_of",
    "stored_columns",
    "tear",
    "visible_rows",
]

WHOLE = (DynamicLayer, GuardedLayer, RoutedLayer)
SLIDING = (DynamicSlidingWindowLayer, GuardedSlidingLayer, RoutedSlidingLayer)
"""Kinds of layers that routing can store in: plain, guarded, routed."""


def cache_of(kwargs: Mapping[str, Any]) -> Cache | None:
    """The cache among keyword arguments: ``cache`` since Transformers 5.24, ``past_key_values`` before."""
    cache: Cache | None = kwargs.get("cache")
    return kwargs.get("past_key_values") if cache is None else cache


def past_length(cache: Cache | None) -> int:
    """Logical length of ``cache``."""
    return 0 if cache is None else int(cache.get_seq_length())


def check_cache(cache: Cache, layers: Iterable[int], slides: Callable[[int], bool]) -> None:
    """Refuse a cache that cannot hold a different length in each of ``layers``, of which some may keep a window.

    Raises:
        UnsupportedCacheError: static, quantised and paged caches, and windows of other layers; says what to use.
    """
    if isinstance(cache, DynamicCache):
        present = [(cache.layers[i], WHOLE + SLIDING if slides(i) else WHOLE) for i in layers if i < len(cache.layers)]
        wrong = {_plain_name(layer) for layer, fits in present if type(layer) not in fits}
        later = cache.layer_class_to_replicate
        if later not in (None, DynamicLayer):
            wrong.add(later.__name__)
        if not wrong:
            return
        what = ", ".join(sorted(wrong))
    else:
        what = type(cache).__name__
    raise UnsupportedCacheError(
        f"Routing needs cache layers that may differ in length; {what} cannot. Use a DynamicCache of the model's "
        "configuration (what generate() makes by default), or disable routing for this call."
    )


def _plain_name(layer: Any) -> str:
    """Of the class that ``layer`` had before it was guarded."""
    return DynamicSlidingWindowLayer.__name__ if type(layer) in SLIDING else type(layer).__name__


def check_whole(cache: Cache, num_layers: int) -> None:
    """Refuse a routed cache whose layers do not agree on how long the sequence is.

    Raises:
        UnsupportedCacheError: a forward was cut short after some layers had stored its tokens.
    """
    layers: Sequence[Any] = cache.layers
    # There may be more, empty ones: by a configuration that lists kinds of layers which are no longer there.
    agree = len(layers) >= num_layers and layers[0].get_seq_length() == layers[num_layers - 1].get_seq_length()
    if not agree or is_torn(cache):
        raise UnsupportedCacheError(HALF_FILLED)


def is_routed(cache: Cache | None) -> bool:
    """Whether some layer of ``cache`` lacks rows."""
    return any(isinstance(layer, RoutedLayer) for layer in getattr(cache, "layers", ()))


def routed_layers(cache: Cache) -> list[int]:
    """Which layers of ``cache`` lack rows."""
    return [index for index, layer in enumerate(cache.layers) if isinstance(layer, RoutedLayer)]


def has_windows(cache: Cache) -> bool:
    """Whether some layer of ``cache`` keeps a window."""
    return any(isinstance(layer, DynamicSlidingWindowLayer) for layer in cache.layers)


def is_renumbered(cache: Cache | None) -> bool:
    """Whether the positions of some rows of ``cache`` were counted anew."""
    layers = getattr(cache, "layers", ())
    return any(isinstance(layer, RoutedLayer) and layer.rows.position_offset is not None for layer in layers)


def is_torn(cache: Cache | None) -> bool:
    """Whether a forward has left ``cache`` half filled."""
    return any(isinstance(layer, TornLayer) for layer in getattr(cache, "layers", ()))


def tear(cache: Cache, past: int) -> None:
    """Let nobody go on with ``cache``, if a forward that failed has changed it; before, it had ``past`` tokens."""
    layers: Sequence[Any] = cache.layers
    if all(layer.get_seq_length() == past for layer in layers):
        return
    for layer in layers:
        if type(layer) in WHOLE + SLIDING:
            layer.__class__ = TornLayer


def guarded_layer(cache: Cache | None, index: int) -> GuardedLayer | None:
    """Layer ``index`` of ``cache`` if it takes tokens only when it is allowed to, else None."""
    if cache is None or index >= len(cache.layers):
        return None
    layer = cache.layers[index]
    return layer if isinstance(layer, GuardedLayer) else None


def stored_columns(cache: Cache, index: int) -> int:
    """Rows that were ever stored in layer ``index`` of ``cache``."""
    return columns_of(cache.layers[index]) if index < len(cache.layers) else 0


def visible_rows(cache: Cache | None, index: int) -> int:
    """How many of its rows layer ``index`` of ``cache`` gives to the next tokens."""
    return 0 if cache is None or index >= len(cache.layers) else visible_columns(cache.layers[index])


def guard(cache: Cache, floor: int) -> None:
    """Make all layers of a routed ``cache`` refuse what one of them must, before any changes.

    ``floor``: see ``GuardedLayer``.
    """
    layer: Any
    for layer in cache.layers:
        if isinstance(layer, RoutedLayer):  # perhaps by an earlier turn with other routing layers
            layer.rows = replace(layer.rows, floor=floor)
        if type(layer) in WHOLE[:2] + SLIDING[:2] and layer.keys is not None:
            layer.__class__ = GuardedSlidingLayer if isinstance(layer, DynamicSlidingWindowLayer) else GuardedLayer
            layer.floor = floor


def route_layer(cache: Cache, index: int, rows: RowPositions) -> None:
    """Mark layer ``index`` as holding just ``rows`` of a logical sequence."""
    layer: Any = cache.layers[index]
    layer.__dict__.pop("floor", None)
    layer.__class__ = RoutedSlidingLayer if isinstance(layer, DynamicSlidingWindowLayer) else RoutedLayer
    layer.rows = rows


def fill_layer(cache: Cache, index: int, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Let layer ``index`` of a cache that is empty hold ``keys`` and ``values`` (B, G, T, D) themselves.

    ``update`` would copy them, behind what is there.
    """
    layers: Any = cache.layers
    while len(layers) <= index:
        layers.append(DynamicLayer())  # type: ignore[no-untyped-call]
    layer = layers[index]
    layer.keys, layer.values, layer.is_initialized = keys, values, True
    layer.dtype, layer.device = keys.dtype, keys.device


def states_of(cache: Cache | None) -> KeptStates | None:
    """What ``cache`` keeps for later turns, if it is of all its tokens: calls without it may have come since."""
    layers = getattr(cache, "layers", ())
    kept = next((its for layer in layers if (its := getattr(layer, "earlier", None)) is not None), None)
    return kept if kept is not None and kept.end == past_length(cache) else None


def keep_states(cache: Cache, kept: KeptStates | None) -> None:
    """Let ``cache`` keep just this for later turns, in its first routed layer; none is where nothing was stored."""
    routed = [layer for layer in cache.layers if isinstance(layer, RoutedLayer)]
    for layer in routed:
        layer.earlier = kept if layer is routed[0] else None


def cut(cache: Cache, first: int, start: int) -> None:
    """Drop all from position ``start`` on of the layers of ``cache`` from ``first`` on; they have all before it."""
    layer: Any
    for layer in cache.layers[first:]:
        whole = None if layer.keys is None or not start else (layer.keys[..., :start, :], layer.values[..., :start, :])
        empty = empty_like(layer)
        layer.__class__, layer.__dict__ = type(empty), vars(empty)
        if whole is not None:
            layer.update(*whole)
