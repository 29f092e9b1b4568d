"""Features that a decoder adds between its layers, in a graph: states of all rows, -0.0 where a row has none."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..adapters import Features

__all__ = ["AddedStates"]


class AddedStates:
    """What is added before each of ``layers``, one level after the other; an input of the graph.

    The decoder would pick marked rows, whose number is baked in. To add -0.0 to the others changes no bit of them; 0.0
    would make 0.0 of -0.0.
    """

    def __init__(self, layers: Sequence[int]) -> None:
        """Without memory; of no layers if nothing is added."""
        self._layers = layers
        self._states: Sequence[torch.Tensor] = ()

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Of the memory, where hidden states have ``shape`` (B, L, C)."""
        return [(shape, dtype) for _ in self._layers]

    def place_in(self, states: Sequence[torch.Tensor]) -> None:
        """Lie in ``states`` from now on, which are of ``layout``."""
        self._states = states

    def fill(self, features: Features | None, sources: torch.Tensor) -> None:
        """Take in ``features``, if there are levels. ``sources`` (B * L): flat index in the caller's tensors."""
        if features is None or not self._layers:
            return
        marked = features.mask.flatten()
        ordinals = marked.cumsum(0).sub_(1).clamp_(min=0).index_select(0, sources)
        unmarked = marked.index_select(0, sources).logical_not_()[:, None]
        for states, level in zip(self._states, features.levels, strict=True):
            flat = states.flatten(0, 1)
            torch.index_select(level.to(flat.dtype), 0, ordinals, out=flat)
            flat.masked_fill_(unmarked, -0.0)

    def add(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """The input of ``layer`` instead of ``hidden`` (B, L, C)."""
        for place, states in zip(self._layers, self._states, strict=True):
            if place == layer:
                hidden = hidden + states
        return hidden
