"""LLaVA-1.5: CLIP features projected into a Llama, Mistral or Qwen2 decoder."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any, ClassVar

from .base import ModelAdapter

__all__ = ["Llava"]


class Llava(ModelAdapter):
    """``LlavaForConditionalGeneration``: every image is one square grid of patches."""

    model_types = ("llava",)
    text_model_types: ClassVar[tuple[str, ...]] = ("llama", "mistral", "qwen2")

    def image_grids(self, inputs: Mapping[str, Any]) -> list[list[tuple[int, int]]]:
        """See ``ModelAdapter``. Images that follow one another without text between them form one run."""
        side = isqrt(self.config.image_seq_length)
        return [[(side, side)] * sum(n // side**2 for _, n in runs) for runs in self.visual_runs(inputs)]
