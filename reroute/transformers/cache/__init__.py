"""Caches whose layers hold different lengths."""

from __future__ import annotations

from .access import allow_update, cache_of, check_cache, guard, past_length, route_layer, routed_layer, stored_length
from .layers import GuardedLayer, RoutedLayer

__all__ = [
    "GuardedLayer",
    "RoutedLayer",
    "allow_update",
    "cache_of",
    "check_cache",
    "guard",
    "past_length",
    "route_layer",
    "routed_layer",
    "stored_length",
]
