"""Prefills that replay a captured graph of the decoder."""

from .decoder_state import DecoderState
from .eligible import why_not_decoder, why_not_prompt
from .replays import Replays

__all__ = ["DecoderState", "Replays", "why_not_decoder", "why_not_prompt"]
