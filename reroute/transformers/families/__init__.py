"""Model families that can be routed: one file each."""

from __future__ import annotations

from typing import Any

from ...errors import UnsupportedModelError
from .base import Family
from .llava import Llava
from .qwen2_5_vl import Qwen25VL

__all__ = ["FAMILIES", "SUPPORTED", "Family", "family_of", "is_supported"]

FAMILIES: tuple[type[Family], ...] = (Llava, Qwen25VL)
SUPPORTED: tuple[str, ...] = tuple(name for family in FAMILIES for name in family.model_types)
"""``config.model_type`` of every supported model."""


def is_supported(model: Any) -> bool:
    """Whether ``model`` is a whole vision-language model of a known family."""
    return _type_of(model) in SUPPORTED and hasattr(model, "generate") and hasattr(model, "lm_head")


def family_of(model: Any) -> Family:
    """The family of ``model``, bound to it.

    Raises:
        UnsupportedModelError: no family covers it; lists the known ones.
    """
    kind = _type_of(model)
    for family in FAMILIES:
        if kind in family.model_types:
            return family(model)
    raise UnsupportedModelError(
        f"Cannot route {type(model).__name__} (model type {kind!r}). Supported model types: {', '.join(SUPPORTED)}."
    )


def _type_of(model: Any) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)
