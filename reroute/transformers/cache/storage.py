"""The kinds of cache layers in which routing can store, and how much each of them holds."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from transformers import cache_utils
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    QuantizedLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from ...core.layer_names import REFERENCE

__all__ = [
    "can_crop",
    "can_store",
    "columns_of",
    "empty_like",
    "held_bytes",
    "is_quantized",
    "keeps_prompt",
    "most_columns",
    "plain_class",
    "prompt_rows",
    "rows_in",
    "visible_columns",
]

Quantized: type[Any] = getattr(cache_utils, "BaseQuantizedLayer", QuantizedLayer)
"""Base of all that quantise: since Transformers 5.24 there are some without a residual in full precision."""

OF_ROUTING = ("rows", "earlier", "floor", "may_update")
"""Attributes that layers have only while routing knows of them."""


def plain_class(layer: Any) -> type[Any]:
    """The class that ``layer`` had before it was guarded."""
    return getattr(layer, "plain", type(layer))


def can_store(plain: type[Any], *, slides: bool) -> bool:
    """Whether a layer of class ``plain`` may lack rows, as that of a decoder layer that ``slides`` or does not."""
    if plain in (DynamicSlidingWindowLayer, StaticSlidingWindowLayer) or keeps_prompt(plain):
        return slides
    return plain in (DynamicLayer, StaticLayer) or issubclass(plain, Quantized)


def keeps_prompt(plain: type[Any]) -> bool:
    """Whether layers of class ``plain`` keep all of the first prompt, and a window of what comes after it."""
    return issubclass(plain, DynamicSlidingWindowLayer) and plain._layer_type == REFERENCE


def prompt_rows(layer: Any) -> int:
    """How many rows ``layer`` keeps beside those of its window."""
    return rows_in(getattr(layer, "prefill_keys", None))


def rows_in(keys: torch.Tensor | None) -> int:
    """How many rows there are in what a layer keeps, which is None or without dimensions before it is filled."""
    return 0 if keys is None or keys.ndim < 2 else int(keys.shape[-2])


def is_quantized(layer: Any) -> bool:
    """Whether ``layer`` keeps its rows in another form than it returns them."""
    return isinstance(layer, Quantized)


def can_crop(layer: Any) -> bool:
    """Whether ``layer`` can give tokens back: not what it keeps in another form, nor rows that a window dropped."""
    return not is_quantized(layer) and hasattr(plain_class(layer), "crop") and getattr(layer, "is_croppable", True)


def columns_of(layer: Any, length: int) -> int:
    """How many rows were ever stored in ``layer`` of a cache of logical ``length``. Never waits for the device.

    A sliding one has dropped those that no window shows any more; a static one counts on the device, so that what it
    holds is told by what it will hold once it is full.
    """
    if plain_class(layer) is DynamicLayer:  # of most models; each layer asks several times
        return rows_in(layer.keys)
    if isinstance(layer, StaticSlidingWindowLayer):
        return int(layer.cumulative_length_int)  # of the host, unlike that of other static ones
    if isinstance(layer, StaticLayer):
        if not layer.is_initialized:
            return 0
        rows = getattr(layer, "rows", None)
        return length if rows is None else int(rows.key_positions.shape[1]) - (rows.logical - length)
    if isinstance(layer, DynamicSlidingWindowLayer) or is_quantized(layer):
        return int(layer.cumulative_length) + prompt_rows(layer)
    return rows_in(layer.keys)


def most_columns(layer: Any) -> int | None:
    """How many rows ``layer`` keeps of those that were stored, if it keeps a window; else None."""
    if isinstance(layer, StaticSlidingWindowLayer):
        return int(layer.max_cache_len if layer.keys is None else layer.keys.shape[-2])
    return layer.sliding_window - 1 + prompt_rows(layer) if isinstance(layer, DynamicSlidingWindowLayer) else None


def visible_columns(layer: Any, length: int) -> int:
    """How many of its rows ``layer`` gives to the next tokens, apart from the room that a static one has left."""
    if plain_class(layer) is DynamicLayer:
        return rows_in(layer.keys)
    columns, most = columns_of(layer, length), most_columns(layer)
    if most is None or columns < most:
        return columns
    if isinstance(layer, StaticSlidingWindowLayer):
        return most - 1  # the oldest one is no longer in any window
    prompt = prompt_rows(layer)
    return min(most - prompt, rows_in(layer.keys)) + prompt  # those that are only recorded do not count


def held_bytes(layer: Any) -> int:
    """Bytes of keys and values, in whatever form; all that is allocated for them."""
    names = ("keys", "values", "prefill_keys", "prefill_values", "_quantized_keys", "_quantized_values")
    leaves = tree_leaves([getattr(layer, name, None) for name in names])
    return sum(_nbytes(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor))


def _nbytes(tensor: Any) -> int:
    """Of a tensor, or of those inside of a wrapper."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return int(tensor.nbytes)
    return sum(_nbytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


def empty_like(layer: Any) -> Any:
    """An ordinary layer with nothing in it, of the kind and the room that ``layer`` was of."""
    if isinstance(layer, StaticSlidingWindowLayer):
        window = StaticSlidingWindowLayer(max_cache_len=layer.max_cache_len, sliding_window=layer.max_cache_len)
        window.__dict__.update({name: its for name, its in vars(layer).items() if name == "_is_croppable"})
        return window
    if isinstance(layer, StaticLayer):
        return StaticLayer(max_cache_len=layer.max_cache_len)
    if isinstance(layer, DynamicSlidingWindowLayer):
        sliding = plain_class(layer)(layer.sliding_window)
        sliding.record_past = layer.record_past
        return sliding
    if not is_quantized(layer):
        return DynamicLayer()  # type: ignore[no-untyped-call]
    empty: Any = object.__new__(plain_class(layer))
    vars(empty).update({name: value for name, value in vars(layer).items() if name not in OF_ROUTING})
    CacheLayerMixin.__init__(empty)  # type: ignore[no-untyped-call]
    empty.cumulative_length = 0
    empty._quantized_keys = empty._quantized_values = empty._pending_beam_idx = None
    return empty
