"""Everything that touches Hugging Face Transformers: entrances, model adapters, cache layers, masks."""

from __future__ import annotations

from .adapters import REFUSED, ROUTED, ModelAdapter, adapter_of, check_type, is_supported
from .prompt import Prompt
from .router import Router

__all__ = ["REFUSED", "ROUTED", "ModelAdapter", "Prompt", "Router", "adapter_of", "check_type", "is_supported"]
