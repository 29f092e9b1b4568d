"""Layers of a cache that are filled with keys and values, or states, that were made elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from .access import NOTHING, give_room
from .recurrent import StatePlace, has_state, states_in
from .static import VacantLayer, room_for

__all__ = ["can_fill", "fill_layers", "fill_states"]


def can_fill(cache: Any, hidden: torch.Tensor, recurrent: Iterable[int] = ()) -> bool:
    """Whether an empty ``cache`` can be filled with what layers make of ``hidden`` (B, L, C), ``recurrent`` ones of
    them states.

    Of static layers the host does not see that they are empty: who asks knows the length of the cache.
    """
    if getattr(cache, "offloading", False) or type(cache) not in (DynamicCache, StaticCache):
        return False
    layers = cache.layers
    if any(index >= len(layers) or type(layers[index]) is not LinearAttentionLayer for index in recurrent):
        return False
    if type(cache) is StaticCache:
        return all(_may_take(layer, hidden) for layer in layers)
    later = cache.layer_class_to_replicate
    return later in (None, DynamicLayer) and all(map(_is_empty, layers))


def _is_empty(layer: Any) -> bool:
    if type(layer) is LinearAttentionLayer:
        return _has_no_state(layer)
    return type(layer) is NOTHING or (
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) and not layer.get_seq_length()
    )


def _may_take(layer: Any, hidden: torch.Tensor) -> bool:
    if type(layer) is LinearAttentionLayer:
        return _has_no_state(layer) and all(_is_like(state, hidden) for state in states_in(layer).values())
    if type(layer) is NOTHING:
        return True
    if type(layer) not in (StaticLayer, StaticSlidingWindowLayer) and not isinstance(layer, VacantLayer):
        return False
    keys: torch.Tensor | None = layer.keys
    return keys is None or (keys.dtype == hidden.dtype and _is_like(keys, hidden))


def _has_no_state(layer: LinearAttentionLayer) -> bool:
    """Whether it has none, and does not record either: then it would keep all rows of a prompt, to give some back."""
    return not has_state(layer) and not layer.record_past


def _is_like(held: torch.Tensor, hidden: torch.Tensor) -> bool:
    """Whether what is made of ``hidden`` can be copied to ``held``."""
    return len(held) == len(hidden) and held.device == hidden.device and not held.is_inference()


def fill_layers(cache: Cache, indices: Sequence[int], keys_and_values: Sequence[torch.Tensor], lacks: int) -> None:
    """Let layers ``indices`` of ``cache``, which are empty, hold k, v, k, v, … (B, G, T, D).

    Dynamic ones hold these tensors themselves, or the last rows of them that a window needs, where ``update`` would
    copy them behind what is there. Static ones hold copies, and get room for as many rows as they lack, ``lacks``, less
    than for tokens.
    """
    layers: Any = cache.layers
    while len(layers) <= indices[-1]:
        layers.append(DynamicLayer())  # type: ignore[no-untyped-call]
    filled = [layers[index] for index in indices]
    if isinstance(filled[0], StaticLayer):
        _copy(cache, indices, filled, keys_and_values, lacks)
        return
    for layer, keys, values in zip(filled, keys_and_values[::2], keys_and_values[1::2], strict=True):
        if type(layer) is DynamicSlidingWindowLayer:
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


def fill_states(cache: Cache, indices: Sequence[int], held: Sequence[Mapping[StatePlace, torch.Tensor]]) -> None:
    """Let layers ``indices`` of ``cache``, which keep states and have none, hold copies of these, each in memory of its
    own: layers write there. What they have allocated stays where it is, if it can be written here.
    """
    targets, states = [], []
    for index, its in zip(indices, held, strict=True):
        layer: Any = cache.layers[index]
        known = states_in(layer)
        for place, state in its.items():
            target = known.get(place)
            if target is None or target.shape != state.shape or target.is_inference():
                target = _allocated(layer, place, state)
            targets.append(target)
            states.append(state)
        layer.has_previous_state = dict.fromkeys(layer.has_previous_state, True)
    torch._foreach_copy_(targets, states)


def _allocated(layer: Any, place: StatePlace, state: torch.Tensor) -> torch.Tensor:
    """Memory for ``state`` in ``layer``, as that allocates it itself."""
    kind, number = place
    target = torch.empty_like(state)
    torch._dynamo.mark_static_address(target)
    getattr(layer, kind)[number] = target
    getattr(layer, f"is_{kind}_initialized")[number] = True
    if kind == "conv_states":
        layer.conv_kernel_size[number] = state.shape[-1]
        layer.dtype, layer.device = state.dtype, state.device
    return target


def _copy(
    cache: Cache, indices: Sequence[int], layers: Sequence[Any], keys_and_values: Sequence[torch.Tensor], lacks: int
) -> None:
    places: list[torch.Tensor] = []
    states: list[torch.Tensor] = []
    counts: list[torch.Tensor] = []
    rows = keys_and_values[0].shape[-2]
    for index, layer, keys, values in zip(indices, layers, keys_and_values[::2], keys_and_values[1::2], strict=True):
        if not layer.is_initialized:
            if layer.cumulative_length.is_inference():  # it could not be written outside of inference mode
                layer.cumulative_length = layer.cumulative_length.clone()
            usual = give_room(cache, index, room_for(layer, lacks))
            layer.lazy_initialization(keys, values)
            give_room(cache, index, usual)
        room = layer.keys.shape[-2]
        places += [layer.keys[..., :rows, :], layer.values[..., :rows, :]]
        is_window = isinstance(layer, StaticSlidingWindowLayer)
        kept = slice(-room if is_window else None, None)
        states += [keys[..., kept, :], values[..., kept, :]]
        if is_window:
            layer.cumulative_length_int = rows
        if not is_window or rows <= room:  # a window that has overflowed counts on the host alone
            counts.append(layer.cumulative_length)
    torch._foreach_copy_(places, states)
    if counts:
        torch._foreach_add_(counts, rows)  # from zero: they are empty
