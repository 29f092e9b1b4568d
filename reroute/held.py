"""What holds the numbers of a tensor: itself, or other tensors, as of quantised and of distributed weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["held_by", "is_wrapper"]


def is_wrapper(tensor: Any) -> bool:
    """Whether ``tensor`` has no memory of its own."""
    return bool(is_traceable_wrapper_subclass(tensor))


def held_by(tensor: Any) -> Iterator[torch.Tensor]:
    """The tensors with memory of their own in which ``tensor`` is stored."""
    if is_wrapper(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from held_by(getattr(tensor, name))
    else:
        yield tensor
