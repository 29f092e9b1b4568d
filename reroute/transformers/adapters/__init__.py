"""Adapters of the model families that can be routed: one file each."""

from __future__ import annotations

from typing import Any

from ...errors import UnsupportedModelError
from .base import ModelAdapter
from .llava import Llava
from .qwen2_5_vl import Qwen25VL

__all__ = ["ADAPTERS", "SUPPORTED", "ModelAdapter", "adapter_of", "is_supported"]

ADAPTERS: tuple[type[ModelAdapter], ...] = (Llava, Qwen25VL)
SUPPORTED: tuple[str, ...] = tuple(name for adapter in ADAPTERS for name in adapter.model_types)
"""``config.model_type`` of every supported model."""


def is_supported(model: Any) -> bool:
    """Whether ``model`` is a whole vision-language model that an adapter covers."""
    return _type_of(model) in SUPPORTED and hasattr(model, "generate") and hasattr(model, "lm_head")


def adapter_of(model: Any) -> ModelAdapter:
    """The adapter of ``model``, bound to it.

    Raises:
        UnsupportedModelError: no adapter covers it; lists the known ones.
    """
    kind = _type_of(model)
    for adapter in ADAPTERS:
        if kind in adapter.model_types:
            return adapter(model)
    raise UnsupportedModelError(
        f"Cannot route {type(model).__name__} (model type {kind!r}). Supported model types: {', '.join(SUPPORTED)}."
    )


def _type_of(model: Any) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)
