"""Kosmos-2.5: an argument marks the visual tokens, and the decoder makes hidden states of them itself."""

from __future__ import annotations

from typing import ClassVar

from .base import ModelAdapter

__all__ = ["Kosmos25"]


class Kosmos25(ModelAdapter):
    """``Kosmos2_5ForConditionalGeneration``: positions are in the embeddings."""

    model_types = ("kosmos-2.5",)
    marks = "image_embeds_position_mask"
    merges: ClassVar[frozenset[str]] = frozenset({"image_embeds", "image_embeds_position_mask"})
