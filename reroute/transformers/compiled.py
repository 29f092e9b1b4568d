"""Decoding steps as one graph: what a routed cache needs of them is a few tensor operations, which Dynamo may trace.

Routing's own bookkeeping is for prefills. A step on a routed cache depends on nothing but the cache, so that compiled
code goes past the entrances, and only layers that lack rows take their columns of the mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .attention import decode_mask, mask_format_of
from .cache import GuardedLayer, GuardedRecurrentLayer, RoutedLayer, cache_of

__all__ = ["adapt_step", "is_step", "num_tokens"]


def num_tokens(kwargs: Mapping[str, Any]) -> int:
    """L of a call with ``kwargs``; 0 if it has no tokens."""
    tokens = kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    return 0 if tokens is None else int(tokens.shape[1])


def is_step(kwargs: Mapping[str, Any]) -> bool:
    """Whether a call with ``kwargs`` is one token on a routed cache, of which no more is needed than its masks.

    Not if positions were counted anew, later turns may choose again, or layers keep a state: then there is more to
    keep.
    """
    cache = cache_of(kwargs)
    if cache is None or num_tokens(kwargs) != 1:
        return False
    is_routed = False
    for layer in cache.layers:
        if isinstance(layer, GuardedRecurrentLayer):
            return False
        if isinstance(layer, RoutedLayer):
            is_routed = True
            if layer.rows.position_offset is not None or layer.earlier is not None:
                return False
    return is_routed


def adapt_step(index: int, text_config: Any, kwargs: dict[str, Any]) -> None:
    """Let decoder layer ``index`` store one token, and give it its columns of the mask if it lacks rows, in place."""
    cache = cache_of(kwargs)
    layer = None if cache is None or index >= len(cache.layers) else cache.layers[index]
    if not isinstance(layer, GuardedLayer):
        return
    layer.allow_update()
    mask = kwargs.get("attention_mask")
    if isinstance(layer, RoutedLayer) and (mask is not None or layer.rows.has_fillers or layer.first_visible):
        keys, kind = layer.key_positions_with(1), mask_format_of(text_config)
        kwargs["attention_mask"] = decode_mask(
            mask, keys, layer.columns_with(1), first=layer.first_visible, mask_format=kind
        )
