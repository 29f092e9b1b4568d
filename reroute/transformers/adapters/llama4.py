"""Llama 4: layers without rotation scale queries by how many rows came before, in steps, for long prompts."""

from __future__ import annotations

import sys

from .base import ModelAdapter

__all__ = ["Llama4"]


class Llama4(ModelAdapter):
    """``Llama4ForConditionalGeneration``: the factor is 1 before the first step, of 8192 rows by default."""

    model_types = ("llama4",)

    def counts_from(self, layer: int) -> int | None:
        """See ``ModelAdapter``."""
        of = self._attention(layer)
        is_scaled = of.attn_temperature_tuning and not of.use_rope
        return int(of.floor_scale) - 1 if is_scaled else sys.maxsize
