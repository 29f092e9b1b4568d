"""What configurations of Transformers call the kinds of layers of a decoder."""

from __future__ import annotations

from typing import Final

__all__ = ["CHUNKED", "FULL", "RECURRENT", "REFERENCE", "ROW_BY_ROW", "SLIDING"]

FULL: Final = "full_attention"
SLIDING: Final = "sliding_attention"
CHUNKED: Final = "chunked_attention"
REFERENCE: Final = "reference_sliding_attention"
"""Full for the first prompt, and a window of what comes after it."""
RECURRENT: Final = ("linear_attention", "conv")
"""They keep a state instead of keys: a recurrent one, or rows for a convolution."""
ROW_BY_ROW: Final = ("mlp", "moe")
"""Rows do not meet: an MLP is all that they have."""
