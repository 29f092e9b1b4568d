"""Keys and values of a prefill in a graph: stored where they are found after a replay, and taken to a user's cache."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any, TypeVar

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ...graphs import Alignment
from ..cache import fill_layers, is_static

__all__ = ["EmptyCaches", "StageCache"]

T = TypeVar("T")
_Form = tuple[tuple[int, ...], torch.dtype]
"""Shape (B, G, S, D) and dtype of keys or values."""


class _StageLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer of a cache that is empty for whoever asks, and that copies what it is given to ``buffers``."""

    forms: tuple[_Form, ...] = ()
    buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def get_seq_length(self) -> int:
        """0: a graph begins with an empty cache."""
        return 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy them, if there is a place for them already, and return them as they are."""
        self.forms = tuple((tuple(states.shape), states.dtype) for states in (key_states, value_states))
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
    """A cache of ``layer_counts`` layers of each stage, dense ones first.

    States that are alike lie together, (m, B, G, S, D): keys and values of all layers of a stage, in most decoders.
    """

    def __init__(self, layer_counts: Sequence[int]) -> None:
        """Without buffers: the first prefill shows what they have to hold."""
        self._stages = [[_StageLayer() for _ in range(count)] for count in layer_counts]  # type: ignore[no-untyped-call]
        self._buffers: Sequence[torch.Tensor] = ()
        self._places: list[list[list[int]]] = []

    @property
    def cache(self) -> Cache:
        """What a decoder is called with."""
        cache = DynamicCache()
        cache.layers = [layer for stage in self._stages for layer in stage]
        return cache

    @property
    def is_known(self) -> bool:
        """Whether a prefill has shown it."""
        return all(layer.forms for stage in self._stages for layer in stage)

    @property
    def layout(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Of the buffers, stage after stage."""
        alike = (its for stage in self._stages for its in _alike(stage).items())
        return [((len(places), *shape), dtype) for (shape, dtype), places in alike]

    def store_in(self, buffers: Sequence[torch.Tensor]) -> None:
        """Store in ``buffers`` from now on, which are of ``layout``."""
        self._buffers, rest = buffers, iter(buffers)
        self._places = [list(_alike(stage).values()) for stage in self._stages] if buffers else []
        for stage, alike in zip(self._stages, self._places, strict=bool(buffers)):
            places = [place for its in alike for place in zip(its, next(rest), strict=True)]
            states = [buffer for _, buffer in sorted(places, key=itemgetter(0))]
            for layer, keys, values in zip(stage, states[::2], states[1::2], strict=True):
                layer.buffers = keys, values

    def copy_to(self, cache: Cache, alignment: Alignment) -> None:
        """Fill the empty layers of ``cache`` with copies."""
        first, rest = 0, iter(self._buffers)
        taken = alignment.to_copy if is_static(cache) else alignment.states  # static layers copy what they are given
        for index, alike in enumerate(self._places, start=-1):
            states: dict[int, torch.Tensor] = {}
            for its in alike:
                states.update(zip(its, taken(index, next(rest)).unbind(), strict=True))
            if states:
                fill_layers(cache, first, [states[place] for place in range(len(states))], alignment.lacks(index))
                first += len(states) // 2


def _alike(stage: Sequence[_StageLayer]) -> dict[_Form, list[int]]:
    """By form, which of the keys and values of ``stage`` have it; they are numbered k, v, k, v, …"""
    places: dict[_Form, list[int]] = {}
    for place, form in enumerate(form for layer in stage for form in layer.forms):
        places.setdefault(form, []).append(place)
    return places
