"""Adapters of the models that can be routed: what is known of one is found out; a file adds what cannot be."""

from __future__ import annotations

from typing import Any

from ...errors import UnsupportedModelError
from . import places
from .base import ModelAdapter
from .between import FeatureForm, Features, added_before
from .chameleon import Chameleon
from .kosmos2_5 import Kosmos25
from .llama4 import Llama4
from .llava import Llava
from .nemotron_h_omni import NemotronHOmni
from .places import PER_TOKEN
from .qwen2_5_vl import Qwen25VL
from .tables import identity, in_form_of, no_rotation, tables_in
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
    "identity",
    "in_form_of",
    "is_supported",
    "no_rotation",
    "tables_in",
]

FAMILIES: dict[str, type[ModelAdapter]] = {
    kind: family
    for family in (Chameleon, Kosmos25, Llama4, Llava, NemotronHOmni, Qwen25VL)
    for kind in family.model_types
}
"""Of the model types that have a file, by ``config.model_type``."""


def is_supported(model: Any) -> bool:
    """Whether ``model`` is a whole vision-language model that may be routed; ``adapter_of`` looks closer."""
    config: Any = getattr(model, "config", None)
    has_pictures = places.visual_ids(config) or _family(config).marks
    if not (has_pictures and hasattr(model, "generate") and places.is_whole(model)):
        return False
    return config.model_type not in REFUSED


def adapter_of(model: Any) -> ModelAdapter:
    """The adapter of ``model``, bound to it.

    Raises:
        UnsupportedModelError: it cannot be routed; says why.
    """
    config: Any = getattr(model, "config", None)
    if config is None and getattr(getattr(model, "module", None), "config", None) is not None:
        raise UnsupportedModelError(f"{type(model).__name__} is a wrapper around the model. Pass its .module.")
    check_type(config, type(model).__name__)
    return _family(config)(model)


def _family(config: Any) -> type[ModelAdapter]:
    return FAMILIES.get(getattr(config, "model_type", ""), ModelAdapter)


def check_type(config: Any, name: str) -> None:
    """Refuse a model called ``name`` by its configuration alone.

    Raises:
        UnsupportedModelError: models of its type cannot be routed, or it has no visual tokens.
    """
    kind = getattr(config, "model_type", None)
    why = REFUSED.get(str(kind), "")
    if not (why or places.visual_ids(config) or _family(config).marks):
        why = (
            "its configuration names no visual tokens (image_token_id). Pass a whole vision-language model; reroute "
            f"doctor lists the {len(ROUTED)} types that are known"
        )
    if why:
        raise UnsupportedModelError(f"Cannot route {name} (model type {kind!r}): {why}.")
