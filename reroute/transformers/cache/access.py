"""What routing asks of a cache, and makes of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import cache_utils
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    QuantizedCache,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from ...errors import UnsupportedCacheError
from ...stats import LayerRows
from .layers import HALF_FILLED, GuardedLayer, RoutedLayer, RowPositions, TornLayer, turn_into
from .recurrent import GuardedRecurrentLayer, has_state
from .states import KeptStates
from .static import Room, room_for
from .storage import (
    can_store,
    columns_of,
    empty_like,
    held_bytes,
    is_quantized,
    keeps_prompt,
    most_columns,
    plain_class,
    prompt_rows,
    rows_in,
    visible_columns,
)

__all__ = [
    "allow_updates",
    "cache_of",
    "check_cache",
    "check_whole",
    "cut",
    "give_room",
    "guard",
    "guarded_layer",
    "has_quantized",
    "has_stored",
    "has_windows",
    "is_renumbered",
    "is_routed",
    "is_static",
    "is_torn",
    "keep_states",
    "keeps_whole_prompt",
    "layer_rows",
    "length_of",
    "past_length",
    "room_of",
    "route_layer",
    "routed_layers",
    "states_of",
    "takes_any_step",
    "tear",
    "visible_rows",
]

RECURRENT = (LinearAttentionLayer, GuardedRecurrentLayer)
"""Kinds of layers that keep a state instead of rows: plain, guarded."""
NOTHING: type[Any] = getattr(cache_utils, "DummyLayer", type(None))
"""The kind of layers that keep nothing, of releases that have it."""


def cache_of(kwargs: Mapping[str, Any]) -> Cache | None:
    """The cache among keyword arguments: ``cache`` since Transformers 5.24, ``past_key_values`` before."""
    cache: Cache | None = kwargs.get("cache")
    return kwargs.get("past_key_values") if cache is None else cache


def past_length(cache: Cache | None) -> int:
    """Logical length of ``cache``. Waits for the device if that is static."""
    return 0 if cache is None else int(cache.get_seq_length())


def check_cache(
    cache: Cache, layers: Iterable[int], slides: Callable[[int], bool], is_recurrent: Callable[[int], bool]
) -> None:
    """Refuse a cache that cannot hold a different length in each of ``layers``, which keep something.

    Some of them may keep a window, and others a state.

    Raises:
        UnsupportedCacheError: paged caches, and windows of other layers; says what to use.
    """
    if isinstance(cache, DynamicCache | StaticCache | QuantizedCache):
        wrong = {
            _name(cache.layers[i])
            for i in layers
            if i < len(cache.layers) and not _fits(cache.layers[i], slides(i), is_recurrent(i))
        }
        later = cache.layer_class_to_replicate
        if later not in (None, DynamicLayer):
            wrong.add(later.__name__)
        if not wrong:
            return
        what = ", ".join(sorted(wrong))
    else:
        what = type(cache).__name__
    raise UnsupportedCacheError(
        f"Routing needs cache layers that may differ in length; {what} cannot. Use a cache of the model's "
        "configuration that is dynamic (what generate() makes by default), static or quantised, or disable routing "
        "for this call."
    )


def _fits(layer: Any, slides: bool, is_recurrent: bool) -> bool:
    """Whether ``layer`` may be that of a decoder layer which slides, or keeps a state, or neither."""
    if is_recurrent:
        return type(layer) in RECURRENT
    return not isinstance(layer, TornLayer) and can_store(plain_class(layer), slides=slides)


def _name(layer: Any) -> str:
    return TornLayer.__name__ if isinstance(layer, TornLayer) else plain_class(layer).__name__


def check_whole(cache: Cache, num_layers: int) -> None:
    """Refuse a routed cache whose layers do not agree on how long the sequence is. Static ones are not asked.

    Raises:
        UnsupportedCacheError: a forward was cut short after some layers had stored its tokens.
    """
    # There may be more, empty ones: by a configuration that lists kinds of layers which are no longer there.
    layers = _with_rows(cache.layers[:num_layers])
    agree = len(cache.layers) >= num_layers and _agree(layers[0].get_seq_length(), layers[-1].get_seq_length())
    if not agree or is_torn(cache):
        raise UnsupportedCacheError(HALF_FILLED)


def _with_rows(layers: Iterable[Any]) -> Sequence[Any]:
    return [layer for layer in layers if type(layer) not in (*RECURRENT, NOTHING)]


def _agree(first: Any, last: Any) -> bool:
    """Whether two lengths are the same, of which those on a device are not waited for."""
    return isinstance(first, torch.Tensor) or isinstance(last, torch.Tensor) or first == last


def _has(cache: Cache | None, *kinds: type[Any]) -> bool:
    """Whether ``cache`` has a layer of ``kinds``. Each decoding step asks, and ``isinstance`` of an ABC takes time."""
    return any(kind in its.__mro__ for its in set(map(type, getattr(cache, "layers", ()))) for kind in kinds)


def is_routed(cache: Cache | None) -> bool:
    """Whether some layer of ``cache`` lacks rows, or has a state that lacks some: others are guarded then."""
    return _has(cache, GuardedLayer, GuardedRecurrentLayer)


def routed_layers(cache: Cache) -> Iterator[int]:
    """Which layers of ``cache`` lack rows."""
    return (index for index, layer in enumerate(cache.layers) if isinstance(layer, RoutedLayer))


def has_windows(cache: Cache) -> bool:
    """Whether some layer of ``cache`` keeps a window."""
    return _has(cache, DynamicSlidingWindowLayer) or _has(cache, StaticSlidingWindowLayer)


def keeps_whole_prompt(cache: Cache) -> bool:
    """Whether some layer of ``cache`` keeps all of the prompt, and a window of what comes after it."""
    return any(map(keeps_prompt, set(map(plain_class, cache.layers))))


def is_renumbered(cache: Cache | None) -> bool:
    """Whether the positions of some rows of ``cache`` were counted anew."""
    layers = getattr(cache, "layers", ())
    return any(isinstance(layer, RoutedLayer) and layer.rows.position_offset is not None for layer in layers)


def is_static(cache: Cache | None) -> bool:
    """Whether ``cache`` has layers that count on the device."""
    return _has(cache, StaticLayer)


def has_quantized(cache: Cache | None) -> bool:
    """Whether some layer of ``cache`` keeps its rows in another form than it returns them."""
    return any(map(is_quantized, getattr(cache, "layers", ())))


def is_torn(cache: Cache | None) -> bool:
    """Whether a forward has left ``cache`` half filled."""
    return _has(cache, TornLayer)


def length_of(cache: Cache) -> Any:
    """Logical length of ``cache``, to compare it with later; never waits for the device."""
    length: Any = cache.get_seq_length()
    return length.clone() if isinstance(length, torch.Tensor) else length


def tear(cache: Cache, past: Any, *, has_begun: bool) -> None:
    """Let nobody go on with ``cache``, if a forward that failed has changed it; before, its length was ``past``.

    ``has_begun``: whether any layer has run. Of a state it cannot be seen whether it has changed.
    """
    layers = _with_rows(cache.layers)
    may_differ = has_begun and any(type(layer) in RECURRENT for layer in cache.layers)
    if not may_differ and all(bool(layer.get_seq_length() == past) for layer in layers):
        return
    for layer in layers:
        if not isinstance(layer, TornLayer) and _can_store(layer):
            turn_into(layer, TornLayer)


def guarded_layer(cache: Cache | None, index: int) -> GuardedLayer | GuardedRecurrentLayer | None:
    """Layer ``index`` of ``cache`` if it takes tokens only when it is allowed to, else None."""
    if cache is None or index >= len(cache.layers):
        return None
    layer: Any = cache.layers[index]
    kinds = type(layer).__mro__
    return layer if GuardedLayer in kinds or GuardedRecurrentLayer in kinds else None


def allow_updates(cache: Cache, first: int, may: bool) -> None:
    """Let the layers of ``cache`` from ``first`` on store the tokens of the forward that now runs, or not any more."""
    layer: Any
    for layer in cache.layers[first:]:
        if GuardedLayer in type(layer).__mro__:
            layer.may_update = may


def takes_any_step(cache: Cache | None) -> bool:
    """Whether layers of ``cache`` need nothing of tokens that come without a mask: all rows that they have count.

    Not those of static caches, which are not all filled, nor of windows, which show the last ones.
    """
    for layer in getattr(cache, "layers", ()):
        kinds = type(layer).__mro__
        if RoutedLayer in kinds and (layer.rows.has_fillers or layer.rows.position_offset is not None):
            return False
        if DynamicSlidingWindowLayer in kinds or StaticLayer in kinds:
            return False
    return True


def has_stored(cache: Cache, index: int, columns: int) -> bool:
    """Whether layer ``index`` of ``cache`` was ever given so many rows. Static ones only say whether any."""
    if index >= len(cache.layers):
        return False
    layer: Any = cache.layers[index]
    is_static = StaticLayer in plain_class(layer).__mro__  # ``issubclass`` of an ABC takes time
    return bool(layer.is_initialized) if is_static else columns_of(layer, 0) == columns


def visible_rows(cache: Cache | None, index: int, past: int) -> int:
    """How many of its rows layer ``index`` of ``cache``, which is ``past`` tokens long, gives to the next tokens."""
    return 0 if cache is None or index >= len(cache.layers) else visible_columns(cache.layers[index], past)


def room_of(cache: Cache | None, index: int, lacks: int, new: int, end: int) -> Room | None:
    """What layer ``index`` of a static ``cache`` has allocated; None if it gives away just what is stored.

    What it has not allocated yet it is to allocate: it will have ``lacks`` rows less than tokens. ``new`` rows come to
    it, and ``end`` is the logical length then.
    """
    layer: Any = cache.layers[index] if cache is not None and index < len(cache.layers) else None
    if StaticLayer not in type(layer).__mro__:  # ``isinstance`` of an ABC takes time
        return None
    rows = room_for(layer, lacks) if layer.keys is None else int(layer.keys.shape[-2])
    if not isinstance(layer, StaticSlidingWindowLayer):
        return Room(rows, layer.max_cache_len, is_fixed=True)
    return Room(rows, end, is_fixed=False) if columns_of(layer, end) + new <= rows else None


def layer_rows(cache: Cache | None, length: int) -> Callable[[], Sequence[LayerRows | None]]:
    """What the layers of ``cache``, of logical ``length``, hold now; None of one that holds nothing.

    It is worked out when it is asked for, and keeps nothing of the cache alive.
    """
    held = [_rows_of(layer, length) for layer in getattr(cache, "layers", ())]
    return lambda: [LayerRows.of(*its) if isinstance(its, tuple) else its for its in held]


def _rows_of(layer: Any, length: int) -> LayerRows | tuple[torch.Size, torch.Size, torch.dtype] | None:
    """Of a layer that does nothing but grow, the arguments of ``LayerRows.of``."""
    keys = getattr(layer, "keys", None)
    if keys is None:  # or it keeps a state
        return None
    if plain_class(layer) is DynamicLayer and type(keys) is torch.Tensor and getattr(layer, "earlier", None) is None:
        return keys.shape, layer.values.shape, keys.dtype
    rows, nbytes, static = columns_of(layer, length), held_bytes(layer), isinstance(layer, StaticLayer)
    prompt, most = prompt_rows(layer), most_columns(layer)
    if static or most is not None:  # not of more than it has
        rows = min(rows, rows_in(layer.keys) + prompt)
    earlier = getattr(layer, "earlier", None)
    return LayerRows(
        rows=rows,
        most=None if prompt else most,  # the plain model keeps all of that
        room=layer.get_max_length() if static else None,
        nbytes=nbytes,
        row_bytes=nbytes // max(1, rows_in(layer.keys) if static else rows),
        element_size=layer.keys.element_size(),
        state_bytes=0 if earlier is None else earlier.nbytes,
    )


def give_room(cache: Cache, index: int, room: int) -> int:
    """Let layer ``index`` of a static ``cache`` allocate ``room`` rows, if it has not yet; returns what it would."""
    layer: Any = cache.layers[index]
    usual: int = layer.max_cache_len
    layer.max_cache_len = room
    return usual


def _can_store(layer: Any) -> bool:
    return can_store(plain_class(layer), slides=True)


def guard(cache: Cache, floor: int) -> None:
    """Make all layers of a routed ``cache`` refuse what one of them must, before any changes.

    ``floor``: see ``GuardedLayer``.
    """
    layer: Any
    for layer in cache.layers:
        if RoutedLayer in type(layer).__mro__:  # perhaps by an earlier turn with other routing layers
            if layer.rows.floor != floor:
                layer.rows = replace(layer.rows, floor=floor)
        elif TornLayer not in type(layer).__mro__ and _can_store(layer) and layer.keys is not None:
            turn_into(layer, GuardedLayer)
            layer.floor = floor
    _guard_states(cache)


def _guard_states(cache: Cache) -> None:
    layer: Any
    first = next((layer for layer in cache.layers if isinstance(layer, GuardedLayer)), None)
    for layer in cache.layers:
        if layer is first:
            first = None  # states of later layers come behind it
        elif type(layer) in RECURRENT and has_state(layer):
            layer.__class__, layer.first = GuardedRecurrentLayer, first


def route_layer(cache: Cache, index: int, rows: RowPositions) -> None:
    """Mark layer ``index`` as holding just ``rows`` of a logical sequence."""
    layer: Any = cache.layers[index]
    layer.__dict__.pop("floor", None)
    turn_into(layer, RoutedLayer)
    layer.rows = rows
    layer.begin()


def states_of(cache: Cache | None) -> KeptStates | None:
    """What ``cache`` keeps for later turns, if it is of all its tokens: calls without it may have come since."""
    for layer in getattr(cache, "layers", ()):
        kept: KeptStates | None = getattr(layer, "earlier", None)
        if kept is not None:
            return kept if kept.end == past_length(cache) else None
    return None


def keep_states(cache: Cache, kept: KeptStates | None) -> None:
    """Let ``cache`` keep just this for later turns, in its first routed layer; none is where nothing was stored."""
    routed = [layer for layer in cache.layers if isinstance(layer, RoutedLayer)]
    for layer in routed:
        layer.earlier = kept if layer is routed[0] else None


def cut(cache: Cache, first: int, start: int) -> None:
    """Drop all from position ``start`` on of the layers of ``cache`` from ``first`` on; they have all before it."""
    layer: Any
    for layer in cache.layers[first:]:
        layer.prefetch()  # keys and values of an offloaded one
        whole = None if layer.keys is None or not start else (layer.keys[..., :start, :], layer.values[..., :start, :])
        empty = empty_like(layer)
        layer.__class__, layer.__dict__ = type(empty), vars(empty)
        if whole is not None:
            layer.update(*whole)
