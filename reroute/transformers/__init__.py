"""Everything that touches Hugging Face Transformers: hooks, model adapters, cache layers, masks."""

from __future__ import annotations

from .adapters import ADAPTERS, SUPPORTED, ModelAdapter, adapter_of, is_supported
from .hooks import RoutingHooks

__all__ = ["ADAPTERS", "SUPPORTED", "ModelAdapter", "RoutingHooks", "adapter_of", "is_supported"]
