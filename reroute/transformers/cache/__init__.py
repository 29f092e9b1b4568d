"""Caches whose layers hold different lengths."""

from __future__ import annotations

from .access import (
    cache_of,
    check_cache,
    check_whole,
    guard,
    guarded_layer,
    is_renumbered,
    is_routed,
    is_torn,
    past_length,
    route_layer,
    stored_rows,
    tear,
)
from .layers import GuardedLayer, RoutedLayer, RowPositions

__all__ = [
    "GuardedLayer",
    "RoutedLayer",
    "RowPositions",
    "cache_of",
    "check_cache",
    "check_whole",
    "guard",
    "guarded_layer",
    "is_renumbered",
    "is_routed",
    "is_torn",
    "past_length",
    "route_layer",
    "stored_rows",
    "tear",
]
