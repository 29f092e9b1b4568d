"""What a decoder layer is made of, up to the modules of its mixer: all that its facts depend on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from operator import is_
from typing import Any

from torch import nn

from ..parallel import is_sharded

__all__ = ["LayerParts"]

_SIMPLE = frozenset((int, float, bool, str, type(None)))
_NO_MATTER = frozenset(("training", "gradient_checkpointing", "layer_idx"))
"""Attributes that change no score, or are looked at elsewhere."""


class LayerParts:
    """The parts of a layer at one moment. ``kind``: one object for layers of the same code, settings and shapes."""

    def __init__(self, layer: nn.Module, mixer: str, kinds: dict[Any, object]) -> None:
        """``mixer``: the name of what attends in it, or keeps a state. ``kinds`` that are known, and then its own."""
        self._parts = (layer, *layer.children(), *getattr(layer, mixer).modules())
        attributes = [vars(part) for part in self._parts]
        weights = [its["_parameters"] for its in attributes]
        self._dicts: list[dict[str, Any]] = [*attributes, *weights, *(its["_modules"] for its in attributes)]
        self._weights = [weight for its in weights for weight in its.values() if weight is not None]
        # Noted before they are looked at: if another thread changes something meanwhile, it shows.
        self._types, self._shapes, self._sizes = list(map(type, self._parts)), self._shapes_now(), self._sizes_now()
        self._values = list(self._values_now())
        self.kind = kinds.setdefault(tuple(map(_about, self._parts)), object())  # in one step, for other threads
        inner = (vars(part) for block in layer.children() for part in block.children())
        self._hooks = [its["_forward_pre_hooks"] for its in (*attributes, *inner)]
        self._is_bare = "_hf_hook" not in attributes[0] and not is_sharded(layer)

    @property
    def still_are(self) -> bool:
        """Whether nothing was changed since. Asked of several layers in each prefill, so all of it runs in C."""
        return (
            list(map(type, self._parts)) == self._types
            and self._sizes_now() == self._sizes
            and all(map(is_, self._values_now(), self._values))
            and self._shapes_now() == self._shapes
        )

    @property
    def are_bare(self) -> bool:
        """Whether nothing is around them now that would run before them, or that brings weights to the layer."""
        return self._is_bare and not any(self._hooks)

    def _sizes_now(self) -> list[int]:
        return list(map(len, self._dicts))

    def _values_now(self) -> Iterator[Any]:
        return chain.from_iterable([list(its.values()) for its in self._dicts])

    def _shapes_now(self) -> list[Any]:
        return [weight.shape for weight in self._weights]


def _about(module: nn.Module) -> Any:
    its = vars(module).copy()  # at once: routing may leave the layer meanwhile, in another thread
    settings = tuple([item for item in its.items() if type(item[1]) in _SIMPLE and item[0] not in _NO_MATTER])
    weights = tuple([weight.shape for weight in its["_parameters"].values() if weight is not None])
    return type(module).forward, settings, weights, tuple(its["_modules"])
