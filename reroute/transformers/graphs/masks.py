"""Masks that a decoder is given, for all of its layers or for kinds of them, in a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

__all__ = ["ALL", "GivenMasks", "are_known", "masks_in"]

ALL = ""
"""The kind of layers of a mask that is for all of them."""
Masks = Mapping[str, torch.Tensor | None]


class GivenMasks:
    """Masks by the names of kinds, as a call gives them; those that are none are none in the graph too.

    The others are inputs of it, (B, 1, L, L) and True where visible, in the order of its rows. A filler sees what the
    token sees that it copies, and no token sees a filler.
    """

    def __init__(self, given: Masks | None) -> None:
        """As many as in ``given``, without memory; ``None``: the decoder makes its own."""
        self.form = None if given is None else tuple((kind, mask is not None) for kind, mask in given.items())
        self._kinds = [kind for kind, is_there in self.form or () if is_there]
        self._masks: Sequence[torch.Tensor] = ()

    def layout(self, batch: int, length: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Of the memory."""
        return [((batch, 1, length, length), torch.bool) for _ in self._kinds]

    def place_in(self, masks: Sequence[torch.Tensor]) -> None:
        """Lie in ``masks`` from now on, which are of ``layout``."""
        self._masks = masks

    def fill(self, given: Masks | None, sources: torch.Tensor, beyond: torch.Tensor) -> None:
        """Take in ``given``; ``sources``, ``beyond`` (B, L): see ``PromptTable``."""
        for kind, mask in zip(self._kinds, self._masks, strict=True):
            assert given is not None
            its = given[kind]
            assert its is not None
            batch, length, logical = *sources.shape, its.shape[-1]
            rows = its.expand(batch, -1, -1, -1).reshape(-1, logical).index_select(0, sources.flatten())
            columns = torch.remainder(sources, logical)[:, None].expand(-1, length, -1)
            torch.gather(rows.view(batch, length, logical), 2, columns, out=mask[:, 0])
            mask.logical_and_((beyond == 0)[:, None, None])

    def argument(self, otherwise: torch.Tensor | None) -> Any:
        """What the decoder gets as its mask, or masks; ``otherwise`` in place of those that are none."""
        masks = dict(zip(self._kinds, self._masks, strict=True))
        by_kind = {kind: masks.get(kind, otherwise) for kind, _ in self.form or ()}
        return by_kind.get(ALL, by_kind)


def masks_in(mask: Any) -> Masks | None:
    """By kinds of layers, what a decoder is given as ``mask``; None if it is to make them, of padding."""
    if isinstance(mask, dict):
        return mask
    return {ALL: mask} if isinstance(mask, torch.Tensor) and mask.ndim > 2 else None


def are_known(masks: Masks, embeds: torch.Tensor) -> bool:
    """Whether ``masks`` are such as SDPA takes for ``embeds`` (B, L, C) alone, or none."""
    batch, length, _ = embeds.shape
    return all(
        its is None
        or (
            type(its) is torch.Tensor
            and (its.dtype, its.device) == (torch.bool, embeds.device)
            and its.shape[1:] == (1, length, length)
            and len(its) in (1, batch)
        )
        for its in masks.values()
    )
