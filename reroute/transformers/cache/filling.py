"""Layers of a cache that are filled with keys and values that were made elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
)

from .access import give_room
from .static import VacantLayer, room_for

__all__ = ["can_fill", "fill_layers"]


def can_fill(cache: Any, hidden: torch.Tensor) -> bool:
    """Whether ``fill_layers`` can fill an empty ``cache`` with what layers make of ``hidden`` (B, L, C).

    Of static layers the host does not see that they are empty: who asks knows the length of the cache.
    """
    if getattr(cache, "offloading", False) or type(cache) not in (DynamicCache, StaticCache):
        return False
    if type(cache) is StaticCache:
        return all(_may_take(layer, hidden) for layer in cache.layers)
    later = cache.layer_class_to_replicate
    return later in (None, DynamicLayer) and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) and not layer.get_seq_length()
        for layer in cache.layers
    )


def _may_take(layer: Any, hidden: torch.Tensor) -> bool:
    if type(layer) not in (StaticLayer, VacantLayer):
        return False
    keys: torch.Tensor | None = layer.keys
    if keys is None:
        return True
    is_alike = (len(keys), keys.dtype, keys.device) == (len(hidden), hidden.dtype, hidden.device)
    return is_alike and not keys.is_inference()


def fill_layers(cache: Cache, first: int, keys_and_values: Sequence[torch.Tensor], lacks: int) -> None:
    """Let layers of ``cache`` from ``first`` on, which are empty, hold k, v, k, v, … (B, G, T, D).

    Dynamic ones hold these tensors themselves, or the last rows of them that a window needs, where ``update`` would
    copy them behind what is there. Static ones hold copies, and get room for as many rows as they lack, ``lacks``, less
    than for tokens.
    """
    layers: Any = cache.layers
    count = len(keys_and_values) // 2
    while len(layers) < first + count:
        layers.append(DynamicLayer())  # type: ignore[no-untyped-call]
    filled = layers[first : first + count]
    if isinstance(filled[0], StaticLayer):
        _copy(cache, first, filled, keys_and_values, lacks)
        return
    for layer, keys, values in zip(filled, keys_and_values[::2], keys_and_values[1::2], strict=True):
        if isinstance(layer, DynamicSlidingWindowLayer):
            _fill_window(layer, keys, values)
            continue
        layer.keys, layer.values, layer.is_initialized = keys, values, True
        layer.dtype, layer.device = keys.dtype, keys.device


def _fill_window(layer: DynamicSlidingWindowLayer, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Let ``layer`` keep what the next token sees, or all while it records what it may have to give back."""
    layer.lazy_initialization(keys, values)
    layer.cumulative_length = keys.shape[-2]
    first = 0 if layer.record_past else 1 - layer.sliding_window
    layer.keys, layer.values = keys[..., first:, :], values[..., first:, :]


def _copy(cache: Cache, first: int, layers: Sequence[Any], keys_and_values: Sequence[torch.Tensor], lacks: int) -> None:
    places: list[torch.Tensor] = []
    count = keys_and_values[0].shape[-2]
    for index, layer in enumerate(layers, start=first):
        if not layer.is_initialized:
            if layer.cumulative_length.is_inference():  # it could not be written outside of inference mode
                layer.cumulative_length = layer.cumulative_length.clone()
            usual = give_room(cache, index, room_for(layer, lacks))
            layer.lazy_initialization(*keys_and_values[2 * (index - first) :][:2])
            give_room(cache, index, usual)
        places += [layer.keys[..., :count, :], layer.values[..., :count, :]]
    torch._foreach_copy_(places, list(keys_and_values))
    torch._foreach_add_([layer.cumulative_length for layer in layers], count)  # from zero: they are empty
