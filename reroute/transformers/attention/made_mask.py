"""A mask that ``generate`` makes ahead of its forwards, as it does for static caches, and what is known of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

__all__ = ["MADE_MASK", "MadeMask"]

MADE_MASK = "reroute_made_mask"
"""The keyword argument in which a forward of ``generate`` is given a ``MadeMask``, if there is one."""


class MadeMask(NamedTuple):
    """What is known of masks that ``generate`` has made ahead, as it does for static caches.

    - ``padding``: what it made them of, (B, past + L) or None.
    - ``is_causal``: whether they say no more than that, and what comes after what. Those of a model that makes its own
      say more: that pictures see themselves both ways.
    """

    padding: Any
    is_causal: bool

    @property
    def is_known(self) -> bool:
        """Whether the padding can be read off it."""
        return self.padding is None or getattr(self.padding, "ndim", 0) == 2

    def of_prompt(self, mask: Any, length: int) -> Any:
        """What ``mask`` says of a prompt of ``length`` in an empty cache, whatever room that has; None if no more than
        what a decoder without a mask makes of it.
        """
        if self.is_causal:
            return None
        if isinstance(mask, dict):
            return {kind: self.of_prompt(its, length) for kind, its in mask.items()}
        return mask[..., :length] if isinstance(mask, torch.Tensor) else mask
