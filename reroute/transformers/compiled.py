"""Decoding steps as one graph: what a routed cache needs of them is a few tensor operations, which Dynamo may trace.

Routing's own bookkeeping is for prefills. A step on a routed cache depends on nothing but the cache, so that compiled
code goes past the entrances, and only layers that lack rows take their columns of the mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .attention import decode_mask, mask_format_of
from .cache import GuardedLayer, GuardedRecurrentLayer, RoutedLayer, cache_of

__all__ = ["CompiledStep", "adapt_step", "is_step", "num_tokens"]


def num_tokens(kwargs: Mapping[str, Any]) -> int:
    """L of a call with ``kwargs``; 0 if it has no tokens."""
    tokens = kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    return 0 if tokens is None else int(tokens.shape[1])


def is_step(kwargs: Mapping[str, Any]) -> bool:
    """Whether a call with ``kwargs`` is one token on a routed cache, of which no more is needed than its masks.

    Not if later turns may choose again: then there is more to keep.
    """
    cache = cache_of(kwargs)
    if cache is None or num_tokens(kwargs) != 1:
        return False
    is_routed = False
    for layer in cache.layers:
        if isinstance(layer, RoutedLayer):
            is_routed = True
            if layer.earlier is not None:
                return False
    return is_routed


class CompiledStep:
    """A step while Dynamo traces it: what its decoder hands to its layers, which share the masks of their stage."""

    is_idle = False

    def __init__(self) -> None:
        """No layer has come yet."""
        self._masks: list[tuple[torch.Tensor, int, Any, torch.Tensor]] = []
        self._places: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def mask(self, layer: RoutedLayer, mask: Any, text_config: Any) -> torch.Tensor:
        """The columns of ``mask`` that ``layer`` has with one token more; by identity of what they follow from."""
        rows, first = layer.rows.key_positions, layer.first_visible
        for known_rows, known_first, known_mask, known in self._masks:
            if known_rows is rows and known_first == first and known_mask is mask:
                return known
        keys, kind = layer.key_positions_with(1), mask_format_of(text_config)
        adapted: torch.Tensor = decode_mask(mask, keys, layer.columns_with(1), first=first, mask_format=kind)
        self._masks.append((rows, first, mask, adapted))
        return adapted

    def places(self, offset: torch.Tensor, adapter: Any, hidden: torch.Tensor, ids: torch.Tensor) -> dict[str, Any]:
        """Position ids ``ids`` less ``offset`` (B, 1), and the rotary tables of ``adapter``'s decoder for them."""
        for known_offset, known in self._places:
            if known_offset is offset:
                return known
        anew = ids - offset
        places = {"position_ids": anew, "position_embeddings": adapter.rope_tables(hidden, anew)}
        self._places.append((offset, places))
        return places


def adapt_step(
    index: int, adapter: Any, hidden: torch.Tensor, kwargs: dict[str, Any], step: CompiledStep | None
) -> GuardedRecurrentLayer | None:
    """Let decoder layer ``index`` store one token, and give it its columns of the mask if it lacks rows, in place.

    ``step``: what its decoder has handed to it; None if that is not compiled. Returns the cache's layer if that keeps a
    state, which does not see how often it is asked: who runs the layer forbids it again.
    """
    cache = cache_of(kwargs)
    layer = None if cache is None or index >= len(cache.layers) else cache.layers[index]
    if isinstance(layer, GuardedRecurrentLayer):
        layer.allow_update()
        return layer
    if not isinstance(layer, GuardedLayer):
        return None
    layer.allow_update()
    if not isinstance(layer, RoutedLayer):
        return None
    step = CompiledStep() if step is None else step
    mask, offset = kwargs.get("attention_mask"), layer.rows.position_offset
    if mask is not None or layer.rows.has_fillers or layer.first_visible:
        kwargs["attention_mask"] = step.mask(layer, mask, adapter.text_config)
    if offset is not None:
        kwargs.update(step.places(offset, adapter, hidden, kwargs["position_ids"]))
    return None
