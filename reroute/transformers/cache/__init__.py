"""Caches whose layers hold different lengths."""

from __future__ import annotations

from .access import (
    cache_of,
    check_cache,
    check_whole,
    cut,
    fill_layer,
    guard,
    guarded_layer,
    has_windows,
    is_renumbered,
    is_routed,
    is_torn,
    keep_states,
    past_length,
    route_layer,
    routed_layers,
    states_of,
    stored_columns,
    tear,
    visible_rows,
)
from .layers import GuardedLayer, RoutedLayer, RowPositions
from .states import KeptStates

__all__ = [
    "GuardedLayer",
    "KeptStates",
    "RoutedLayer",
    "RowPositions",
    "cache_of",
    "check_cache",
    "check_whole",
    "cut",
    "fill_layer",
    "guard",
    "guarded_layer",
    "has_windows",
    "is_renumbered",
    "is_routed",
    "is_torn",
    "keep_states",
    "past_length",
    "route_layer",
    "routed_layers",
    "states_of",
    "stored_columns",
    "tear",
    "visible_rows",
]
