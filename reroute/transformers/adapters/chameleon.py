"""Chameleon: the model without its head is the decoder, and makes hidden states of pictures itself."""

from __future__ import annotations

from typing import ClassVar

from .base import ModelAdapter

__all__ = ["Chameleon"]


class Chameleon(ModelAdapter):
    """``ChameleonForConditionalGeneration``: pictures are embedded before the first layer."""

    model_types = ("chameleon",)
    merges: ClassVar[frozenset[str]] = frozenset({"pixel_values", "mm_encoder_outputs"})
