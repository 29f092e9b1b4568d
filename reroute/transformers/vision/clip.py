"""CLIP, as LLaVA-1.5 has it: each patch is a visual token, and a CLS row before them is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...errors import RerouteError
from ...rankers.vision import Grid, TowerShape
from .base import Tower, TowerRun

__all__ = ["ClipTower"]

SETTINGS = ("vision_feature_layer", "vision_feature_select_strategy")
"""What LLaVA's calls may have in place of its configuration."""


class ClipTower(Tower):
    """``CLIPVisionModel``, whose states go through the projector without those of CLS."""

    module_types = ("CLIPVisionModel",)

    @property
    def shape(self) -> TowerShape:
        """See ``Tower``."""
        strategy, layer = self.config.vision_feature_select_strategy, self.config.vision_feature_layer
        if strategy != "default":
            raise RerouteError(
                f"vision_feature_select_strategy={strategy!r} makes a visual token of CLS too, and a ranker of this "
                "schedule looks at the patches. Use 'default', or rankers that do not look at the pictures."
            )
        vision = self.config.vision_config
        return TowerShape(
            num_layers=len(self.layers),
            hidden=vision.hidden_size,
            heads=vision.num_attention_heads,
            has_cls=True,
            patches_per_token=1,
            full_attention=tuple(range(len(self.layers))),
            features=tuple(map(self.state_number, [layer] if isinstance(layer, int) else layer)),
            projector=self._projector_size,
        )

    def images(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[list[Grid]]:
        """See ``Tower``."""
        # Transformers from 5.20 on: the layers that become features.
        selected = kwargs.get("output_hidden_states")
        if selected is not None and not isinstance(selected, bool):
            self.check_call({"vision_feature_layer": selected})
        patch = self.config.vision_config.patch_size
        count, _, height, width = (args[0] if args else kwargs["pixel_values"]).shape
        return [[(height // patch, width // patch)]] * count

    def check_call(self, call: Mapping[str, Any]) -> None:
        """See ``Tower``."""
        for name in SETTINGS:
            given, usual = call.get(name), getattr(self.config, name)
            if given is not None and given != usual:
                raise RerouteError(
                    f"{name}={given!r} is given for this call, the model's is {usual!r}, and a ranker of this schedule "
                    f"looks at the vision tower. Set model.config.{name}, and call enable again."
                )

    def tokens(self, run: TowerRun, index: int, *, as_run: bool) -> torch.Tensor:
        """See ``Tower``."""
        patches = run.states[index][:, 1:]
        return patches.flatten(0, 1)

    def cls(self, run: TowerRun, index: int) -> torch.Tensor:
        """See ``Tower``."""
        return run.states[index][:, 0]

    def attention(self, run: TowerRun, layer: int) -> torch.Tensor:
        """See ``Tower``. The row of CLS alone, as the layer's eager attention computes it."""
        attention, normed = self._normed(run, layer)
        query = _heads(attention.q_proj(normed[:, :1]), attention)
        keys = _heads(attention.k_proj(normed), attention)
        logits = query @ keys.transpose(-1, -2) * attention.scale  # (I, H, 1, 1 + P)
        weights: torch.Tensor = logits.softmax(-1, dtype=torch.float32).to(query.dtype)
        return weights[:, :, 0, 1:].transpose(0, 1).flatten(1)

    def keys(self, run: TowerRun, layer: int) -> torch.Tensor:
        """See ``Tower``."""
        attention, normed = self._normed(run, layer)
        keys: torch.Tensor = attention.k_proj(normed[:, 1:]).unflatten(-1, (-1, attention.head_dim))
        return keys.flatten(0, 1)

    def _layers(self) -> Sequence[Any]:
        layers: Sequence[Any] = self.module.encoder.layers
        return layers

    def _normed(self, run: TowerRun, layer: int) -> tuple[Any, torch.Tensor]:
        """The attention of ``layer``, and what it gets."""
        module = self.layers[layer]
        return module.self_attn, module.layer_norm1(run.states[layer])


def _heads(projected: torch.Tensor, attention: Any) -> torch.Tensor:
    """(I, S, H * D) -> (I, H, S, D)."""
    heads: torch.Tensor = projected.unflatten(-1, (-1, attention.head_dim))
    return heads.transpose(1, 2)
