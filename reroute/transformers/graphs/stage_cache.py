"""Keys and values of a prefill in a graph: stored where they are found after a replay, and taken to a user's cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ...graphs import Alignment
from ..cache import fill_layers, is_static
from .refused import CannotCapture

__all__ = ["EmptyCaches", "StageCache"]

T = TypeVar("T")


class _StageLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer of a cache that is empty for whoever asks, and that copies what it is given to ``buffers``."""

    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def get_seq_length(self) -> int:
        """0: a graph begins with an empty cache."""
        return 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy them, if there is a place for them already, and return them as they are."""
        if key_states.shape != value_states.shape:
            raise CannotCapture("keys and values of a layer differ in shape")
        self.shape, self.dtype = tuple(key_states.shape), key_states.dtype
        if self.buffers is not None:
            for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
                buffer.copy_(states)
        return key_states, value_states


class EmptyCaches:
    """Caches as a decoder makes them; Transformers takes half a millisecond to read its configuration for 32 layers."""

    def __init__(self, config: Any) -> None:
        """Of the decoder with ``config``."""
        self._first = DynamicCache(config=config)

    def make(self) -> DynamicCache:
        """A new one."""
        cache = _copied(self._first)
        cache.layers = list(map(_copied, self._first.layers))
        return cache


def _copied(one: T) -> T:
    """With the same attributes; of what is empty, none is changed in place."""
    other: T = object.__new__(type(one))
    other.__dict__.update(one.__dict__)
    return other


class StageCache:
    """A cache of ``layer_counts`` layers of each stage, dense ones first, with a buffer (2 n, B, G, S, D) per stage."""

    def __init__(self, layer_counts: Sequence[int]) -> None:
        """Without buffers: the first prefill shows what they have to hold."""
        self._layers = [[_StageLayer() for _ in range(count)] for count in layer_counts]  # type: ignore[no-untyped-call]
        self._buffers: Sequence[torch.Tensor] = ()

    @property
    def cache(self) -> Cache:
        """What a decoder is called with."""
        cache = DynamicCache()
        cache.layers = [layer for stage in self._layers for layer in stage]
        return cache

    @property
    def is_known(self) -> bool:
        """Whether a prefill has shown it."""
        return all(layer.shape for stage in self._layers for layer in stage)

    @property
    def layout(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Of the buffers, one for each stage that has layers.

        Raises:
            CannotCapture: layers of one stage differ.
        """
        layout = []
        for stage in filter(None, self._layers):
            kinds = {(layer.shape, layer.dtype) for layer in stage}
            if len(kinds) > 1:
                raise CannotCapture("layers of one stage store keys of different shapes")
            layout.append(((2 * len(stage), *stage[0].shape), stage[0].dtype))
        return layout

    def store_in(self, buffers: Sequence[torch.Tensor]) -> None:
        """Store in ``buffers`` from now on, which are of ``layout``."""
        self._buffers = buffers
        for stage, buffer in zip(filter(None, self._layers), buffers, strict=bool(buffers)):
            for index, layer in enumerate(stage):
                layer.buffers = buffer[2 * index], buffer[2 * index + 1]

    def copy_to(self, cache: Cache, alignment: Alignment) -> None:
        """Fill the empty layers of ``cache`` with copies."""
        first, buffers = 0, iter(self._buffers)
        taken = alignment.to_copy if is_static(cache) else alignment.states  # static layers copy what they are given
        for stage, layers in enumerate(self._layers, start=-1):
            if layers:
                fill_layers(cache, first, taken(stage, next(buffers)).unbind(), alignment.lacks(stage))
                first += len(layers)
