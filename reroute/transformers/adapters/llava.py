"""LLaVA-1.5, with a CLIP tower or Pixtral's: the tower that rankers may look at, and which patch each token shows."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from ..vision import ClipTower, Tower
from . import places
from .base import ModelAdapter
from .patches import Grid, grids_of_patches

__all__ = ["Llava"]


class Llava(ModelAdapter):
    """``LlavaForConditionalGeneration``: every patch of an image is one visual token."""

    model_types = ("llava",)

    @cached_property
    def tower(self) -> Tower:
        """See ``ModelAdapter``."""
        projector = places.child(self.base, "multi_modal_projector")
        return ClipTower(places.child(self.base, "vision_tower"), projector, self.config)

    def image_grids(self, inputs: Mapping[str, Any]) -> list[list[Grid]]:
        """See ``ModelAdapter``."""
        return grids_of_patches(self.visual_runs(inputs), self.config.vision_config, inputs)
