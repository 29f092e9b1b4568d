"""Adapters of the models that can be routed: what is known of one is found out; a file adds what cannot be."""

from __future__ import annotations

from typing import Any

from ...errors import UnsupportedModelError
from . import places
from .base import ModelAdapter
from .between import FeatureForm, Features, added_before
from .llava import Llava
from .places import PER_TOKEN
from .qwen2_5_vl import Qwen25VL
from .types import REFUSED, ROUTED

__all__ = [
    "FAMILIES",
    "PER_TOKEN",
    "REFUSED",
    "ROUTED",
    "FeatureForm",
    "Features",
    "ModelAdapter",
    "adapter_of",
    "added_before",
    "check_type",
    "is_supported",
]

FAMILIES: dict[str, type[ModelAdapter]] = {kind: family for family in (Llava, Qwen25VL) for kind in family.model_types}
"""Of the model types that have a file, by ``config.model_type``."""


def is_supported(model: Any) -> bool:
    """Whether ``model`` is a whole vision-language model that may be routed; ``adapter_of`` looks closer."""
    config: Any = getattr(model, "config", None)
    if not (places.visual_ids(config) and hasattr(model, "generate") and hasattr(model, "lm_head")):
        return False
    return config.model_type not in REFUSED and places.has_decoder(getattr(model, "model", None))


def adapter_of(model: Any) -> ModelAdapter:
    """The adapter of ``model``, bound to it.

    Raises:
        UnsupportedModelError: it cannot be routed; says why.
    """
    config: Any = getattr(model, "config", None)
    check_type(config, type(model).__name__)
    return FAMILIES.get(config.model_type, ModelAdapter)(model)


def check_type(config: Any, name: str) -> None:
    """Refuse a model called ``name`` by its configuration alone.

    Raises:
        UnsupportedModelError: models of its type cannot be routed, or it has no visual tokens.
    """
    kind = getattr(config, "model_type", None)
    why = REFUSED.get(str(kind), "")
    if not why and not places.visual_ids(config):
        why = f"its configuration names no visual tokens (image_token_id). Known types: {', '.join(ROUTED)}"
    if why:
        raise UnsupportedModelError(f"Cannot route {name} (model type {kind!r}): {why}.")
