"""Static layers that lack rows: how much room they are given, and what they keep when they are emptied.

Compiled steps are compiled for shapes, and their graphs are recorded at addresses. So there are few sizes of room, and
memory stays with its layer.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from .storage import empty_like

__all__ = ["Room", "VacantLayer", "room_for", "vacated", "with_room"]

SHARES = 8
"""Sizes of room are multiples of this part of a cache, so that prompts of all lengths have few of them."""
ALIGNMENT = 8
"""And of this many rows: attention reads masks of aligned rows where they lie."""


class VacantLayer(StaticLayer):  # type: ignore[no-untyped-call]
    """An empty static layer that takes its memory of before again, if it is given as much room.

    ``memory``: keys and values (B, G, S, D) and their count ().
    """

    plain: ClassVar[type[Any]] = StaticLayer
    memory: tuple[torch.Tensor, torch.Tensor, torch.Tensor]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Become an ordinary layer, with that memory or new one."""
        keys, values, count = vars(self).pop("memory")
        layer: Any = self
        layer.__class__, rows = self.plain, layer.max_cache_len
        if not (_may_hold(keys, key_states, rows) and _may_hold(values, value_states, rows)):
            layer.lazy_initialization(key_states, value_states)
            return
        layer.max_cache_len, layer.cumulative_length = 0, count  # allocates nothing, and settles all else
        layer.lazy_initialization(key_states, value_states)
        layer.max_cache_len, layer.keys, layer.values = rows, keys.zero_(), values.zero_()
        count.zero_()


class VacantWindow(VacantLayer, StaticSlidingWindowLayer):  # type: ignore[no-untyped-call]
    """The same of a layer that slides."""

    plain = StaticSlidingWindowLayer


def _may_hold(memory: torch.Tensor, states: torch.Tensor, rows: int) -> bool:
    batch, heads, _, dim = states.shape
    return (
        memory.shape == (batch, heads, rows, dim)
        and (memory.dtype, memory.device) == (states.dtype, states.device)
        and memory.is_inference() <= torch.is_inference_mode_enabled()  # it could not be written outside of it
    )


def vacated(layer: Any) -> Any:
    """An empty layer with the memory of the static ``layer``, if that has allocated any."""
    empty = empty_like(layer)
    if layer.is_initialized:
        empty.__class__ = VacantWindow if isinstance(empty, StaticSlidingWindowLayer) else VacantLayer
        empty.memory = layer.keys, layer.values, layer.cumulative_length
    return empty


def room_for(layer: Any, lacks: int) -> int:
    """How many rows a static ``layer`` that has allocated nothing is to allocate, if it will lack so many rows."""
    longest: int = layer.max_cache_len
    if isinstance(layer, StaticSlidingWindowLayer) and not getattr(layer, "is_croppable", False):
        return longest  # a window that may fill up, for all that is known
    needed = longest - lacks
    had = vars(layer)["memory"][0].shape[-2] if isinstance(layer, VacantLayer) else 0
    if had >= needed:
        return int(had)
    step = -(-longest // (SHARES * ALIGNMENT)) * ALIGNMENT
    return min(longest, -(-needed // step) * step)


class Room(NamedTuple):
    """What a static layer has allocated. Rows that are empty yet are given away too.

    - ``rows``: as many. ``tokens``: how many there may be at most, in all layers.
    - ``is_fixed``: whether a row never moves, so that the places of all later tokens are known.
    """

    rows: int
    tokens: int
    is_fixed: bool


def with_room(stored: torch.Tensor, end: int, room: Room | None) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Logical positions ``stored`` (B, T): those to list, and those of all rows that are given away, as ``room`` says.

    They are the same where places are known; None gives what is stored. ``end`` is the position of the next token.
    Also returns whether there are rows that no token can be for: they are fillers.
    """
    if room is None:
        return stored, stored, False
    last = end + room.rows - stored.shape[1]
    later = torch.arange(end, last, device=stored.device)
    if last > room.tokens:
        later[room.tokens - end :] = -1
    given = torch.cat([stored, later.expand(len(stored), -1)], 1)
    return given if room.is_fixed else stored, given, last > room.tokens
