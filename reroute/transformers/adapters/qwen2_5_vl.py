"""Qwen2.5-VL: images of any size, merged 2 x 2, and three position ids per token (M-RoPE)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from ..vision import Qwen25VLTower, Tower
from . import places
from .base import ModelAdapter

__all__ = ["Qwen25VL"]


class Qwen25VL(ModelAdapter):
    """``Qwen2_5_VLForConditionalGeneration``."""

    model_types = ("qwen2_5_vl",)

    @cached_property
    def tower(self) -> Tower:
        """See ``ModelAdapter``."""
        module = places.child(self.base, "visual")
        return Qwen25VLTower(module, places.child(module, "merger"), self.config)

    def image_grids(self, inputs: Mapping[str, Any]) -> list[list[tuple[int, int]]]:
        """See ``ModelAdapter``. A video counts as its frames, one grid each."""
        merge = self.config.vision_config.spatial_merge_size
        names = {self.config.image_token_id: "image_grid_thw", self.config.video_token_id: "video_grid_thw"}
        grids = {token: iter(inputs[name].tolist()) for token, name in names.items() if inputs.get(name) is not None}
        out = []
        for runs in self.visual_runs(inputs):
            sample: list[tuple[int, int]] = []
            for token, length in runs:
                covered = 0
                while covered < length:
                    frames, rows, columns = next(grids[token])
                    sample += [(rows // merge, columns // merge)] * frames
                    covered += frames * rows * columns // merge**2
            out.append(sample)
        return out
