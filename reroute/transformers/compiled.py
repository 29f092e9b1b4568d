"""Decoding steps as one graph: what a routed cache needs of them is a few tensor operations, which Dynamo may trace.

Routing's own bookkeeping is for prefills. A step on a routed cache depends on nothing but the cache, so that compiled
code goes past the entrances, and only layers that lack rows take their columns of the mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .adapters import ModelAdapter
from .cache import GuardedLayer, GuardedRecurrentLayer, RoutedLayer, cache_of
from .stage_arguments import StageArguments

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
        if isinstance(layer, GuardedLayer | GuardedRecurrentLayer):
            is_routed = True
        if isinstance(layer, RoutedLayer) and layer.earlier is not None:
            return False
    return is_routed


class CompiledStep(StageArguments):
    """A step while Dynamo traces it: what its decoder hands to its layers."""

    is_idle = False


def adapt_step(
    index: int, adapter: ModelAdapter, hidden: torch.Tensor, kwargs: dict[str, Any], step: CompiledStep | None
) -> GuardedRecurrentLayer | None:
    """Let decoder layer ``index`` store one token, and change ``kwargs`` if it lacks rows, in place.

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
    step = CompiledStep(adapter) if step is None else step
    step.adapt(layer, hidden, kwargs)
    return None
