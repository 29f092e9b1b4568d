"""Static layers that lack rows: how much room they are given, and what they keep when they are emptied.

Compiled steps are compiled for shapes, and their graphs are recorded at addresses. So there are few sizes of room, and
memory stays with its layer.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from transformers.cache_utils import StaticLayer

from .storage import empty_like

__all__ = ["VacantLayer", "room_for", "vacated", "with_room"]

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
        layer.__class__, rows = StaticLayer, layer.max_cache_len
        if not (_may_hold(keys, key_states, rows) and _may_hold(values, value_states, rows)):
            layer.lazy_initialization(key_states, value_states)
            return
        layer.max_cache_len, layer.cumulative_length = 0, count  # allocates nothing, and settles all else
        layer.lazy_initialization(key_states, value_states)
        layer.max_cache_len, layer.keys, layer.values = rows, keys.zero_(), values.zero_()
        count.zero_()


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
        empty.__class__ = VacantLayer
        empty.memory = layer.keys, layer.values, layer.cumulative_length
    return empty


def room_for(layer: Any, lacks: int) -> int:
    """How many rows a static ``layer`` that has allocated nothing is to allocate, if it will lack so many rows."""
    longest: int = layer.max_cache_len
    needed = longest - lacks
    had = vars(layer)["memory"][0].shape[-2] if isinstance(layer, VacantLayer) else 0
    if had >= needed:
        return int(had)
    step = -(-longest // (SHARES * ALIGNMENT)) * ALIGNMENT
    return min(longest, -(-needed // step) * step)


def with_room(stored: torch.Tensor, end: int, room: tuple[int, int] | None) -> tuple[torch.Tensor, bool]:
    """Logical positions ``stored`` (B, T), and those of all rows that come later, where there is ``room`` for so many.

    ``end`` is the position of the next token. ``room``: rows and tokens; None if there is no limit. Also returns
    whether there is more of it than is ever needed: rows beyond it are listed as fillers.
    """
    if room is None:
        return stored, False
    rows, longest = room
    last = end + rows - stored.shape[1]
    later = torch.arange(end, last, device=stored.device)
    if last > longest:
        later[longest - end :] = -1
    return torch.cat([stored, later.expand(len(stored), -1)], 1), last > longest
