"""Nemotron H Omni: each layer has one part, called mixer: an attention, a state, or an MLP."""

from __future__ import annotations

from typing import Any, ClassVar

from ...errors import UnsupportedModelError
from .base import ModelAdapter

__all__ = ["NemotronHOmni"]


class NemotronHOmni(ModelAdapter):
    """``NemotronH_Omni_Reasoning_V3``, unless it drops tokens of videos itself."""

    model_types = ("nemotron_h_omni",)
    attention: ClassVar[str] = "mixer"

    def __init__(self, model: Any) -> None:
        """See ``ModelAdapter``."""
        if model.video_pruning_rate > 0:
            raise UnsupportedModelError(
                f"{type(model).__name__} drops tokens of videos itself, and what its decoder gets is shorter than the "
                "prompt. Set model.video_pruning_rate = 0: routing leaves tokens out instead."
            )
        super().__init__(model)
