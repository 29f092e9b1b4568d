"""What cannot be picked row by row is refused: several prompts in one row, and unknown arguments per token."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from ..errors import RerouteError

__all__ = ["check_one_prompt_per_row", "check_tokens_of_others", "is_packed"]

BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")
"""Arguments that tell kernels where the sequences of a packed row begin."""

UNREAD = ("token_type_ids", "mm_token_type_ids", "labels", "shift_labels")
"""Arguments per token that no layer reads: kinds of tokens, and what only the loss needs."""

_PACKED = (
    "Several prompts are packed in one row. Their visual tokens would be ranked by the last one's question. Put each "
    "prompt in a row of its own, padded, with an attention_mask; or disable routing for this call."
)


def check_one_prompt_per_row(position_ids: torch.Tensor | None, valid: Any, *, has_mask: bool, axes: int = 3) -> None:
    """Refuse rows in which ``is_packed``. Waits for the device.

    Raises:
        RerouteError: rows are packed.
    """
    if is_packed(position_ids, valid, has_mask=has_mask, axes=axes):
        raise RerouteError(_PACKED)


def is_packed(position_ids: torch.Tensor | None, valid: Any, *, has_mask: bool, axes: int = 3) -> bool:
    """Whether position ids begin anew within a row. Waits for the device.

    Args:
        position_ids: (B, L), or those of M-RoPE, (axes, B, L), or with one more row of text in front; or None.
        valid: (B, L) False at padding.
        has_mask: whether there is an attention mask. Without one, Transformers takes any step but 1 for a border,
            unless it has the positions of M-RoPE only.
        axes: how many positions M-RoPE has for a token.
    """
    if position_ids is None:
        return False
    counts_tokens = position_ids.ndim == 2 or len(position_ids) == axes + 1
    first = position_ids if position_ids.ndim == 2 else position_ids[0]  # of M-RoPE: of text, or time
    ids = np.broadcast_to(first.cpu().numpy(), valid.shape)
    for row, is_token in zip(ids, valid, strict=True):
        known, columns = row[is_token], np.flatnonzero(is_token)
        steps = np.diff(known)
        anew = steps != 1 if counts_tokens and not has_mask else steps < 0
        if has_mask:  # generate counts drafts behind a masked token from its filler on
            anew &= (np.diff(columns) == 1) | (known[1:] == known[:1])
        if anew.any():
            return True
    return False


def check_tokens_of_others(
    kwargs: Mapping[str, Any], known: Collection[str], counts: Callable[[], Collection[int]]
) -> None:
    """Refuse arguments beyond the ``known`` ones that layers would get at the logical length.

    ``counts``: how many entries an argument with one for each token may have; asked if there is any to look at.

    Raises:
        RerouteError: names the argument.
    """
    for name, value in kwargs.items():
        if name in known or name in UNREAD or value is None:
            continue
        if name in BORDERS:
            raise RerouteError(f"{name} was given: {_PACKED}")
        if any(size in counts() for leaf in tree_leaves(value) for size in getattr(leaf, "shape", ())):
            raise RerouteError(
                f"{name} has an entry for each token, and it is not known how to pick those of the tokens that run. "
                "Call the model without it, or disable routing for this call."
            )
