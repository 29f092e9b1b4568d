"""Caches whose layers hold different lengths."""

from __future__ import annotations

from .access import (
    allow_updates,
    cache_of,
    check_cache,
    check_whole,
    cut,
    give_room,
    guard,
    guarded_layer,
    has_quantized,
    has_stored,
    has_windows,
    is_renumbered,
    is_routed,
    is_static,
    is_torn,
    keep_states,
    keeps_whole_prompt,
    layer_rows,
    length_of,
    past_length,
    room_of,
    route_layer,
    routed_layers,
    states_of,
    takes_any_step,
    tear,
    visible_rows,
)
from .filling import can_fill, fill_layers
from .layers import GuardedLayer, RoutedLayer, RowPositions
from .recurrent import GuardedRecurrentLayer
from .reference import RoutedReferenceLayer
from .states import KeptStates
from .static import Room, with_room
from .windows import RoutedSlidingLayer, RoutedStaticSlidingLayer

__all__ = [
    "GuardedLayer",
    "GuardedRecurrentLayer",
    "KeptStates",
    "Room",
    "RoutedLayer",
    "RoutedReferenceLayer",
    "RoutedSlidingLayer",
    "RoutedStaticSlidingLayer",
    "RowPositions",
    "allow_updates",
    "cache_of",
    "can_fill",
    "check_cache",
    "check_whole",
    "cut",
    "fill_layers",
    "give_room",
    "guard",
    "guarded_layer",
    "has_quantized",
    "has_stored",
    "has_windows",
    "is_renumbered",
    "is_routed",
    "is_static",
    "is_torn",
    "keep_states",
    "keeps_whole_prompt",
    "layer_rows",
    "length_of",
    "past_length",
    "room_of",
    "route_layer",
    "routed_layers",
    "states_of",
    "takes_any_step",
    "tear",
    "visible_rows",
    "with_room",
]
