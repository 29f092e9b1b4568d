"""What a call tells of its prompt: its tokens, which of them are visual, which are padding, and where it ends."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from transformers.cache_utils import Cache

from ..checks import shown
from ..errors import RerouteError

__all__ = ["Prompt", "has_picture", "prompt_ends", "valid_tokens"]

Kwargs = Mapping[str, Any]

PICTURES: Final = re.compile("pixel_values|image_patches|flattened_patches|image_embeds|mm_encoder_outputs")
"""What names of arguments have in them in which pictures come."""


@dataclass(frozen=True)
class Prompt:
    """What a plan is made of, apart from the settings.

    - ``ids`` (B, L): tokens of the call, or ``visual`` (B, L) bool: which of them are visual. ``mask`` (B, past + L)
      or None.
    - ``positions``: position ids (B, L), or several (…, B, L) of M-RoPE, or None.
    - ``labels`` (B, L) or None: the prompt of a sample ends where its answer begins.
    - ``end``: one past the logical position of the last prompt token, or None where that is the last token.
    """

    ids: torch.Tensor | None
    mask: Any = None
    positions: torch.Tensor | None = None
    cache: Cache | None = None
    labels: torch.Tensor | None = None
    end: int | None = None
    visual: torch.Tensor | None = None

    def __post_init__(self) -> None:
        """RerouteError unless one of ``ids`` and ``visual`` is given, and the other arguments fit it."""
        if (self.ids is None) == (self.visual is None):
            raise RerouteError("Give either input_ids or visual_mask: each tells where the visual tokens are.")
        if self.visual is None:
            if not isinstance(self.ids, torch.Tensor) or self.ids.ndim != 2:
                raise RerouteError(
                    "input_ids are a tensor (batch, length), as inputs['input_ids'] of a processor, not "
                    f"{_described(self.ids)}."
                )
            return
        if not isinstance(self.visual, torch.Tensor) or self.visual.ndim != 2 or self.visual.dtype != torch.bool:
            raise RerouteError(
                "visual_mask is a tensor (batch, length) of bool, True at visual tokens, not "
                f"{_described(self.visual)}."
            )
        if self.labels is not None and self.labels.shape != self.shape:
            raise RerouteError(f"labels are of {tuple(self.labels.shape)} tokens, visual_mask of {self.shape}.")

    @property
    def shape(self) -> tuple[int, int]:
        """(B, L)."""
        known = self.visual if self.ids is None else self.ids
        assert known is not None
        return known.shape[0], known.shape[1]


def _described(given: Any) -> str:
    return f"{tuple(given.shape)} of {given.dtype}" if isinstance(given, torch.Tensor) else shown(given)


def has_picture(kwargs: Kwargs) -> bool:
    """Whether a call with ``kwargs`` brings a picture. Placeholders without one are text, for Transformers too."""
    for name, value in kwargs.items():
        if value is not None and PICTURES.search(name) and (not isinstance(value, Mapping) or value):
            return True
    return False


def valid_tokens(prompt: Prompt) -> Any:
    """(B, L) False at padding; None if the mask does not say.

    Raises:
        RerouteError: it is of other tokens.
    """
    mask, (batch, length) = prompt.mask, prompt.shape
    if mask is None:
        return np.ones((batch, length), dtype=bool)
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        return None
    if mask.shape[0] != batch or mask.shape[1] < length:
        raise RerouteError(
            f"The attention_mask is of {tuple(mask.shape)} tokens, and the prompt has (batch, length) = "
            f"{(batch, length)}. Pass one with a row for each sample, of the tokens in the cache and of this call."
        )
    return mask[:, -length:].cpu().numpy().astype(bool)


def prompt_ends(prompt: Prompt, is_visual: Any, past: int, reopened: int) -> Sequence[int]:
    """One past the last prompt token of each sample: answers that are already there must not rank the picture."""
    batch, length = is_visual.shape
    if prompt.end is not None:
        return [min(length, prompt.end - past)] * batch
    if prompt.labels is None:
        return [length] * batch
    ends = []
    own = np.pad(prompt.labels.cpu().numpy(), ((0, 0), (reopened, 0)), constant_values=-100)
    for row, labels in zip(is_visual, own, strict=True):
        picture = np.flatnonzero(row).max() if row.any() else length  # without one nothing is ranked
        answer = np.flatnonzero(labels[picture + 1 :] != -100)
        # Labels from the picture on leave no question: then all of the text is the prompt.
        ends.append(int(picture + 1 + answer[0]) if len(answer) and answer[0] > 0 else length)
    return ends
