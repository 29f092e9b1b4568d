"""Attention masks of compact rows, in the format of each attention implementation."""

from __future__ import annotations

from .formats import MaskFormat, mask_format_of
from .made_mask import MADE_MASK, MadeMask
from .masks import decode_mask, prefill_mask

__all__ = ["MADE_MASK", "MadeMask", "MaskFormat", "decode_mask", "mask_format_of", "prefill_mask"]
