"""Prefills that replay a captured graph of the decoder."""

from .replays import Replays

__all__ = ["Replays"]
