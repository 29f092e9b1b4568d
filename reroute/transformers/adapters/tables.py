"""Forms in which decoders give rotary tables to their layers: cos and sin, complex numbers for pairs, or none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["identity", "in_form_of", "no_rotation", "tables_in"]


def tables_in(given: Any) -> tuple[Tensor, Tensor] | None:
    """cos, sin (B or 1, L, rot) of what a layer is ``given``, each angle at both places of its pair.

    None if it is of another form than is known, or there are none.
    """
    if isinstance(given, tuple) and len(given) == 2:
        return given
    if isinstance(given, Tensor) and given.is_complex():
        return given.real.repeat_interleave(2, -1), given.imag.repeat_interleave(2, -1)
    return None


def in_form_of(given: Any, cos: Tensor, sin: Tensor) -> Any:
    """``cos`` and ``sin`` as a layer gets them where it is ``given`` these."""
    if isinstance(given, Tensor):
        return torch.complex(cos[..., 0::2].contiguous(), sin[..., 0::2].contiguous())
    return None if given is None else (cos, sin)


def no_rotation(hidden: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """cos, sin (1, L, ``width``) that turn nothing, for ``hidden`` (B, L, C)."""
    cos = hidden.new_ones(1, hidden.shape[1], width)
    return cos, torch.zeros_like(cos)


def identity(given: Any) -> int:
    """The same for layers that are given the same, also if code of others has put it into tuples of their own."""
    return id(given[0] if isinstance(given, tuple) else given)
