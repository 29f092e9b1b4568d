"""Everything that touches Hugging Face Transformers: entrances, model adapters, cache layers, masks."""

from __future__ import annotations

from .adapters import ADAPTERS, SUPPORTED, ModelAdapter, adapter_of, is_supported
from .planner import Prompt
from .router import Router

__all__ = ["ADAPTERS", "SUPPORTED", "ModelAdapter", "Prompt", "Router", "adapter_of", "is_supported"]
