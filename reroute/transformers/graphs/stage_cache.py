"""Keys and values of a prefill in a graph: stored where they are found after a replay, and taken to a user's cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, LinearAttentionLayer

from ...graphs import Alignment
from ..adapters import ModelAdapter
from ..cache import StatePlace, fill_layers, fill_states, is_static, states_in

__all__ = ["EmptyCaches", "StageCache"]

TOGETHER = 8
"""Most layers of a stage whose keys and values are one buffer: they leave a graph in one call, but the memory of their
copies is held until each of them has grown."""
T = TypeVar("T")
_Form = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype: of keys or values (B, G, S, D), or of a state (B, …)."""


class _RowLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer of a cache that is empty for whoever asks, and that copies what it is given to ``buffers``."""

    forms: tuple[_Form, ...] = ()
    buffers: Sequence[torch.Tensor] = ()
    places: Sequence[StatePlace] = ()

    def begin(self) -> None:
        """A run begins: nothing is left of the one before."""

    def end(self) -> None:
        """A run has ended: everything was copied as it came."""

    def get_seq_length(self) -> int:
        """0: a graph begins with an empty cache."""
        return 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy them, if there is a place for them already, and return them as they are."""
        _store(self, (key_states, value_states))
        return key_states, value_states


class _StateLayer(LinearAttentionLayer):
    """A layer that keeps a state: begins each run without one, and copies what it has at the end to ``buffers``."""

    forms: tuple[_Form, ...] = ()
    buffers: Sequence[torch.Tensor] = ()
    places: Sequence[StatePlace] = ()

    def begin(self) -> None:
        """Forget the state of the run before."""
        LinearAttentionLayer.__init__(self, self.number_of_states)

    def end(self) -> None:
        """Copy the state, if there is a place for it already, and let go of it."""
        held = states_in(self)
        self.places = list(held)
        _store(self, list(held.values()))
        self.begin()


def _store(layer: _RowLayer | _StateLayer, states: Sequence[torch.Tensor]) -> None:
    layer.forms = tuple((tuple(its.shape), its.dtype) for its in states)
    for buffer, its in zip(layer.buffers, states, strict=bool(layer.buffers)):
        buffer.copy_(its)


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
    """With the same attributes, and dictionaries of its own; of what is empty, nothing else is changed in place."""
    other: T = object.__new__(type(one))
    other.__dict__.update(one.__dict__)
    if isinstance(other, LinearAttentionLayer):
        other.__dict__.update((name, dict(its)) for name, its in vars(one).items() if type(its) is dict)
    return other


class _Part:
    """Layers whose tensors lie together, one buffer (m, …) of those that are alike."""

    def __init__(self, indices: Sequence[int], layers: Sequence[_RowLayer | _StateLayer]) -> None:
        """``indices`` of ``layers`` in the decoder."""
        self.indices = indices
        self.layers = [layers[index] for index in indices]
        self._places: list[list[int]] = []
        self._buffers: Sequence[torch.Tensor] = ()

    @property
    def layout(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Of the buffers."""
        return [((len(places), *shape), dtype) for (shape, dtype), places in self._alike.items()]

    @property
    def _alike(self) -> dict[_Form, list[int]]:
        """By form, which of the layers' tensors have it; they are numbered k, v, k, v, …"""
        places: dict[_Form, list[int]] = {}
        for place, form in enumerate(form for layer in self.layers for form in layer.forms):
            places.setdefault(form, []).append(place)
        return places

    def store_in(self, buffers: Sequence[torch.Tensor]) -> None:
        """Store in ``buffers`` from now on, which are of ``layout``."""
        self._buffers, self._places = buffers, list(self._alike.values())
        views = iter(self.taken(lambda buffer: buffer))
        for layer in self.layers:
            layer.buffers = [next(views) for _ in layer.forms]

    def taken(self, take: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        """What ``take`` makes of each buffer, split: k, v, k, v, …"""
        found: dict[int, torch.Tensor] = {}
        for places, buffer in zip(self._places, self._buffers, strict=True):
            found.update(zip(places, take(buffer).unbind(), strict=True))
        return [found[place] for place in range(len(found))]


class StageCache:
    """A cache for the layers of each stage, dense ones first.

    States that are alike lie together, (m, B, G, S, D): keys and values of up to ``TOGETHER`` layers of a stage, in
    most decoders; and those of all layers that keep a state, whatever their stage.
    """

    def __init__(self, adapter: ModelAdapter, stages: Sequence[Sequence[int]]) -> None:
        """Without buffers: the first prefill shows what the layers of ``stages`` have to hold."""
        recurrent = adapter.recurrent
        usual: Any = DynamicCache(config=adapter.text_config).layers if recurrent else []
        self._layers: list[_RowLayer | _StateLayer] = [
            _StateLayer(usual[index].number_of_states) if index in recurrent else _RowLayer()  # type: ignore[no-untyped-call]
            for index in range(len(adapter.layers))
        ]
        self._rows: list[tuple[int, _Part]] = []
        for stage, layers in enumerate(stages, start=-1):
            attending = [index for index in adapter.attending if index in layers]
            some = (attending[begin : begin + TOGETHER] for begin in range(0, len(attending), TOGETHER))
            self._rows += [(stage, _Part(indices, self._layers)) for indices in some]
        self._states = _Part(recurrent, self._layers)
        self._parts = [*(part for _, part in self._rows), self._states]

    def begin(self) -> Cache:
        """What a decoder is called with, in a run that begins."""
        cache = DynamicCache()
        cache.layers = list(self._layers)
        for layer in self._layers:
            layer.begin()
        return cache

    def end(self) -> None:
        """The run has ended."""
        for layer in self._layers:
            layer.end()

    @property
    def is_known(self) -> bool:
        """Whether a prefill has shown it."""
        return all(layer.forms for part in self._parts for layer in part.layers)

    @property
    def layout(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Of the buffers, stage after stage."""
        return [buffer for part in self._parts for buffer in part.layout]

    def store_in(self, buffers: Sequence[torch.Tensor]) -> None:
        """Store in ``buffers`` from now on, which are of ``layout``."""
        rest = iter(buffers)
        for part in self._parts if buffers else ():
            part.store_in([next(rest) for _ in part.layout])

    def copy_to(self, cache: Cache, alignment: Alignment) -> None:
        """Fill the empty layers of ``cache`` with copies."""
        take = alignment.to_copy if is_static(cache) else alignment.states  # static layers copy what they are given
        for stage, part in self._rows:
            fill_layers(cache, part.indices, part.taken(partial(take, stage)), alignment.lacks(stage))
        if self._states.layers:
            states = iter(self._states.taken(lambda buffer: buffer))
            held = [{place: next(states) for place in layer.places} for layer in self._states.layers]
            fill_states(cache, self._states.indices, held)
