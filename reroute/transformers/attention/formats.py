"""What each attention implementation takes for a mask."""

from __future__ import annotations

from typing import Any, Literal

from ...errors import RerouteError

__all__ = ["MaskFormat", "mask_format_of"]

MaskFormat = Literal["additive", "boolean", "block", "padding"]
"""4-D and added to the logits, 4-D and True where visible, a ``BlockMask``, or 2-D and True where there is a token."""

FORMATS: dict[str, MaskFormat] = {"eager": "additive", "sdpa": "boolean", "flex_attention": "block"}


def mask_format_of(text_config: Any) -> MaskFormat:
    """What the decoder's present attention takes; ``padding`` means flash attention.

    Raises:
        RerouteError: an attention implementation whose masks are not known.
    """
    name = str(text_config._attn_implementation)
    if name in FORMATS:
        return FORMATS[name]
    if "flash" in name:  # what Transformers asks; kernels from a hub have other names around it
        return "padding"
    raise RerouteError(
        f"Attention implementation {name!r} cannot be routed: its masks are not known. Call "
        "model.set_attn_implementation(…) with 'sdpa', 'eager', 'flex_attention' or a flash attention."
    )
