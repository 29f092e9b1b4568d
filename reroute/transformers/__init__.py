"""Everything that touches Hugging Face Transformers: hooks, model families, cache layers, masks."""

from __future__ import annotations

from .controller import Controller
from .families import FAMILIES, SUPPORTED, Family, family_of, is_supported

__all__ = ["FAMILIES", "SUPPORTED", "Controller", "Family", "family_of", "is_supported"]
