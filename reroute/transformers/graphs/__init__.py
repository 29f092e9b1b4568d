"""Prefills that replay a captured graph of the decoder."""

from .eligible import why_not_prompt
from .replays import Replays

__all__ = ["Replays", "why_not_prompt"]
